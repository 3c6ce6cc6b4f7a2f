"""Backward passes for several outputs, sequential or batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ntkwatch.engines.functional import is_out_of_memory, quiet
from ntkwatch.engines.per_output import PerOutput

Start = Tensor | GradientEdge
Keep = Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]


def sequential_passes(
    start: Start, wanted: Sequence[GradientEdge], cotangents: PerOutput, keep: Keep = lambda grads: grads
) -> list[PerOutput | None]:
    """The gradients at the wanted edges, one pass per cotangent, filtered by `keep`; None where no gradient arrives."""
    passes = [keep(_grad(start, wanted, cotangent)) for cotangent in cotangents]
    return [_filled(each) for each in zip(*passes, strict=True)]


def at_once(
    start: Start, wanted: Sequence[GradientEdge], cotangents: PerOutput, most: int | None = None
) -> list[PerOutput | None] | None:
    """The same from batched passes of at most `most` outputs, stacked; None if some operation cannot be batched."""
    reached: list[int] = []

    def one(cotangent: Tensor) -> list[Tensor]:
        grads = _grad(start, wanted, cotangent)
        reached[:] = [i for i, g in enumerate(grads) if g is not None]
        return [g for g in grads if g is not None]

    chunk = most if most is not None and most < len(cotangents) else None  # a single chunk would also be copied
    try:
        with quiet():
            found = torch.func.vmap(one, randomness="same", chunk_size=chunk)(cotangents.stacked())
    except Exception as error:  # operations and Functions that cannot be batched raise errors of any type
        if is_out_of_memory(error):
            raise
        return None
    grads: list[PerOutput | None] = [None] * len(wanted)
    for i, g in zip(reached, found, strict=True):
        grads[i] = PerOutput(g.detach())
    return grads


def can_be_batched(f: Tensor, wanted: Sequence[GradientEdge]) -> bool:
    """Whether a batched pass agrees with sequential passes.

    Asked once per model: torch cannot batch some operations, and batches others wrongly (cdist's backward pass in torch
    2.13).
    """
    generator = torch.Generator().manual_seed(0)
    some = torch.rand((2, *f.shape), generator=generator, dtype=torch.float64, device="cpu") + 0.5
    cotangents = PerOutput(some.to(f.device, f.dtype))
    found = at_once(f, wanted, cotangents)
    return found is not None and all(map(_agree, found, sequential_passes(f, wanted, cotangents)))


def _agree(one: PerOutput | None, two: PerOutput | None) -> bool:
    if one is None or two is None:
        return one is two
    a, b = one.stacked(), two.stacked()
    limit = torch.finfo(b.dtype).eps ** 0.5 * b.abs().max() if b.numel() else 0.0
    return bool(((a - b).abs() <= limit).all())


def _filled(grads: tuple[Tensor | None, ...]) -> PerOutput | None:
    """Zeros for the outputs that do not depend on the node; None if no output does."""
    known = next((g for g in grads if g is not None), None)
    if known is None:
        return None
    return PerOutput(tuple(torch.zeros_like(known) if g is None else g.detach() for g in grads))


def _grad(start: Start, wanted: Sequence[GradientEdge], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    starts: Any = [start]
    return torch.autograd.grad(starts, wanted, [cotangent], retain_graph=True, allow_unused=True)


def in_row(g: Tensor) -> Tensor:
    """A gradient as a flat vector of real numbers, dense also if it is sparse."""
    g = g.detach() if g.layout is torch.strided else g.detach().to_dense()
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).flatten()
