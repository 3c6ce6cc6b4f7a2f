"""One run's kernel: its spectrum over training, and the matrix itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ntkwatch.figures.scales import apart, level_bar, log_colours, plain_log
from ntkwatch.figures.style import QUIET, WARM, panel, styled, subtitle, write_message

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BOUNDARIES = 32  # classes; more lines would hide the kernel


@styled
def spectra(
    eigenvalues_by_step: Mapping[int, Tensor],
    *,
    noise_floor: float | None = None,
    title: str = "Kernel spectrum",
    caption: str | None = None,
) -> Figure:
    """Eigenvalues λ_k against k on log–log axes, a line a step, coloured by step; the noise floor as a dashed line.

    ``eigenvalues_by_step``: step → [n], in any order; a value that is not positive has no logarithm and is left out.
    """
    figure, axes = panel(title, "rank k", "eigenvalue $λ_k$")
    axes.set(xscale="log", yscale="log")
    steps = sorted(eigenvalues_by_step)
    colours, norm = log_colours(steps)
    shown = {step: _positive(eigenvalues_by_step[step]) for step in steps}
    for step, (rank, values) in shown.items():
        axes.plot(rank, values, color=colours(norm(step)), marker="o", markersize=3, linewidth=1.6)
    least = min((float(values.min()) for _, values in shown.values() if values.size), default=None)
    if least is None:
        write_message(axes, "no positive eigenvalue")
        return figure
    _floor(axes, noise_floor, least)
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    if len(steps) > 1:
        level_bar(figure, axes, steps, colours, norm, "step")
    subtitle(axes, caption if len(steps) > 1 else caption or f"step {steps[0]}")
    return figure


@styled
def kernel_heatmap(
    k: Tensor, labels: Tensor | None = None, *, title: str = "Kernel", caption: str | None = None
) -> Figure:
    """The kernel [n, n] in units of its mean diagonal, sorted by class, with class boundaries and names on the axes.

    ``labels``: [n] integers are classes; [n] floats sort the probes by value; None leaves them as they are. Colours
    span the values off the diagonal, between their 1st and 99th percent.
    """
    order, classes = _sorted(labels, len(k))
    kernel = k.detach().cpu().double()[order][:, order].numpy()
    scale = float(np.trace(kernel)) / len(kernel)
    scaled = np.isfinite(scale) and scale > 0
    values = kernel / scale if scaled else kernel
    figure, axes = panel(title, "probe", "probe", size=(5.4, 4.8))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    colours = _colours(values)
    image = axes.imshow(values, interpolation="nearest", **colours)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03, extend=_extend(values, colours))
    bar.outline.set_visible(False)
    bar.set_label("K(x, x′) / mean of K(x, x)" if scaled else "K(x, x′)")
    if classes is not None:
        _class_axes(axes, classes, QUIET if colours.get("cmap") == "RdBu_r" else "white")
    else:
        _probe_axes(axes, len(values), "probe" if labels is None else "probe, by target value")
    subtitle(axes, caption)
    return figure


def _positive(eigenvalues: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and values of the positive eigenvalues, descending."""
    values = eigenvalues.detach().cpu().double().sort(descending=True).values.numpy()
    shown = np.isfinite(values) & (values > 0)
    return np.arange(1, len(values) + 1)[shown], values[shown]


def _floor(axes: Axes, noise_floor: float | None, least: float) -> None:
    """The floor as a line where it is near the spectrum, as words where the line would squeeze the spectrum flat."""
    if noise_floor is None or noise_floor <= 0:
        return
    where, color = (0.01, noise_floor), WARM
    if noise_floor > least / 100:
        axes.axhline(noise_floor, color=color, linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate("noise floor", where, xycoords=("axes fraction", "data"), xytext=(0, 5),
                      textcoords="offset points", color=color)  # fmt: skip
    else:
        axes.annotate(
            f"noise floor {noise_floor:.0e}, below the axis", (0.01, 0.03), xycoords="axes fraction", color=QUIET
        )


def _sorted(labels: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """The order of the probes, and their classes in that order if they have any."""
    if labels is None:
        return torch.arange(n), None
    if labels.shape != (n,):
        raise ValueError(f"labels must be one for each of the {n} probes, got shape {tuple(labels.shape)}; pass [n].")
    order = torch.argsort(labels.detach().cpu(), stable=True)
    return order, None if labels.is_floating_point() else labels.detach().cpu()[order]


def _colours(values: np.ndarray) -> dict[str, Any]:
    """Blue to red around 0 where there is something negative to see, else one ramp."""
    off = values[~np.eye(len(values), dtype=bool)] if len(values) > 1 else values.reshape(-1)
    off = off[np.isfinite(off)]
    if off.size == 0:
        return {"cmap": "magma", "vmin": 0.0, "vmax": 1.0}
    low, high = np.percentile(off, [1, 99])
    if low < -0.02 * max(high, -low):
        bound = max(-low, high)
        return {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
    return {"cmap": "magma", "vmin": low, "vmax": high if high > low else low + 1.0}


def _extend(values: np.ndarray, colours: Mapping[str, Any]) -> str:
    below, above = bool((values < colours["vmin"]).any()), bool((values > colours["vmax"]).any())
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")


def _probe_axes(axes: Axes, n: int, label: str) -> None:
    """Whole numbers only; fixed, since a locator that looks beyond the limits upsets the layout."""
    ticks = range(0, n, max(1, 2 ** math.ceil(math.log2(n / 8))))
    axes.set(xticks=ticks, yticks=ticks, xlabel=label, ylabel=label)


def _class_axes(axes: Axes, classes: Tensor, color: str) -> None:
    names, counts = torch.unique_consecutive(classes, return_counts=True)
    ends = torch.cumsum(counts, 0).numpy()
    for end in ends[:-1] if len(ends) <= MOST_BOUNDARIES else ():
        axes.axhline(end - 0.5, color=color, linewidth=0.9, alpha=0.85)
        axes.axvline(end - 0.5, color=color, linewidth=0.9, alpha=0.85)
    middles = ends - counts.numpy() / 2 - 0.5
    text = [str(int(name)) for name in names]
    places = [float(middle) for middle in middles / len(classes)]
    along, down = apart(places, 0.03 + 0.022 * max(map(len, text))), apart(places, 0.045)
    axes.set_xticks(middles[along], [text[i] for i in along])
    axes.set_yticks(middles[down], [text[i] for i in down])
    axes.tick_params(length=0)
    axes.set(xlabel="probes, by class", ylabel="probes, by class")
