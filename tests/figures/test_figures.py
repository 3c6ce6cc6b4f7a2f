"""The figures: what is drawn is the data, in type that can be read; no pyplot, no setting left changed."""

from __future__ import annotations

import functools
import itertools
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from ntkwatch import figures
from ntkwatch.compare.slopes import Slope


def kernel(n: int = 12, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.T / 30


LABELS = torch.tensor([2, 0, 1, 2, 0, 1, 0, 0, 2, 7, 7, 1])
SPECTRA = {step: torch.linalg.eigvalsh(kernel(seed=step)).flip(0) * (1 + step) for step in (0, 1, 2, 4, 8)}


def table(widths: tuple[float, ...] = (32, 64, 128, 256), seeds: int = 3, exponent: float = -1.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(f"w{w}s{s}", w, s, 8 * w**exponent * math.exp(0.1 * rng.normal())) for w in widths for s in range(seeds)]
    return pd.DataFrame(rows, columns=["run", "width", "seed", "kernel_angle"])


def fitted(rows: pd.DataFrame) -> dict[str, Slope]:
    from scipy import stats

    found = stats.linregress(np.log(rows["width"]), np.log(rows["kernel_angle"]))
    half = stats.t.ppf(0.975, len(rows) - 2) * found.stderr
    return {"kernel_angle": Slope(found.slope, found.slope - half, found.slope + half, found.rvalue**2, len(rows))}


def history() -> pd.DataFrame:
    rows = [
        (run, width, step, "kernel_angle", math.log1p(step) / width)
        for run, width in (("a", 32), ("b", 32), ("c", 64), ("d", 512))
        for step in (0, 1, 2, 4, 8, 300)
    ]
    rows += [("a", 32, 0, "taylor_ratio", math.nan), ("a", 32, 1, "taylor_ratio", 0.5)]
    return pd.DataFrame(rows, columns=["run", "width", "step", "metric", "value"])


def kinds() -> dict[str, tuple[pd.DataFrame, Slope]]:
    tables = {"NTK": table(), "muP": table(exponent=0.0)}
    return {kind: (rows, fitted(rows)["kernel_angle"]) for kind, rows in tables.items()}


LOSSES = pd.DataFrame(
    {"loss": [1.0, 0.5, 0.1], "loss_if_lazy": [1.0, 0.6, math.nan], "absent": math.nan}, index=[0, 10, 100]
)
CASES: dict[str, Callable[[], Figure]] = {
    "kinds of run": lambda: figures.slopes_together(kinds(), "kernel_angle"),
    "losses": lambda: figures.named_curves(LOSSES, ["loss", "loss_if_lazy"], title="Losses", unit="loss"),
    "losses, nothing": lambda: figures.named_curves(LOSSES, ["absent"], title="Losses", unit="loss"),
    "spectra": lambda: figures.spectra(SPECTRA),
    "spectra, noise floor near": lambda: figures.spectra(SPECTRA, noise_floor=1e-2),
    "spectra, noise floor far": lambda: figures.spectra(SPECTRA, noise_floor=1e-13),
    "spectra, one step": lambda: figures.spectra({7: SPECTRA[0]}),
    "spectra, one eigenvalue": lambda: figures.spectra({0: torch.ones(1)}),
    "spectra, none positive": lambda: figures.spectra({0: torch.zeros(4), 1: -torch.ones(4)}),
    "spectra, no step": lambda: figures.spectra({}),
    "spectra, not finite": lambda: figures.spectra({0: torch.tensor([math.nan, math.inf, 1.0])}),
    "spectra, steps far apart": lambda: figures.spectra(dict.fromkeys((3, 5, 10**6, 10**7), SPECTRA[0])),
    "kernel": lambda: figures.kernel_heatmap(kernel(), LABELS),
    "kernel, positive": lambda: figures.kernel_heatmap(kernel().abs(), LABELS, caption="step 3"),
    "kernel, no labels": lambda: figures.kernel_heatmap(kernel()),
    "kernel, regression targets": lambda: figures.kernel_heatmap(kernel(), torch.randn(12)),
    "kernel, many classes": lambda: figures.kernel_heatmap(kernel(64), torch.arange(64)),
    "kernel, one probe": lambda: figures.kernel_heatmap(torch.ones(1, 1), torch.tensor([0])),
    "kernel, zero": lambda: figures.kernel_heatmap(torch.zeros(4, 4)),
    "kernel, constant": lambda: figures.kernel_heatmap(torch.ones(4, 4)),
    "kernel, not finite": lambda: figures.kernel_heatmap(torch.full((4, 4), math.nan)),
    "kernel, partly finite": lambda: figures.kernel_heatmap(torch.eye(4).fill_diagonal_(math.inf)),
    "slopes": lambda: figures.width_slopes(table(), fitted(table()), "kernel_angle"),
    "slopes, note": lambda: figures.width_slopes(table(), fitted(table()), "kernel_angle", note="probes differ " * 20),
    "slopes, no fit": lambda: figures.width_slopes(table(), {}, "kernel_angle"),
    "slopes, no interval": lambda: figures.width_slopes(
        table((32, 64), 1), {"kernel_angle": Slope(-1, math.nan, math.nan, 1, 2)}, "kernel_angle"
    ),
    "slopes, one width": lambda: figures.width_slopes(table((64,)), {}, "kernel_angle"),
    "slopes, many decades": lambda: figures.width_slopes(table((1, 10**6)), fitted(table((1, 10**6))), "kernel_angle"),
    "slopes, nothing positive": lambda: figures.width_slopes(table().assign(kernel_angle=0.0), {}, "kernel_angle"),
    "curves": lambda: figures.metric_curves(history(), "kernel_angle"),
    "curves, one point": lambda: figures.metric_curves(history(), "taylor_ratio"),
    "curves, nothing": lambda: figures.metric_curves(history(), "absent"),
}


@functools.cache
def draw(name: str) -> tuple[Figure, np.ndarray]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = CASES[name]()
        return figure, figures.rgb(figure)


@pytest.fixture(params=CASES)
def drawn(request: pytest.FixtureRequest) -> Figure:
    return draw(request.param)[0]


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


# ── laws of every figure ──────────────────────────────────────────────────────────────────────────────────────────────
def test_type_is_at_least_12_points(drawn: Figure) -> None:
    small = {text.get_text(): text.get_fontsize() for text in texts(drawn) if text.get_fontsize() < 12}
    assert not small


def test_one_panel_an_image_with_its_axes_named(drawn: Figure) -> None:
    assert len(panels(drawn)) == 1
    axes = panels(drawn)[0]
    assert axes.get_title(loc="left")
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_no_text_leaves_the_image(drawn: Figure) -> None:
    box = drawn.bbox
    out = [
        t.get_text()
        for t in texts(drawn)
        if (e := t.get_window_extent()).x0 < -1 or e.x1 > box.x1 + 1 or e.y1 > box.y1 + 1
    ]
    ticks = {
        label.get_text() for axes in drawn.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()
    }
    assert not set(out) - ticks, "ticks beyond an axis' limits are not drawn; anything else must fit"


@pytest.mark.parametrize("name", CASES)
def test_a_figure_is_a_picture(name: str) -> None:
    pixels = draw(name)[1]
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.min() < 100 < 250 < pixels.max(), "an empty picture"


@pytest.mark.parametrize("name", ["spectra", "kernel", "slopes", "curves"])
def test_the_same_data_give_the_same_pixels_and_no_random_number_is_drawn(name: str) -> None:
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # noqa: NPY002
    pixels = figures.rgb(CASES[name]())
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert np.array_equal(pixels, draw(name)[1])


def test_pyplot_is_never_loaded_and_the_users_settings_stay(tmp_path: Path) -> None:
    code = """
import sys, torch
from ntkwatch import figures
assert "matplotlib" not in sys.modules, "matplotlib is loaded before the first figure"
import matplotlib
matplotlib.rcParams["font.size"] = 5
matplotlib.rcParams["text.usetex"] = True  # would need a LaTeX installation
matplotlib.rcParams["axes.facecolor"] = "black"
before = {k: v for k, v in dict.items(matplotlib.rcParams)}
figure = figures.spectra({0: torch.ones(3), 1: torch.ones(3)})
assert figure.axes[0].get_facecolor()[:3] == (1, 1, 1)
figures.rgb(figure)
figures.save(figure, sys.argv[1])
assert before == {k: v for k, v in dict.items(matplotlib.rcParams)}
assert "matplotlib.pyplot" not in sys.modules
print("fine")
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "fine", ran.stderr[-1500:]


def test_settings_come_back_when_drawing_fails() -> None:
    before = dict.copy(matplotlib.rcParams)
    with pytest.raises(ValueError, match=r"labels must be one for each of the 12 probes, got shape \(3,\); pass \[n\]"):
        figures.kernel_heatmap(kernel(), torch.arange(3))
    assert dict.copy(matplotlib.rcParams) == before


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_figure_is_saved_as_its_ending_says(kind: str, tmp_path: Path) -> None:
    figures.save(figures.spectra(SPECTRA), tmp_path / f"a.{kind}")
    head = (tmp_path / f"a.{kind}").read_bytes()[:200]
    assert {"png": b"PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind] in head


# ── spectra ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_spectra_draw_the_eigenvalues_on_log_axes_a_line_a_step() -> None:
    axes = figures.spectra(SPECTRA).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert len(axes.lines) == len(SPECTRA)
    for line, step in zip(axes.lines, sorted(SPECTRA), strict=True):
        assert list(line.get_xdata()) == list(range(1, 13)), step
        assert list(line.get_ydata()) == sorted(SPECTRA[step].tolist(), reverse=True), step


def test_an_eigenvalue_that_is_not_positive_leaves_its_rank_empty() -> None:
    line = figures.spectra({0: torch.tensor([4.0, 0.0, -1.0, 2.0])}).axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [4.0, 2.0]


def test_colours_go_from_dark_to_light_with_the_step() -> None:
    """Lightness alone orders the steps, so any colour vision reads them, and grey print too."""
    lines = figures.spectra(SPECTRA).axes[0].lines
    lightness = [float(np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.2126, 0.7152, 0.0722])) for line in lines]
    assert lightness == sorted(lightness)
    assert lightness[-1] < 0.85, "too pale on white"
    assert min(b - a for a, b in itertools.pairwise(lightness)) > 0.02


def test_the_colour_bar_names_the_steps() -> None:
    bar = figures.spectra(SPECTRA).axes[1]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0", "1", "2", "4", "8"]
    assert bar.get_ylabel() == "step"


@pytest.mark.parametrize(
    ("floor", "line", "words"), [(1e-2, True, "noise floor"), (1e-9, False, "noise floor 1e-09"), (None, False, None)]
)
def test_a_noise_floor_is_a_line_where_it_does_not_squeeze_the_spectrum(
    floor: float | None, line: bool, words: str | None
) -> None:
    axes = figures.spectra(SPECTRA, noise_floor=floor).axes[0]
    flat = [drawn for drawn in axes.lines if set(drawn.get_ydata()) == {floor}]
    assert bool(flat) == line
    assert any(text.get_text().startswith(words) for text in axes.texts) if words else not axes.texts


# ── the kernel ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_kernel_is_sorted_by_class_in_units_of_its_mean_diagonal() -> None:
    k = kernel()
    axes = figures.kernel_heatmap(k, LABELS).axes[0]
    order = sorted(range(12), key=lambda i: (int(LABELS[i]), i))
    expected = k[order][:, order] / k.diagonal().mean()
    assert np.allclose(axes.images[0].get_array(), expected.numpy(), atol=0, rtol=1e-14)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "7"]
    assert list(axes.get_xticks()) == [1.5, 5.0, 8.0, 10.5]
    assert sorted({line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]}) == [
        3.5,
        6.5,
        9.5,
    ]


def test_float_targets_sort_the_probes_by_value() -> None:
    k, y = kernel(), torch.linspace(1, -1, 12)
    axes = figures.kernel_heatmap(k, y).axes[0]
    assert np.allclose(axes.images[0].get_array(), (k.flip(0, 1) / k.diagonal().mean()).numpy())
    assert "target value" in axes.get_xlabel()


@pytest.mark.parametrize(("sign", "cmap"), [(1, "magma"), (-1, "RdBu_r")])
def test_zero_is_white_where_a_kernel_has_negative_entries(sign: int, cmap: str) -> None:
    k = torch.eye(8).double() + sign * 0.3 * (1 - torch.eye(8))
    image = figures.kernel_heatmap(k).axes[0].images[0]
    assert image.get_cmap().name == cmap
    if sign < 0:
        low, high = image.get_clim()
        assert low == -high


# ── slopes ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_slopes_draw_the_points_the_line_and_the_references() -> None:
    rows = table()
    slope = fitted(rows)["kernel_angle"]
    axes = figures.width_slopes(rows, {"kernel_angle": slope}, "kernel_angle").axes[0]
    points = next(c for c in axes.collections if isinstance(c, PathCollection)).get_offsets()
    assert np.allclose(points, rows[["width", "kernel_angle"]].to_numpy())
    exponents = sorted(_exponent(line) for line in axes.lines)
    assert exponents == pytest.approx(sorted([-1.0, 0.0, slope.value]), abs=1e-12)
    assert {"slope −1", "slope 0"} <= {text.get_text() for text in axes.texts}


def _exponent(line: Any) -> float:
    x, y = np.log(line.get_xdata()), np.log(line.get_ydata())
    return float((y[-1] - y[0]) / (x[-1] - x[0]))


def test_the_band_is_that_of_least_squares() -> None:
    """Against the textbook: ŷ ± t·s·√(1/n + (u−ū)²/S)."""
    from scipy import stats

    rows = table()
    axes = figures.width_slopes(rows, fitted(rows), "kernel_angle").axes[0]
    (band,) = [c for c in axes.collections if not isinstance(c, PathCollection)]
    u, v = np.log(rows["width"].to_numpy()), np.log(rows["kernel_angle"].to_numpy())
    found = stats.linregress(u, v)
    s = math.sqrt(((v - found.intercept - found.slope * u) ** 2).sum() / (len(u) - 2))
    for x in (32, 256):
        mean = found.intercept + found.slope * math.log(x)
        half = (
            stats.t.ppf(0.975, len(u) - 2)
            * s
            * math.sqrt(1 / len(u) + (math.log(x) - u.mean()) ** 2 / (len(u) * u.var()))
        )
        ys = [y for px, y in band.get_paths()[0].vertices if px == pytest.approx(x, rel=1e-9)]
        assert (min(ys), max(ys)) == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=1e-9)


def test_the_slope_stands_on_the_figure_with_its_interval() -> None:
    axes = figures.width_slopes(table(), {"kernel_angle": Slope(-1.04, -1.16, -0.91, 0.99, 12)}, "kernel_angle").axes[0]
    assert "slope −1.04, 95 % interval −1.16 to −0.91, n = 12" in {text.get_text() for text in axes.texts}
    few = figures.width_slopes(table(), {"kernel_angle": Slope(-1.0, math.nan, math.nan, 1, 2)}, "kernel_angle").axes[0]
    assert "slope −1.00, n = 2: too few points for an interval" in {text.get_text() for text in few.texts}


def test_a_note_is_printed_on_the_figure() -> None:
    note = "probe hash: a in x against b in y (--allow-mismatch)"
    for figure in (
        figures.width_slopes(table(), fitted(table()), "kernel_angle", note=note),
        figures.metric_curves(history(), "kernel_angle", note=note),
    ):
        assert note in " ".join(text.get_text().replace("\n", " ") for text in texts(figure))


# ── curves ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_curves_draw_each_run_in_the_colour_of_its_width() -> None:
    axes = figures.metric_curves(history(), "kernel_angle").axes[0]
    assert len(axes.lines) == 4
    for line, (_, run) in zip(axes.lines, history().query("metric == 'kernel_angle'").groupby("run"), strict=True):
        assert list(line.get_xdata()) == list(run["step"])
        assert list(line.get_ydata()) == list(run["value"])
    colours = [line.get_color() for line in axes.lines]
    assert colours[0] == colours[1]
    assert len(set(colours)) == 3


def test_an_undefined_value_is_left_out_of_its_curve() -> None:
    (line,) = figures.metric_curves(history(), "taylor_ratio").axes[0].lines
    assert list(line.get_xdata()) == [1]


def test_kinds_of_run_stand_together_with_their_points_and_slopes() -> None:
    groups = kinds()
    (axes,) = figures.slopes_together(groups, "kernel_angle").axes
    clouds = [c for c in axes.collections if isinstance(c, PathCollection)]
    for (kind, (rows, slope)), cloud, line in zip(groups.items(), clouds, axes.lines, strict=True):
        np.testing.assert_allclose(cloud.get_offsets(), rows[["width", "kernel_angle"]])
        x, y = line.get_data()
        assert math.log(y[1] / y[0]) / math.log(x[1] / x[0]) == pytest.approx(slope.value), kind
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [text.partition(":")[0] for text in said] == list(groups)


def test_named_curves_leave_out_what_is_undefined() -> None:
    (axes,) = figures.named_curves(LOSSES, ["loss", "loss_if_lazy"], title="Losses", unit="loss").axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 10, 100], [0, 10]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "loss if lazy"]
