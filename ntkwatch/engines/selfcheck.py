"""The self-check: an engine's kernel on a few probes against plain backward passes, one example at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Engine
from ntkwatch.engines.functional import math_attention
from ntkwatch.engines.separation import few
from ntkwatch.model import Network, UnsupportedModel, take

_STRETCH = 1 << 16  # terms of one float32 product


class Mixed(Network):
    """A network that shows two outputs: a mixture of all of its own, and one of them as it is.

    A mistake in any output shows in the mixture, at the cost of two outputs however many there are.
    """

    def __init__(self, network: Network) -> None:
        self.__dict__.update(copy.copy(network.__dict__))

    def _checked(self, result: Any, batch: Any) -> Tensor:
        f = super()._checked(result, batch)
        c = f.shape[1]
        if c == 1:
            return f
        mixture = torch.cos(2.4 * torch.arange(c) + 1)  # as good as random, and allowed under vmap
        return torch.stack([f @ mixture.to(f), f[:, c // 2]], 1)


def self_check(engine: Engine, network: Network, x: Any) -> tuple[float, str]:
    """How far an engine's kernel is from plain backward passes, relative to the whole, and the parameter off most.

    For two vectors w over probes and outputs, and for every parameter, wᵀΘw' is compared with ⟨Σ w J, Σ w' J⟩: the
    reference holds 2P numbers whatever n and C are. Deviations are summed over parameters.

    Raises:
        UnsupportedModel: gradients are not finite on the probes.
    """
    probes, mixed = few(x), Mixed(network)
    kernel = engine.kernel(mixed, probes, reduction="full", layers="full")
    w = torch.randn(2, *kernel.outputs.shape, generator=torch.Generator().manual_seed(0)).to(kernel.outputs)
    w[0] = w[0].abs() + 0.5  # nothing cancels in the first; the second tells examples and outputs apart
    right = _reference(mixed, probes, w)
    whole = torch.stack(list(right.values())).sum(0)
    if not bool(torch.isfinite(whole).all()):
        raise UnsupportedModel("the model's outputs or gradients hold NaN or infinity on the probes")
    zero = torch.zeros(2, 2, dtype=torch.float64)
    off = {
        name: float((_forms(kernel.layers[name], w) - g if name in kernel.layers else zero - g).abs().max())
        for name, g in right.items()
    }
    error = max(sum(off.values()), float((_forms(kernel.value, w) - whole).abs().max()))
    squares = kernel.value.flatten(2).flatten(0, 1).diagonal().double() * w.flatten(1).double() ** 2
    scale = max(float(whole.diagonal().max()), float(squares.sum(1).max()))
    return (error / scale if scale else error), max(off, key=off.__getitem__)


def _forms(theta: Tensor, w: Tensor) -> Tensor:
    """wᵀΘw' [2, 2] of Θ [n, C, n, C] and w [2, n, C]."""
    return torch.einsum("anc,ncmd,bmd->ab", w.double(), theta.double(), w.double()).cpu()


def _reference(network: Network, x: Any, w: Tensor) -> dict[str, Tensor]:
    """⟨Σ w J, Σ w' J⟩ [2, 2] per parameter, by torch.autograd.grad alone."""
    parameters = list(network.parameters.values())
    sums: list[list[Tensor | None]] = [[None] * len(parameters) for _ in w]
    for i in range(w.shape[1]):
        with math_attention():
            f = network.outputs(take(x, slice(i, i + 1)))
        for side, weights in zip(sums, w, strict=True):
            grads = torch.autograd.grad(f, parameters, weights[i : i + 1], retain_graph=True, allow_unused=True)
            side[:] = [_plus(total, g) for total, g in zip(side, grads, strict=True)]
    return {name: _products(*pair) for name, *pair in zip(network.parameters, *sums, strict=True)}


def _plus(total: Tensor | None, g: Tensor | None) -> Tensor | None:
    """The sum, in float32 at least."""
    if g is None:
        return total
    g = g.to_dense() if g.is_sparse else g
    g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    return g.clone() if total is None else total.add_(g)


def _products(one: Tensor | None, two: Tensor | None) -> Tensor:
    """Inner products [2, 2] of two gradients, zero where there are none."""
    if one is None or two is None:
        return torch.zeros(2, 2, dtype=torch.float64)
    pieces = zip(one.flatten().split(_STRETCH), two.flatten().split(_STRETCH), strict=True)
    return torch.stack([(p @ p.T).double() for p in map(torch.stack, pieces)]).sum(0).cpu()
