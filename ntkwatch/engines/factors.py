"""Per-example Jacobians in the form they come in: outer products, rows of a table, or dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Factor(Protocol):
    """One use of one parameter by n examples and C outputs: J[c, i] = ∂f_c(x_i)/∂(this use), flat, [C, n, P]."""

    @property
    def n(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    def jacobian(self, rows: slice, output: int) -> Tensor:
        """J of one output for some examples, [rows, P], in the parameter's own order of entries."""
        ...

    def summed(self) -> Factor:
        """The factor of Σ_c f_c, with one output."""
        ...


@dataclass(frozen=True)
class Columns:
    """Inputs [n, G, S, p] of a linear map: kept as they are, or unfolded when asked for."""

    shape: tuple[int, int, int, int]
    make: Callable[[slice], Tensor]

    def __call__(self, rows: slice) -> Tensor:
        return self.make(rows)

    @staticmethod
    def of(t: Tensor) -> Columns:
        return Columns(tuple(t.shape), lambda rows: t[rows])  # type: ignore[arg-type]


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
    def positions(self) -> int:
        return self.g.shape[3]

    @property
    def entries(self) -> int:
        return self.g.shape[2] * self.g.shape[4] * self.a.shape[3]

    def jacobian(self, rows: slice, output: int) -> Tensor:
        a, g = self.a(rows), self.g[output, rows]
        j = a.transpose(-1, -2) @ g if self.a_first else g.transpose(-1, -2) @ a
        return j.flatten(1)

    def summed(self) -> Outer:
        return Outer(self.a, self.g.sum(0, keepdim=True), self.a_first)


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
    def positions(self) -> int:
        return self.g.shape[2]

    @property
    def entries(self) -> int:
        return self.table * self.g.shape[3]

    def jacobian(self, rows: slice, output: int) -> Tensor:
        index, g = self.index[rows], self.g[output, rows]
        j = g.new_zeros(index.shape[0], self.table, g.shape[-1])
        return j.scatter_add_(1, index[..., None].expand_as(g), g).flatten(1)

    def summed(self) -> Rows:
        return Rows(self.index, self.g.sum(0, keepdim=True), self.table)


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
    def entries(self) -> int:
        return self.j.shape[2]

    def jacobian(self, rows: slice, output: int) -> Tensor:
        return self.j[output, rows]

    def summed(self) -> Dense:
        return Dense(self.j.sum(0, keepdim=True))


@dataclass(frozen=True)
class Sum:
    """Several uses of one parameter: their Jacobians add, before any product (tied, reused, recurrent)."""

    parts: tuple[Factor, ...]

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def outputs(self) -> int:
        return self.parts[0].outputs

    @cached_property
    def entries(self) -> int:
        return self.parts[0].entries  # type: ignore[attr-defined]

    def jacobian(self, rows: slice, output: int) -> Tensor:
        j = self.parts[0].jacobian(rows, output)
        for part in self.parts[1:]:
            j = j + part.jacobian(rows, output)
        return j

    def summed(self) -> Sum:
        return Sum(tuple(part.summed() for part in self.parts))


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
    return joined[0] if len(joined) == 1 else Sum(tuple(joined))


def _join(one: Factor, two: Factor) -> Factor | None:
    if isinstance(one, Dense) and isinstance(two, Dense):
        return Dense(one.j + two.j)
    if isinstance(one, Rows) and isinstance(two, Rows):
        return Rows(torch.cat([one.index, two.index], 1), torch.cat([one.g, two.g], 2), one.table)
    if isinstance(one, Outer) and isinstance(two, Outer) and one.a_first == two.a_first:
        first, second = one.a, two.a
        n, groups, s, p = first.shape
        if second.shape[1] == groups:
            shape = (n, groups, s + second.shape[2], p)
            columns = Columns(shape, lambda rows: torch.cat([first(rows), second(rows)], 2))
            return Outer(columns, torch.cat([one.g, two.g], 3), one.a_first)
    return None
