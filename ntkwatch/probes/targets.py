"""Targets as they are in a batch → the columns y [n, k] that alignments are taken with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def encode_targets(raw: Tensor | None, n_outputs: int) -> tuple[Tensor | None, str | None]:
    """y [n, k] float64 on the CPU, or None and why in one sentence.

    - integers or booleans [n] (or [n, 1]) are classes: one-hot [n, n_outputs]. With one output the classes are 0 and 1:
      a column of −1 and 1 (as a logit's sign), and −1, 1 stay.
    - integers [n, n_outputs] of zeros and ones are several labels each, and taken as floats.
    - floats [n] of exactly two values, and one column [n, 1] of −1 and 1, are classes as well.
    - other floats [n] or [n, k]: rows that are distributions (0 to 1, sum 1: one-hot, smoothed, mixed up) as they are,
      otherwise each column standardised to mean 0 and variance 1 (a constant column to 0).
    """
    if raw is None:
        return None, "the batch holds no targets"
    y = raw.detach().cpu()
    y = y.to_dense() if y.layout != torch.strided else y
    if y.is_complex():
        return None, "complex targets have no alignment defined"
    if y.ndim == 2 and y.shape[1] == 1 and not y.is_floating_point():
        y = y[:, 0]
    if y.ndim not in (1, 2):
        return None, f"targets of shape {list(y.shape)} are not one class or one row of values for each probe"
    if (two := binary_values(y)) is not None:
        return _checked(_encode_binary(y, *two, n_outputs), y)
    if y.is_floating_point():
        return _checked(_values(y.double()), y)
    if y.ndim == 2:
        if y.shape[1] != n_outputs or not bool(((y == 0) | (y == 1)).all()):
            return None, f"targets of shape {list(y.shape)} are sequences of ids, not one class for each probe"
        return _checked(_values(y.double()), y)
    return _classes(y.long(), n_outputs)


def binary_values(y: Tensor) -> tuple[float, float] | None:
    """The two values of floats [n], or −1 and 1 of a column [n, 1], which are classes; None of anything else."""
    if not y.is_floating_point() or y.ndim not in (1, 2) or y.shape[1:] not in ((), (1,)):
        return None
    values = y.unique().tolist()
    if len(values) != 2 or not all(map(math.isfinite, values)) or (y.ndim == 2 and values != [-1, 1]):
        return None
    return values[0], values[1]


def _encode_binary(y: Tensor, low: float, high: float, n_outputs: int) -> Tensor:
    """A column of −1 and 1 for one output; else one-hot, of the values themselves where they are class ids."""
    is_high = (y.reshape(-1) == high).long()
    if n_outputs == 1:
        return 2.0 * is_high.double()[:, None] - 1.0
    ids = low >= 0 and high < n_outputs and low == int(low) and high == int(high)
    numbers = torch.where(is_high == 1, int(high), int(low)) if ids else is_high
    return torch.nn.functional.one_hot(numbers, n_outputs).double()


def describe_targets(raw: Tensor, n_outputs: int) -> str:
    """What targets are taken as, in words."""
    encoded, why = encode_targets(raw, n_outputs)
    if encoded is None:
        return f"undefined: {why}"
    if binary_values(raw) is not None or (not raw.is_floating_point() and raw.numel() == len(raw)):
        return f"{len(raw.unique())} classes"
    return "values" if raw.is_floating_point() else "several labels each"


def _classes(y: Tensor, n_outputs: int) -> tuple[Tensor | None, str | None]:
    low, high = int(y.min()), int(y.max())
    if n_outputs == 1 and bool((y.abs() == 1).all()):
        return _checked(y.double()[:, None], y)
    if low < 0:
        return None, f"a class id is {low}; ids below 0 mark probes without a target"
    if high >= max(n_outputs, 2):
        return None, f"a class id is {high}, but the model has {n_outputs} output{'s' * (n_outputs > 1)}"
    if n_outputs == 1:
        return _checked(2.0 * y.double()[:, None] - 1.0, y)
    return _checked(torch.nn.functional.one_hot(y, n_outputs).double(), y)


def _values(y: Tensor) -> Tensor:
    y = y[:, None] if y.ndim == 1 else y
    if y.shape[1] > 1 and bool(((y >= 0) & (y <= 1)).all()) and bool(((y.sum(1) - 1).abs() < 1e-3).all()):
        return y  # 1e-3: distributions may come in half precision
    centred = y - y.mean(0)
    scale = centred.square().mean(0).sqrt()
    size = y.abs().amax(0)
    flat = scale <= 1e-12 * size  # what is left of a constant after rounding
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, scale))


def _checked(y: Tensor, raw: Tensor) -> tuple[Tensor | None, str | None]:
    if not bool(torch.isfinite(y).all()):
        return None, "the targets are not finite on every probe"
    if bool((y == y[0]).all()):
        return None, "the targets are constant over the probes"
    return y, None
