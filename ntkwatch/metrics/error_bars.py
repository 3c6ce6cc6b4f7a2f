"""Error bars over probes for any function of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import matrices, real
from ntkwatch.metrics.undefined import Undefined, metric, nan

_PROBE_AXES = {2: (0, 1), 3: (1, 2), 4: (0, 2)}


@dataclass(frozen=True)
class Jackknife:
    """A statistic over the probes; each of the statistic's shape, float64."""

    value: Tensor
    corrected: Tensor
    standard_error: Tensor

    @property
    def bias(self) -> Tensor:
        """What the correction took off."""
        return self.value - self.corrected


@metric(lambda statistic, *kernels, **_: Jackknife(nan(*kernels), nan(*kernels), nan(*kernels)))
def jackknife(statistic: Callable[..., Tensor], *kernels: Tensor, rows: Sequence[Tensor] = ()) -> Jackknife:
    """Error bar of a statistic over the probes, and the statistic without its bias from there being few.

    Formula: θ̂_(i) = statistic without probe i, θ̂_· their mean; corrected n·θ̂ − (n − 1)·θ̂_·;
        standard error √((n − 1)/n · Σ(θ̂_(i) − θ̂_·)²)
    Shape: kernels [n, n], blocks [C, n, n] or full [n, C, n, C]; rows [n, …] (targets, outputs), handed to the
        statistic after the kernels -> Jackknife
    Range: standard error ≥ 0; undefined where the statistic is, with a probe left out or without
    Source: Quenouille 1956; Tukey 1958
    Pitfalls: n + 1 evaluations; wrong for statistics that jump (ranks, medians); never bootstrap a Gram matrix instead

    >>> mean = jackknife(lambda k: k.diagonal().mean(), torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()))
    >>> float(mean.corrected), round(float(mean.standard_error), 6)
    (2.0, 0.57735)
    """
    n = _probes(kernels, rows)
    value = statistic(*kernels, *rows)
    left_out = torch.stack([statistic(*_without(i, kernels, rows)) for i in range(n)])
    mean = left_out.mean(0)
    error = ((n - 1) / n * (left_out - mean).square().sum(0)).sqrt()
    bars = Jackknife(value, n * value - (n - 1) * mean, error)
    if bool(bars.corrected.isnan().any()):
        raise Undefined("the statistic is undefined on the probes or with one of them left out", bars)
    return bars


def _probes(kernels: Sequence[Tensor], rows: Sequence[Tensor]) -> int:
    for k in kernels:
        matrices(k)
    sizes = {k.shape[_PROBE_AXES[k.ndim][0]] for k in kernels} | {len(real(row, "rows")) for row in rows}
    if len(sizes) != 1 or max(sizes) < 2:
        raise ValueError(f"kernels and rows must share at least 2 probes; got {sorted(sizes)}; use one probe set")
    return sizes.pop()


def _without(i: int, kernels: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    def drop(x: Tensor, axes: Sequence[int]) -> Tensor:
        for axis in axes:
            keep = torch.arange(x.shape[axis], device=x.device) != i
            x = x.index_select(axis, keep.nonzero().flatten())
        return x

    return [drop(k, _PROBE_AXES[k.ndim]) for k in kernels] + [drop(row, (0,)) for row in rows]
