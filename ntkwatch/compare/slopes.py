"""Log–log slopes: least squares with a t interval, and which theoretical exponent of the width they are nearer.

Kernel change after training falls as n^−1 with the width n in the NTK parametrization and in the standard one with
lr ~ 1/n, and does not fall (n^0) in muP; `kernel_distance`, quadratic in the change, doubles the exponent. The lines
hold for (stochastic) gradient descent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The exponents of a shrinking kernel motion. parameter_distance has none: it falls with width at fixed richness too.
LAZY_EXPONENT = {"kernel_angle": -1.0, "relative_change": -1.0, "taylor_ratio": -1.0, "kernel_distance": -2.0}
LEVEL = 0.95


class Slope(NamedTuple):
    """A log–log least-squares slope: `value`, its 95 % t interval [`low`, `high`], `r2`, and `n` points."""

    value: float
    low: float
    high: float
    r2: float
    n: int

    @property
    def dof(self) -> int:
        """Degrees of freedom of the interval, n − 2."""
        return self.n - 2

    def __str__(self) -> str:
        interval = "no interval" if math.isnan(self.low) else f"{self.low:+.2f} … {self.high:+.2f}"
        return f"{self.value:+.2f} [{interval}], R² {self.r2:.3f}, n {self.n}"


def fit_slope(x: Sequence[float], y: Sequence[float], level: float = LEVEL) -> Slope:
    """Least squares of log y on log x over all points, with the t interval at `level` on n − 2 degrees of freedom.

    x, y: positive, [n]. Fewer than 3 points give a NaN interval; a y that does not vary gives r2 = NaN.

    >>> round(fit_slope([1, 2, 4], [8, 4, 2]).value, 6)
    -1.0
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"a log–log slope needs two distinct x and positive values, got x {list(x)} and y {list(y)}")
    u, v = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    n, centred = len(u), u - u.mean()
    value = float(centred @ v / (centred @ centred))
    residual = v - v.mean() - value * centred
    total = float(((v - v.mean()) ** 2).sum())
    # Below this the spread of log y is rounding alone, and r2 would be a ratio of two roundings.
    flat = total <= n * (8 * np.finfo(float).eps * max(1.0, float(np.abs(v).max()))) ** 2
    r2 = math.nan if flat else 1 - float(residual @ residual) / total
    if n < 3:
        return Slope(value, math.nan, math.nan, r2, n)
    half = _t_quantile(level, n - 2) * math.sqrt(float(residual @ residual) / (n - 2) / float(centred @ centred))
    return Slope(value, value - half, value + half, r2, n)


def _t_quantile(level: float, dof: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, dof))


def read_slope(name: str, slope: Slope) -> str:
    """One clause that places a slope against width between the lazy line (−1; −2 for distance) and the muP line, 0."""
    lazy = LAZY_EXPONENT.get(name)
    if lazy is None:
        return "no reference line: it falls with width at fixed richness too"
    near, names = (lazy, "NTP, SP with lr ~ 1/n") if slope.value < lazy / 2 else (0.0, "muP")
    text = f"nearer {_signed(near)} ({names}) than {_signed(lazy - near)}"
    if math.isnan(slope.low):
        return f"{text}; no interval from {slope.n} points"
    held = [line for line in (lazy, 0.0) if slope.low <= line <= slope.high]
    if len(held) == 2:
        return f"{text}, but the interval holds both: undecided, add widths or seeds"
    if held == [near]:
        return f"{text}; the interval holds {_signed(near)}"
    return f"{text}; the interval holds neither" if not held else f"{text}, but the interval holds {_signed(held[0])}"


def bent(name: str, slope: Slope) -> bool:
    """Whether a slope has reference lines and its interval holds neither."""
    return (
        name in LAZY_EXPONENT and slope.n > 2 and not any(slope.low <= e <= slope.high for e in reference_lines(name))
    )


def reference_lines(name: str) -> dict[float, str]:
    """Exponent of the width -> its words on a figure; empty for a metric that has no reference lines."""
    lazy = LAZY_EXPONENT.get(name)
    return {} if lazy is None else {lazy: f"{_signed(lazy)}: NTP, SP", 0.0: "0: muP"}


def _signed(exponent: float) -> str:
    return f"−{-exponent:g}" if exponent < 0 else f"{exponent:g}"
