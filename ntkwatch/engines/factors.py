"""Per-example Jacobians in the form they come in: outer products, rows of a table, or dense.

A parameter's entries are seen as [leading, trailing] in their own order; `open` gives J a slab of leading rows at a
time, so that no more than a slab ever has to exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Slab = Callable[[int, int, int], Tensor]  # (output, first, last) -> [n, last - first, trailing]


class Factor(Protocol):
    """One use of one parameter by n examples and C outputs: J[c, i] = ∂f_c(x_i)/∂(this use)."""

    @property
    def n(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    @property
    def leading(self) -> int: ...

    @property
    def trailing(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def open(self) -> Slab:
        """Makes what all slabs share (the unfolded inputs), and gives slabs of J."""
        ...


@dataclass(frozen=True)
class Columns:
    """Inputs [n, G, S, p] of a linear map: kept as they are, or unfolded when asked for."""

    shape: tuple[int, int, int, int]
    make: Callable[[], Tensor]

    @staticmethod
    def of(t: Tensor) -> Columns:
        return Columns(tuple(t.shape), lambda: t)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outer:
    """J = Σ_s g_s ⊗ a_s per group: a weight used at S positions. `a` [n, G, S, p], `g` [C, n, G, S, q].

    The parameter's entries lie as [G, q, p], or [G, p, q] when `a_first`.
    """

    a: Columns
    g: Tensor
    a_first: bool = False

    @property
    def n(self) -> int:
        return self.g.shape[1]

    @property
    def outputs(self) -> int:
        return self.g.shape[0]

    @property
    def groups(self) -> int:
        return self.g.shape[2]

    @property
    def positions(self) -> int:
        return self.g.shape[3]

    @property
    def leading(self) -> int:
        p, q = self.a.shape[3], self.g.shape[4]
        return self.groups if self.groups > 1 else (p if self.a_first else q)

    @property
    def trailing(self) -> int:
        p, q = self.a.shape[3], self.g.shape[4]
        return p * q if self.groups > 1 else (q if self.a_first else p)

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    @property
    def device(self) -> torch.device:
        return self.g.device

    def inputs(self) -> Tensor:
        """[n, G, S, p] in the gradients' type."""
        return self.a.make().to(self.g.dtype)

    def open(self) -> Slab:
        a = self.inputs()
        if self.groups > 1:
            return lambda c, i, j: _outer(a[:, i:j], self.g[c, :, i:j], self.a_first).flatten(2)
        a = a[:, 0]
        if self.a_first:
            return lambda c, i, j: a[..., i:j].transpose(1, 2) @ self.g[c, :, 0]
        return lambda c, i, j: self.g[c, :, 0, :, i:j].transpose(1, 2) @ a


def _outer(a: Tensor, g: Tensor, a_first: bool) -> Tensor:
    one, two = (a, g) if a_first else (g, a)
    return one.transpose(-1, -2) @ two


@dataclass(frozen=True)
class Rows:
    """Rows of a table [V, q] looked up: `index` [n, S], `g` [C, n, S, q]."""

    index: Tensor
    g: Tensor
    table: int

    @property
    def n(self) -> int:
        return self.g.shape[1]

    @property
    def outputs(self) -> int:
        return self.g.shape[0]

    @property
    def groups(self) -> int:
        return 1

    @property
    def positions(self) -> int:
        return self.g.shape[2]

    @property
    def leading(self) -> int:
        return self.table

    @property
    def trailing(self) -> int:
        return self.g.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    @property
    def device(self) -> torch.device:
        return self.g.device

    def open(self) -> Slab:
        def slab(c: int, i: int, j: int) -> Tensor:
            inside = (self.index >= i) & (self.index < j)
            index = torch.where(inside, self.index - i, 0)
            g = self.g[c] * inside[..., None]
            out = g.new_zeros(self.n, j - i, g.shape[-1])
            return out.scatter_add_(1, index[..., None].expand_as(g), g)

        return slab


@dataclass(frozen=True)
class Dense:
    """J itself, [C, n, P]."""

    j: Tensor

    @property
    def n(self) -> int:
        return self.j.shape[1]

    @property
    def outputs(self) -> int:
        return self.j.shape[0]

    @property
    def leading(self) -> int:
        return self.j.shape[2]

    @property
    def trailing(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return self.j.dtype

    @property
    def device(self) -> torch.device:
        return self.j.device

    def open(self) -> Slab:
        return lambda c, i, j: self.j[c, :, i:j, None]


@dataclass(frozen=True)
class Sum:
    """Several uses of one parameter: their Jacobians add, before any product (tied, reused, recurrent)."""

    parts: tuple[Factor, ...]
    leading: int

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def outputs(self) -> int:
        return self.parts[0].outputs

    @property
    def trailing(self) -> int:
        return self.parts[0].leading * self.parts[0].trailing // self.leading

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def open(self) -> Slab:
        opened = [(part.open(), part.leading // self.leading) for part in self.parts]

        def slab(c: int, i: int, j: int) -> Tensor:
            shape = (self.n, j - i, self.trailing)
            return torch.stack([fn(c, i * k, j * k).reshape(shape) for fn, k in opened]).sum(0)

        return slab


def densify(found: Factor) -> Dense:
    """[C, n, P] of any factor."""
    if isinstance(found, Dense):
        return found
    slab = found.open()
    return Dense(torch.stack([slab(c, 0, found.leading).flatten(1) for c in range(found.outputs)]))


def add(parts: list[Factor]) -> Factor:
    """The sum of uses; those of one form are joined along their positions, which adds cross terms by itself."""
    joined: list[Factor] = []
    for part in parts:
        for i, other in enumerate(joined):
            both = _join(other, part)
            if both is not None:
                joined[i] = both
                break
        else:
            joined.append(part)
    if len(joined) == 1:
        return joined[0]
    least = min(part.leading for part in joined)
    if any(part.leading % least for part in joined):
        return Dense(torch.stack([densify(part).j for part in joined]).sum(0))
    return Sum(tuple(joined), least)


def aligned(one: Factor, two: Factor) -> tuple[Factor, Factor]:
    """Two factors of one parameter, seen as the same number of leading rows."""
    if one.leading == two.leading:
        return one, two
    least = min(one.leading, two.leading)
    if one.leading % least or two.leading % least:
        return densify(one), densify(two)
    return tuple(f if f.leading == least else Sum((f,), least) for f in (one, two))  # type: ignore[return-value]


def _join(one: Factor, two: Factor) -> Factor | None:
    if isinstance(one, Dense) and isinstance(two, Dense):
        return Dense(one.j + two.j)
    if isinstance(one, Rows) and isinstance(two, Rows):
        return Rows(torch.cat([one.index, two.index], 1), torch.cat([one.g, two.g], 2), one.table)
    if isinstance(one, Outer) and isinstance(two, Outer) and one.a_first == two.a_first and one.groups == two.groups:
        first, second = one.a, two.a
        n, groups, s, p = first.shape
        columns = Columns((n, groups, s + second.shape[2], p), lambda: torch.cat([first.make(), second.make()], 2))
        return Outer(columns, torch.cat([one.g, two.g], 3), one.a_first)
    return None
