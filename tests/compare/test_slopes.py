"""Slopes: known powers are recovered, the interval is the textbook one and covers, and readings say what it holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ntkwatch.compare.slopes import Slope, fit_slope, read_slope, reference_lines

WIDTHS = np.repeat([32.0, 64.0, 128.0, 256.0], 3)


@pytest.mark.parametrize("power", [-2.0, -1.0, -0.5, 0.5, 1.0])
def test_a_noise_free_power_law_is_recovered(power: float) -> None:
    slope = fit_slope(list(WIDTHS), list(3.7 * WIDTHS**power))
    assert slope.value == pytest.approx(power, abs=1e-12)
    assert (slope.low, slope.high) == pytest.approx((power, power), abs=1e-10)
    assert slope.r2 == pytest.approx(1.0)
    assert slope.n == 12
    assert slope.dof == 10


def test_a_constant_has_slope_zero_and_no_r2() -> None:
    slope = fit_slope(list(WIDTHS), [0.3] * 12)
    assert slope.value == pytest.approx(0, abs=1e-12)
    assert math.isnan(slope.r2), "R² of a constant is 0/0"


def _draw(seed: int, power: float = -1.0, noise: float = 0.3) -> list[float]:
    return list(WIDTHS**power * np.exp(noise * np.random.default_rng(seed).standard_normal(len(WIDTHS))))


@pytest.mark.parametrize("seed", range(5))
def test_slope_and_interval_equal_scipys(seed: int) -> None:
    y = _draw(seed)
    ours, theirs = fit_slope(list(WIDTHS), y), stats.linregress(np.log(WIDTHS), np.log(y))
    half = stats.t.ppf(0.975, 10) * theirs.stderr
    assert ours.value == pytest.approx(theirs.slope, rel=1e-10)
    assert (ours.low, ours.high) == pytest.approx((theirs.slope - half, theirs.slope + half), rel=1e-10)
    assert ours.r2 == pytest.approx(theirs.rvalue**2, rel=1e-10)


def test_the_interval_covers_in_95_per_cent_of_draws() -> None:
    slopes = [fit_slope(list(WIDTHS), _draw(seed)) for seed in range(1000)]
    covered = sum(s.low <= -1 <= s.high for s in slopes)
    assert 930 <= covered <= 970, f"{covered} of 1000 intervals hold the true slope; 950 ± 3·6.9 expected"


def test_units_do_not_matter() -> None:
    y = _draw(0)
    assert fit_slope(list(WIDTHS * 7), [v * 1e-9 for v in y])[:4] == pytest.approx(fit_slope(list(WIDTHS), y)[:4])


def test_two_points_have_a_slope_and_no_interval() -> None:
    value, low, high, r2, n = fit_slope([2, 8], [4, 1])
    assert value == pytest.approx(-1)
    assert math.isnan(low)
    assert math.isnan(high)
    assert r2 == pytest.approx(1)
    assert n == 2


@pytest.mark.parametrize(
    ("x", "y"),
    [([2, 2, 2], [1, 2, 3]), ([1, 2], [0, 1]), ([0, 2], [1, 1]), ([1, 2], [1]), ([1], [1]), ([1, 2], [-1, 1])],
    ids=["one x", "y of 0", "x of 0", "unlike lengths", "one point", "negative y"],
)
def test_what_has_no_slope_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="two distinct x and positive values"):
        fit_slope(x, y)


READINGS = {
    "lazy, sure": ("kernel_angle", (-1.02, -1.1, -0.9), ["nearer −1", "the interval holds −1"]),
    "rich, sure": ("kernel_angle", (-0.05, -0.2, 0.1), ["nearer 0 (muP)", "the interval holds 0"]),
    "distance doubles": ("kernel_distance", (-1.4, -2.2, -0.9), ["nearer −2", "the interval holds −2"]),
    "distance at −0.9 is nearer 0": ("kernel_distance", (-0.9, -1.0, -0.8), ["nearer 0 (muP)", "holds neither"]),
    "undecided": ("taylor_ratio", (-0.6, -1.3, 0.1), ["nearer −1", "holds both: undecided"]),
    "neither": ("relative_change", (-0.7, -0.8, -0.6), ["nearer −1", "the interval holds neither"]),
    "nearer one, holds the other": ("kernel_angle", (-0.4, -1.05, -0.1), ["nearer 0", "but the interval holds −1"]),
    "no interval": ("kernel_angle", (-0.9, math.nan, math.nan), ["nearer −1", "no interval from 2 points"]),
    "no line": ("parameter_distance", (-0.5, -0.6, -0.4), ["no reference line"]),
}


@pytest.mark.parametrize("case", READINGS)
def test_readings(case: str) -> None:
    name, (value, low, high), wanted = READINGS[case]
    text = read_slope(name, Slope(value, low, high, 0.9, 2 if math.isnan(low) else 12))
    for part in wanted:
        assert part in text, f"{case}: {text!r} lacks {part!r}"


def test_reference_lines_on_figures() -> None:
    assert set(reference_lines("kernel_angle")) == {-1.0, 0.0}
    assert set(reference_lines("kernel_distance")) == {-2.0, 0.0}, "distance is quadratic in the change"
    assert reference_lines("parameter_distance") == {}
