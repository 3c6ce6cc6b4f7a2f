"""Layouts: which example owns each element of a gradient, read from backward passes with coded cotangents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_NEAR = 2.0**-5  # of the largest gradient: the tolerance in half precision


@dataclass(frozen=True)
class Layout:
    """The examples of a tensor lie along `dim` with `k` entries each, one after another or (minor) interleaved."""

    dim: int
    k: int
    minor: bool = False

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape can have this layout of n examples."""
        return len(shape) > self.dim and shape[self.dim] == self.k * n

    def owner(self, shape: Sequence[int], n: int) -> Tensor:
        """The owner of each index along `dim`, shaped to broadcast against the tensor."""
        index = torch.arange(shape[self.dim])
        index = index % n if self.minor else index // self.k
        return index.reshape([-1] + [1] * (len(shape) - self.dim - 1))

    def split(self, t: Tensor, n: int, batch: int = 0) -> Tensor:
        """[*batch, *shape] → [*batch, n, *shape with k entries at dim]; a view where strides allow."""
        d = self.dim + batch
        if self.minor:
            return t.unflatten(d, (self.k, n)).movedim(d + 1, batch)
        return t.unflatten(d, (n, self.k)).movedim(d, batch)


@dataclass(frozen=True)
class Scattered:
    """Each element belongs to one of n examples, without a regular layout (tokens routed to experts, for instance)."""

    owner: Tensor = field(repr=False)  # in the tensor's shape; arbitrary where no gradient arrives
    n: int

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape can have this layout of n examples."""
        return tuple(self.owner.shape) == tuple(shape) and self.n == n

    @cached_property
    def rows(self) -> Tensor:
        """The row numbers of each example in a matrix [n, most], padded with the total number of rows."""
        owner = self.owner.max(1).values
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=self.n)
        start = counts.cumsum(0) - counts
        slot = torch.arange(len(owner), device=owner.device) - start[owner[order]]
        index = torch.full((self.n, max(1, int(counts.max()))), len(owner), device=owner.device)
        index[owner[order], slot] = order
        return index


def digits(n: int, base: int) -> list[Tensor]:
    """The digits of each example's number in base `base`, as powers of two, one tensor [n] per digit.

    Scaling a cotangent by a power of two is exact in any binary type. An element that one example owns returns scaled
    exactly by that example's power; an element that several examples share does not.
    """
    index, codes = torch.arange(n), []
    while True:
        codes.append(torch.exp2((index % base).double()))
        index = index // base
        if not bool(index.any()):
            return codes


def base_of(types: Iterable[torch.dtype]) -> int:
    """The base of the digits, so that their powers of two stay in the range of all types."""
    return 4 if torch.float16 in types else 16


def find_layout(g: Tensor, coded: Sequence[Tensor], n: int, base: int) -> tuple[Layout | Scattered | None, bool]:
    """The example that owns each element of a gradient.

    Args:
        g: the gradient under some cotangent.
        coded: the gradients under the same cotangent scaled by `digits` of that base.

    Returns:
        (layout, sure): layout is None if several examples share an element; sure if no other layout fits.
    """
    if g.is_complex():
        layout, sure = find_layout(torch.view_as_real(g), [torch.view_as_real(c) for c in coded], n, base)
        return (Scattered(layout.owner.amax(-1), n) if isinstance(layout, Scattered) else layout), sure
    if g.numel() == 0:
        return Scattered(torch.zeros(g.shape, dtype=torch.long, device=g.device), n), False
    codes, limit = digits(n, base), _rounding(g)
    for dim, size in enumerate(g.shape):
        for minor in (False, True) if n < size else (False,):
            if size % n or size == 0:
                continue
            layout = Layout(dim, size // n, minor)
            if agrees(layout, g, coded, n, base):
                return layout, _all_seen(layout.split(g, n))
    owner_of = torch.zeros(g.shape, dtype=torch.long, device=g.device)
    scale = 1
    for c, _code in zip(coded, codes, strict=True):
        digit = torch.where(g == 0, 0.0, (c.double() / g.double()).abs().log2().round()).nan_to_num(0, 0, 0)
        if not _agrees(g, c, torch.exp2(digit), limit):
            return None, True
        owner_of += scale * digit.long()
        scale *= base
    return (Scattered(owner_of.clamp(0, n - 1), n), True) if g.ndim else (None, True)


def agrees(layout: Layout, g: Tensor, coded: Sequence[Tensor | None], n: int, base: int) -> bool:
    """Whether a gradient and its coded versions (see `find_layout`) are consistent with this layout."""
    if g.is_complex():
        g, coded = torch.view_as_real(g), [c if c is None else torch.view_as_real(c) for c in coded]
    owner, limit = layout.owner(g.shape, n), _rounding(g)
    pairs = zip(coded, digits(n, base), strict=True)
    return all(c is not None and _agrees(g, c, code.to(g.device)[owner], limit) for c, code in pairs)


def _rounding(g: Tensor) -> Tensor:
    """The largest difference of equal numbers that rounding explains."""
    return min(64 * torch.finfo(g.dtype).eps, _NEAR) * g.abs().max().double()


def _agrees(g: Tensor, coded: Tensor, factor: Tensor, limit: Tensor) -> bool:
    factor = factor.to(g.device)
    return bool(((coded.double() - factor * g.double()).abs() <= limit * factor).all())


def _all_seen(parts: Tensor) -> bool:
    """Whether each example's part has a nonzero gradient; an all-zero part would fit other layouts as well."""
    return bool(parts.flatten(1).ne(0).any(1).all())
