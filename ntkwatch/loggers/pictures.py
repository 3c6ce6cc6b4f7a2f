"""The pictures that loggers get: the kernel, sorted by label, and its spectra over training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ntkwatch import figures
from ntkwatch.record import Measurement


class Picture(NamedTuple):
    """One image: its tag, its place on the x axis, and its pixels [height, width, 3] uint8."""

    tag: str
    x: int
    pixels: np.ndarray


class SpectrumHistory:
    """The spectra of a run that a picture shows: the first, one each time the step has doubled, and the newest."""

    def __init__(self) -> None:
        self.by_step: dict[int, Tensor] = {}

    def add(self, step: int, eigenvalues: Tensor) -> None:
        """Keep the spectrum of this step, and drop the newest one before it where the step has not doubled."""
        self.by_step.pop(step, None)
        *_, before, newest = (-1, -1, *self.by_step)
        if before >= 0 and newest < 2 * max(before, 0.5):
            del self.by_step[newest]
        self.by_step[step] = eigenvalues.detach().cpu()


def spectra_picture(spectra: Mapping[int, Tensor], m: Measurement) -> np.ndarray:
    """Pixels of the spectra by step, above the newest measurement's noise floor."""
    floor = m.context.get("noise_floor")
    return figures.rgb(figures.spectra(spectra, noise_floor=float(floor) if isinstance(floor, int | float) else None))


def kernel_picture(m: Measurement, labels: Tensor | None) -> np.ndarray:
    """Pixels of the kernel, its probes sorted by label."""
    caption = f"step {m.step}, reduction {m.context.get('reduction', 'trace')}"
    return figures.rgb(figures.kernel_heatmap(trace_of(m.kernel), sort_key(labels), caption=caption))


def without_layers(m: Measurement) -> Measurement:
    """`m` reduced to what its picture needs, so that keeping it costs one [n, n] kernel."""
    return replace(m, kernel=trace_of(m.kernel), layers={})


def trace_of(kernel: Tensor) -> Tensor:
    """[n, n]: blocks [C, n, n] and a full kernel [n, C, n, C] by their mean over outputs."""
    if kernel.ndim == 3:
        return kernel.mean(0)
    return kernel.diagonal(dim1=1, dim2=3).mean(-1) if kernel.ndim == 4 else kernel


def sort_key(labels: Tensor | None) -> Tensor | None:
    """[n] classes or values to sort by; one-hot rows become their class; several regression targets have no order."""
    if labels is None or labels.ndim == 1:
        return labels
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] == 1:
        return flat[:, 0]
    one_hot = bool(((flat == 0) | (flat == 1)).all()) and bool((flat.sum(1) == 1).all())
    return flat.argmax(1) if one_hot else None
