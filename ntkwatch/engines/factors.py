"""Factors: per-example Jacobians as outer products, as rows of a table, or dense.

A factor sees its parameter's entries as [leading, trailing]. `open` yields slabs of leading rows, so the whole Jacobian
never exists at once. The caller provides the buffer: fresh memory for each slab would cost as much as the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ntkwatch.engines.machines import machine
from ntkwatch.engines.per_output import PerOutput

# (output, first, last, out) writes rows first … last − 1 of J into out [n, last − first, trailing].
Slab = Callable[[int, int, int, Tensor], object]


class Factor(Protocol):
    """One use of one parameter by n examples and C outputs: J[c, i] = ∂f_c(x_i)/∂(this use)."""

    @property
    def n(self) -> int:
        """Number of examples."""

    @property
    def outputs(self) -> int:
        """Number of outputs C."""

    @property
    def leading(self) -> int:
        """Leading rows of the parameter's entries."""

    @property
    def trailing(self) -> int:
        """Entries per leading row."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the Jacobian."""

    @property
    def device(self) -> torch.device:
        """Device of the Jacobian."""

    def open(self) -> Slab:
        """Prepares what all slabs share (unfolded inputs); returns a function that writes slabs into a given tensor."""
        ...


@dataclass(frozen=True)
class Columns:
    """Inputs [n, G, S, p] of a linear map, stored or unfolded on demand; `quick` returns them in a faster order."""

    shape: tuple[int, int, int, int]
    make: Callable[[], Tensor]
    quick: Callable[[], Tensor] | None = None

    @staticmethod
    def of(t: Tensor) -> Columns:
        """Stored inputs [n, G, S, p]."""
        return Columns(tuple(t.shape), lambda: t)  # type: ignore[arg-type]

    def beside(self, other: Columns) -> Columns:
        """Both inputs, concatenated along the positions."""
        one, two = self.quick, other.quick
        quick = None if one is None or two is None else lambda: torch.cat([one(), two()], 2)
        n, groups, s, p = self.shape
        shape = (n, groups, s + other.shape[2], p)
        return Columns(shape, lambda: torch.cat([self.make(), other.make()], 2), quick)


@dataclass(frozen=True)
class Outer:
    """J = Σ_s g_s ⊗ a_s per group, for a weight used at S positions: `a` [n, G, S, p], `g` C × [n, G, S, q].

    The parameter's entries are ordered as [G, q, p], or as [G, p, q] if `a_first`.
    """

    a: Columns
    g: PerOutput
    a_first: bool = False

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.a.shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return len(self.g)

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return self.a.shape[1]

    @property
    def positions(self) -> int:
        """Number of positions S."""
        return self.a.shape[2]

    @property
    def p(self) -> int:
        """Input entries per position."""
        return self.a.shape[3]

    @property
    def q(self) -> int:
        """Gradient entries per position."""
        return self.g.shape[3]

    @property
    def leading(self) -> int:
        """Leading rows: the groups, or p or q if there is one group."""
        return self.groups if self.groups > 1 else (self.p if self.a_first else self.q)

    @property
    def trailing(self) -> int:
        """Entries per leading row."""
        return self.p * self.q if self.groups > 1 else (self.q if self.a_first else self.p)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the Jacobian, float32 at least."""
        return made_in(self.g.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the gradients."""
        return self.g.device

    def inputs(self) -> Tensor:
        """Inputs [n, G, S, p] in the type of the Jacobian."""
        return self.a.make().to(self.dtype)

    def unordered(self) -> Outer:
        """The same factor with its entries in the fastest order for products: the longer side trailing."""
        a = self.a if self.a.quick is None else Columns(self.a.shape, self.a.quick)
        return Outer(a, self.g, self.groups == 1 and self.p < self.q and machine(self.device).near)

    def open(self) -> Slab:
        """See `Factor.open`."""
        a, g, dtype = self.inputs(), self.g, self.dtype
        if self.groups > 1:
            sides = (self.p, self.q) if self.a_first else (self.q, self.p)
            return lambda c, i, j, out: _outer(a[:, i:j], g[c][:, i:j].to(dtype), self.a_first, out.unflatten(2, sides))
        a = a[:, 0]
        if self.a_first:
            a = a.transpose(1, 2).contiguous()  # once for all outputs: products run faster along rows
            return lambda c, i, j, out: torch.matmul(a[:, i:j], g[c][:, 0].to(dtype), out=out)
        return lambda c, i, j, out: _outer(a, g[c][:, 0, :, i:j].to(dtype), False, out)

    @property
    def in_one_product(self) -> bool:
        """Whether `together` is available."""
        return self.groups == 1 and not self.a_first

    def together(self) -> Callable[[int, int, Tensor, Tensor], object]:
        """As `open`, but (first, last, held, out) writes all outputs into `out` [n, C, rows, trailing] by one product.
        It copies the gradients into `held` [n·C·rows·S]. With C times the rows, a slab of few leading rows is as fast.
        """
        a, across = self.inputs()[:, 0], self.g.over(lambda t: t[..., 0, :, :].transpose(-1, -2))
        rows_first = across.strides[-1] == 1

        def slab(i: int, j: int, held: Tensor, out: Tensor) -> None:
            shape = (self.n, self.outputs * (j - i), self.positions)
            g = held.view(shape) if rows_first else held.view(shape[0], shape[2], shape[1]).transpose(1, 2)
            across.over(lambda t: t[..., i:j, :]).copy_to(g.unflatten(1, (self.outputs, j - i)).transpose(0, 1))
            torch.bmm(g, a, out=out.flatten(1, 2))

        return slab


def _outer(a: Tensor, g: Tensor, a_first: bool, out: Tensor) -> None:
    """Σ_s of the outer products of [..., S, p] and [..., S, q]."""
    one, two = (a, g) if a_first else (g, a)
    torch.matmul(one.transpose(-1, -2), two, out=out)


def made_in(dtype: torch.dtype) -> torch.dtype:
    """The type of a Jacobian, float32 at least: half-precision sums over positions would lose digits of the factors."""
    return dtype if dtype.itemsize >= 4 else torch.float32


@dataclass(frozen=True)
class Rows:
    """Rows of a table [V, q] that are looked up: `index` [n, S], `g` C × [n, S, q]."""

    index: Tensor
    g: PerOutput
    table: int

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.index.shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return len(self.g)

    @property
    def groups(self) -> int:
        """One group, as a table has no others."""
        return 1

    @property
    def positions(self) -> int:
        """Lookups per example S."""
        return self.index.shape[1]

    @property
    def p(self) -> int:
        """One: a lookup has no inputs."""
        return 1

    @property
    def q(self) -> int:
        """Entries per row of the table."""
        return self.g.shape[2]

    @property
    def leading(self) -> int:
        """Rows of the table V."""
        return self.table

    @property
    def trailing(self) -> int:
        """Entries per row of the table."""
        return self.q

    @property
    def dtype(self) -> torch.dtype:
        """Type of the Jacobian, float32 at least."""
        return made_in(self.g.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the gradients."""
        return self.g.device

    def open(self) -> Slab:
        """See `Factor.open`."""

        def slab(c: int, i: int, j: int, out: Tensor) -> None:
            inside = (self.index >= i) & (self.index < j)
            index = torch.where(inside, self.index - i, 0)
            g = self.g[c].to(out.dtype) * inside[..., None]
            out.zero_().scatter_add_(1, index[..., None].expand_as(g), g)

        return slab


@dataclass(frozen=True)
class Dense:
    """The Jacobian itself, C × [n, P]."""

    j: PerOutput

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.j.shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return len(self.j)

    @property
    def leading(self) -> int:
        """Entries of the parameter P."""
        return self.j.shape[1]

    @property
    def trailing(self) -> int:
        """One entry per leading row."""
        return 1

    @property
    def dtype(self) -> torch.dtype:
        """Type of the Jacobian, float32 at least."""
        return made_in(self.j.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the Jacobian."""
        return self.j.device

    def open(self) -> Slab:
        """See `Factor.open`."""
        return lambda c, i, j, out: out.copy_(self.j[c][:, i:j, None])
