"""How every figure looks, and how it becomes pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

INK, QUIET, FAINT = "#1f2430", "#6b7280", "#d9dce3"
ACCENT, WARM = "#0072b2", "#d55e00"  # of Okabe and Ito's palette
PALETTE = (ACCENT, WARM, "#009e73", "#cc79a7")  # of several things in one panel
DPI = 110
STYLE = {
    "text.usetex": False,  # a user's LaTeX setup may lack the characters used here
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure looks alike everywhere
    "font.size": 12,
    "axes.labelsize": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "text.color": INK,
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run ``draw`` under this module's style alone; the user's matplotlib settings come back whatever happens."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        defaults: Any = matplotlib.rcParamsDefault
        rc: Any = {key: value for key, value in defaults.items() if key != "backend"}  # setting that would load pyplot
        with matplotlib.rc_context(rc | STYLE):
            return draw(*args, **kwargs)

    return wrapped


@styled
def rgb(figure: Figure) -> np.ndarray:
    """The figure as [height, width, 3] uint8, for loggers that take arrays."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@styled
def save(figure: Figure, path: Path | str) -> None:
    """Write the figure as the kind of image that the ending of ``path`` names, half as fine again as on a screen."""
    figure.savefig(path, dpi=DPI * 1.5)


def panel(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (5.8, 4.4)) -> tuple[Figure, Axes]:
    """An empty figure of one panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, compress=True))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def subtitle(axes: Axes, text: str | None, color: str = QUIET) -> None:
    """A line of plain type between the title and the panel."""
    if text:
        axes.set_title(axes.get_title(loc="left"), loc="left", pad=30)
        axes.annotate(text, (0, 1), xycoords="axes fraction", xytext=(0, 9), textcoords="offset points", color=color)


def write_message(axes: Axes, text: str) -> None:
    """What stands in a panel that has nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET, fontsize=14)


def write_note(figure: Figure, note: str | None) -> None:
    """A warning printed under the panel."""
    if note:
        import textwrap

        figure.supxlabel(textwrap.fill(note, 60), fontsize=12, color=WARM)
