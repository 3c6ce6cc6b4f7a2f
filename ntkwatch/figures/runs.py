"""Several runs in one panel: a metric against width, and against step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ntkwatch.figures.scales import axis_label, level_bar, log_colours, plain_log, step_axis, ticks_at
from ntkwatch.figures.style import ACCENT, PALETTE, QUIET, panel, styled, subtitle, write_message, write_note

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCES = {-1.0: "slope −1", 0.0: "slope 0"}


class SlopeLike(Protocol):
    """A log–log slope with its 95 % interval over n points; the bounds are NaN where there is no interval."""

    @property
    def value(self) -> float:
        """The exponent."""

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""

    @property
    def n(self) -> int:
        """How many points were fitted."""


@styled
def width_slopes(
    table: pd.DataFrame,
    slopes: Mapping[str, SlopeLike],
    name: str,
    *,
    x: str = "width",
    references: Mapping[float, str] | None = None,
    note: str | None = None,
    title: str | None = None,
) -> Figure:
    """One metric against width on log–log axes: a point a run, the fitted line with its confidence band, references.

    ``table`` has a row a run, with the columns ``x`` and ``name``. ``slopes[name]`` is the least-squares slope of log
    ``name`` on log ``x`` over the rows where both are positive; without it there are points alone. ``references``:
    exponent → words, drawn from the line's left end (default −1 and 0). ``note`` is printed on the figure.
    """
    rows = table[(table[x] > 0) & (table[name] > 0)]
    figure, axes = panel(title or axis_label(name), axis_label(x), axis_label(name))
    axes.set(xscale="log", yscale="log")
    write_note(figure, note)
    if rows.empty:
        write_message(axes, "no positive value")
        return figure
    xs, ys = rows[x].to_numpy(float), rows[name].to_numpy(float)
    if name in slopes:
        _fit(axes, xs, ys, slopes[name], REFERENCES if references is None else references)
    axes.scatter(xs, ys, s=46, color=ACCENT, edgecolor="white", linewidth=0.8, zorder=5)
    ticks_at(axes.xaxis, sorted(set(xs)))
    plain_log(axes.yaxis)
    return figure


@styled
def metric_curves(
    history: pd.DataFrame, name: str, *, x: str = "width", note: str | None = None, title: str | None = None
) -> Figure:
    """One metric against step, a line a run, coloured by ``x``.

    ``history`` is tidy, with a row per run, step and metric: columns run, ``x``, step, metric, value. The step axis is
    linear to 1 and logarithmic from there, as steps are probed. Undefined values are left out.
    """
    rows = history[(history["metric"] == name) & np.isfinite(history["value"].astype(float))]
    figure, axes = panel(title or axis_label(name), "step", axis_label(name))
    write_note(figure, note)
    if rows.empty:
        write_message(axes, "no defined value")
        return figure
    levels = sorted(set(rows[x]))
    colours, norm = log_colours(levels)
    for (_, level), run in rows.groupby(["run", x], sort=False):
        run = run.sort_values("step")
        axes.plot(run["step"], run["value"], color=colours(norm(level)), marker="o", markersize=3.5, linewidth=1.6)
    step_axis(axes, int(rows["step"].max()))
    if len(levels) > 1:
        level_bar(figure, axes, levels, colours, norm, axis_label(x))
    return figure


@styled
def slopes_together(
    groups: Mapping[str, tuple[pd.DataFrame, SlopeLike]], name: str, *, x: str = "width", title: str | None = None
) -> Figure:
    """One metric against width for several kinds of run: each with its points, its line, and its slope in words.

    ``groups``: kind -> (table, slope), a row a run with the columns ``x`` and ``name``; at most four kinds.
    """
    figure, axes = panel(title or axis_label(name), axis_label(x), axis_label(name), size=(7.4, 4.8))
    axes.set(xscale="log", yscale="log")
    places: set[float] = set()
    for (kind, (table, slope)), colour in zip(groups.items(), PALETTE, strict=False):
        rows = table[(table[x] > 0) & (table[name] > 0)]
        xs, ys = rows[x].to_numpy(float), rows[name].to_numpy(float)
        u, v = np.log(xs), np.log(ys)
        ends = np.array([u.min(), u.max()])
        line = np.exp(v.mean() + slope.value * (ends - u.mean()))
        axes.plot(np.exp(ends), line, color=colour, linewidth=2, label=f"{kind}: {slope_text(slope)}")
        axes.scatter(xs, ys, s=40, color=colour, edgecolor="white", linewidth=0.8, zorder=5)
        places |= set(xs)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    if places:
        ticks_at(axes.xaxis, sorted(places))
    plain_log(axes.yaxis)
    return figure


@styled
def named_curves(metrics: pd.DataFrame, names: Sequence[str], *, title: str, unit: str) -> Figure:
    """Several metrics of one unit and one run against step; ``metrics`` is indexed by step."""
    figure, axes = panel(title, "step", unit)
    shown = metrics[list(names)].dropna(how="all")
    if shown.empty:
        write_message(axes, "no defined value")
        return figure
    for name, colour in zip(names, PALETTE, strict=False):
        values = shown[name].dropna()
        axes.plot(values.index, values, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=axis_label(name))
    step_axis(axes, int(shown.index[-1]))
    axes.legend(frameon=False)
    return figure


def _fit(axes: Axes, xs: np.ndarray, ys: np.ndarray, slope: SlopeLike, references: Mapping[float, str]) -> None:
    """The line, its band and the references."""
    u, v = np.log(xs), np.log(ys)
    at = np.linspace(u.min(), u.max(), 64)
    line = v.mean() + slope.value * (at - u.mean())
    for exponent, text in references.items():
        ends = np.exp(line[0] + exponent * (at[[0, -1]] - at[0]))
        axes.plot(np.exp(at[[0, -1]]), ends, color=QUIET, linestyle=(0, (1, 2)), linewidth=1.4)
        axes.annotate(text, (np.exp(at[-1]), ends[1]), xytext=(9, 0), textcoords="offset points", color=QUIET,
                      va="center", annotation_clip=False)  # fmt: skip
    if math.isfinite(slope.low) and math.isfinite(slope.high):
        # The fitted mean at u is known to t·s·√(1/n + (u−ū)²/S), the slope to t·s/√S, with S = Σ(u−ū)².
        spread = np.sqrt(u.var() + (at - u.mean()) ** 2) * (slope.high - slope.low) / 2
        axes.fill_between(np.exp(at), np.exp(line - spread), np.exp(line + spread), color=ACCENT, alpha=0.15, lw=0)
    axes.plot(np.exp(at), np.exp(line), color=ACCENT, linewidth=2)
    subtitle(axes, slope_text(slope), ACCENT)


def slope_text(slope: SlopeLike) -> str:
    """The slope with its interval, as it stands on the figure."""

    def number(value: float) -> str:
        return f"{value:.2f}".replace("-", "−")

    if not (math.isfinite(slope.low) and math.isfinite(slope.high)):
        return f"slope {number(slope.value)}, n = {slope.n}: too few points for an interval"
    return f"slope {number(slope.value)}, 95 % interval {number(slope.low)} to {number(slope.high)}, n = {slope.n}"
