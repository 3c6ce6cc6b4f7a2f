"""Sums of factors: several uses of one parameter (tied, reused, recurrent) add their Jacobians before any product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.engines.factors import Dense, Factor, Outer, Rows, Slab
from ntkwatch.engines.per_output import PerOutput, combined


@dataclass(frozen=True)
class Sum:
    """A sum of factors of different forms, as slabs of `leading` rows."""

    parts: tuple[Factor, ...]
    leading: int

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.parts[0].n

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return self.parts[0].outputs

    @property
    def trailing(self) -> int:
        """Entries per leading row."""
        return self.parts[0].leading * self.parts[0].trailing // self.leading

    @property
    def dtype(self) -> torch.dtype:
        """Type of the Jacobian."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the Jacobian."""
        return self.parts[0].device

    def open(self) -> Slab:
        """See `Factor.open`; the slabs of the parts are added."""
        opened = [(part.open(), part.leading // self.leading) for part in self.parts]

        def slab(c: int, i: int, j: int, out: Tensor) -> None:
            part = torch.empty_like(out)
            out.zero_()
            for fn, k in opened:
                fn(c, i * k, j * k, part.view(self.n, (j - i) * k, -1))
                out += part

        return slab


def densify(found: Factor) -> Dense:
    """Any factor as a dense Jacobian, C × [n, P]."""
    if isinstance(found, Dense):
        return found
    slab, shape = found.open(), (found.outputs, found.n, found.leading, found.trailing)
    j = torch.empty(shape, dtype=found.dtype, device=found.device)
    for c, out in enumerate(j):
        slab(c, 0, found.leading, out)
    return Dense(PerOutput(j.flatten(2)))


def add(parts: list[Factor]) -> Factor:
    """The sum of uses; factors of one form are concatenated along their positions, which includes the cross terms."""
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
        return Dense(_added([densify(part).j for part in joined]))
    return Sum(tuple(joined), least)


def aligned(one: Factor, two: Factor) -> tuple[Factor, Factor]:
    """Two factors of one parameter with the same number of leading rows."""
    if one.leading == two.leading:
        return one, two
    least = min(one.leading, two.leading)
    if one.leading % least or two.leading % least:
        return densify(one), densify(two)
    return tuple(f if f.leading == least else Sum((f,), least) for f in (one, two))  # type: ignore[return-value]


def _join(one: Factor, two: Factor) -> Factor | None:
    if isinstance(one, Dense) and isinstance(two, Dense):
        return Dense(_added([one.j, two.j]))
    if isinstance(one, Rows) and isinstance(two, Rows):
        return Rows(torch.cat([one.index, two.index], 1), _beside(one.g, two.g), one.table)
    if isinstance(one, Outer) and isinstance(two, Outer) and one.a_first == two.a_first and one.groups == two.groups:
        return Outer(one.a.beside(two.a), _beside(one.g, two.g), one.a_first)
    return None


def _added(parts: list[PerOutput]) -> PerOutput:
    return combined(lambda each: torch.stack(each).sum(0), parts)


def _beside(one: PerOutput, two: PerOutput) -> PerOutput:
    """Both, concatenated along the positions."""
    return combined(lambda each: torch.cat(each, -2), [one, two])
