"""The self-check: an engine's kernel on a few probes against plain backward passes of single examples."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.backward import in_row
from ntkwatch.engines.base import Engine
from ntkwatch.engines.capture_points import few
from ntkwatch.engines.functional import math_attention
from ntkwatch.model import Network, UnsupportedModel, inputs_of, leaves, take

_STRETCH = 1 << 16  # terms of one float32 product


class Mixed(Network):
    """A network with a mixture of all outputs as its output, and one unmixed output beside it if `beside`.

    An error in any output shows in the mixture, at the cost of one or two outputs instead of C.
    """

    def __init__(self, network: Network, beside: bool = True) -> None:
        self.__dict__.update(copy.copy(network.__dict__))
        self.mixes, self._beside = network, beside

    def _checked(self, result: Any, batch: Any) -> Tensor:
        f = super()._checked(result, batch)
        c = f.shape[1]
        if c == 1:
            return f
        mixture = torch.cos(2.4 * torch.arange(c) + 1)  # as good as random, and allowed under vmap
        mixed = f @ mixture.to(f)
        return torch.stack([mixed, f[:, c // 2]], 1) if self._beside else mixed[:, None]


def self_check(engine: Engine, network: Network, x: Any) -> tuple[float, str]:
    """The error of an engine's kernel against plain backward passes, and the parameter with the largest error.

    Each probe i has its own random weights w_i over the outputs. One backward pass per probe gives g_i = Σ_c w_ic
    ∂f_c(x_i)/∂θ. For every parameter, the check compares all products ⟨g_i, g_j⟩ with w_iᵀ Θ_ij w_j, which
    distinguishes pairs of probes and outputs. The error is the sum of deviations over parameters, relative to the whole
    kernel.

    Raises:
        UnsupportedModel: outputs or gradients on the probes are not finite.
    """
    probes, mixed = few(x), Mixed(network)
    kernel = engine.kernel(mixed, probes, reduction="full", layers="full", precision="single")
    w = torch.randn(kernel.outputs.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(kernel.outputs)
    w[:, 0] = w[:, 0].abs() + 0.5  # the mixture never has weight zero
    right = _reference(mixed, probes, w)
    whole = torch.stack(list(right.values())).sum(0)
    if not bool(torch.isfinite(whole).all()):
        raise UnsupportedModel(not_finite(network, probes))
    zero = torch.zeros_like(whole)
    off = {
        name: float((_forms(kernel.layers[name], w) - g if name in kernel.layers else zero - g).abs().max())
        for name, g in right.items()
    }
    error = max(sum(off.values()), float((_forms(kernel.value, w) - whole).abs().max()))
    squares = kernel.value.flatten(2).flatten(0, 1).diagonal().double() * w.flatten().double() ** 2
    scale = max(float(whole.diagonal().max()), float(squares.reshape(w.shape).sum(1).max()))
    return (error / scale if scale else error), max(off, key=off.__getitem__)


def not_finite(network: Network, probes: Any) -> str:
    """The source of a NaN or infinity: the weights, else the probes, else the model's computation."""
    module = network.module
    bad = next((name for name, p in [*module.named_parameters(), *module.named_buffers()] if _spoilt(p)), None)
    if bad is not None:
        return f"the model's own {bad} holds NaN or infinity: look at the model, not at the probes"
    if any(_spoilt(leaf) for leaf in leaves(inputs_of(probes))):
        return "the probes hold NaN or infinity, and so do the model's outputs or gradients: give finite ones"
    return "the model's outputs or gradients hold NaN or infinity on the probes: weights and probes hold none"


def _spoilt(leaf: Any) -> bool:
    """Whether a tensor holds NaN or +∞; masks may hold −∞."""
    if not isinstance(leaf, Tensor) or leaf.is_complex() or not leaf.is_floating_point():
        return False
    return bool((leaf.isnan() | leaf.isposinf()).any())


def _forms(theta: Tensor, w: Tensor) -> Tensor:
    """w_iᵀ Θ_ij w_j [n, n] for Θ [n, C, n, C] and w [n, C]."""
    return torch.einsum("ic,icjd,jd->ij", w.double(), theta.double(), w.double()).cpu()


def _reference(network: Network, x: Any, w: Tensor) -> dict[str, Tensor]:
    """⟨g_i, g_j⟩ [n, n] per parameter, by torch.autograd.grad alone and one example at a time."""
    parameters = list(network.parameters.values())
    rows: list[list[Tensor | None]] = []
    for i, weights in enumerate(w):
        with math_attention():
            f = network.outputs(take(x, slice(i, i + 1)))
        grads = torch.autograd.grad(f, parameters, weights[None], allow_unused=True)
        rows.append([None if g is None else wide_row(g) for g in grads])
    return {name: _products(each) for name, each in zip(network.parameters, zip(*rows, strict=True), strict=True)}


def wide_row(g: Tensor) -> Tensor:
    """A gradient as a flat vector of real numbers, float32 at least."""
    return in_row(g.to(torch.promote_types(g.dtype, torch.float32)))


def _products(rows: tuple[Tensor | None, ...]) -> Tensor:
    """Inner products [n, n] of the examples' gradients, zero for missing gradients."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
    there = torch.tensor([i for i, g in enumerate(rows) if g is not None], dtype=torch.long, device="cpu")
    for pieces in zip(*(g.split(_STRETCH) for g in rows if g is not None), strict=True):
        part = torch.stack(pieces)
        total[there[:, None], there] += (part @ part.T).double().cpu()
    return total
