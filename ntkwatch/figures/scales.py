"""Colours and ticks for quantities that are spread over decades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure


def axis_label(name: str) -> str:
    """A metric's name as a title."""
    return name.replace("_", " ")


def log_colours(levels: Sequence[float]) -> tuple[Colormap, Normalize]:
    """Colours even on a log axis from the least level to the greatest; with 0 among them, on log(½ + level)."""
    import matplotlib
    from matplotlib.colors import FuncNorm, ListedColormap

    # The last tenth of viridis is too pale on white.
    # The last tenth of viridis is too pale on white.
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))
    low, high = min(levels, default=0), max(levels, default=1)
    shift = 0.0 if low > 0 else 0.5 - low

    def forward(value: Any) -> Any:
        return np.log2(np.maximum(value, low) + shift)

    def inverse(value: Any) -> Any:
        return np.exp2(value) - shift

    return colours, FuncNorm((forward, inverse), vmin=low, vmax=high if high > low else low + 1)


def level_bar(
    figure: Figure, axes: Axes, levels: Sequence[float], colours: Colormap, norm: Normalize, label: str
) -> None:
    """A colour bar with ticks at the levels themselves, as many as there is room for."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label)
    kept = [levels[i] for i in apart([float(norm(level)) for level in levels], 0.06)]
    bar.set_ticks(kept, labels=[f"{level:.6g}" for level in kept])
    bar.minorticks_off()


def apart(places: Sequence[float], gap: float) -> list[int]:
    """Indices of ascending places that are at least ``gap`` from each other; the last is always among them."""
    kept = [len(places) - 1]
    for i in reversed(range(len(places) - 1)):
        if places[kept[-1]] - places[i] >= gap:
            kept.append(i)
    return kept[::-1]


def ticks_at(axis: Axis, places: Sequence[float]) -> None:
    """On a log axis: ticks at these ascending places alone, as many as there is room for."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    span = math.log(places[-1] / places[0]) or 1.0
    kept = apart([math.log(place / places[0]) / span for place in places], 0.07)
    axis.set_major_locator(FixedLocator([places[i] for i in kept]))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def plain_log(axis: Axis, decades: float = 3) -> None:
    """On a log axis of few decades: ticks at 1, 2 and 5, as plain numbers; a longer one keeps its powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    if high / low < 10**decades:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def step_axis(axes: Axes, last: int) -> None:
    """An x axis for steps 0, 1, 2, 4 …: linear to 1, logarithmic from there."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_xlim(-0.15, max(last, 1) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator([0, *(10**k for k in range(int(math.log10(max(last, 1))) + 1))]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
