"""A rehearsal of a kernel: the same passes, every kind of contraction once, and what each parameter costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Reduction, Row
from ntkwatch.engines.capture import Capture, Found
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.costs import choose
from ntkwatch.engines.factors import Factor
from ntkwatch.engines.layerwise import Run
from ntkwatch.engines.memory import LiveStorages
from ntkwatch.model import batch_size, inputs_of


@dataclass
class Rehearsal(Run):
    """A run that takes the first group of outputs and the first two blocks: the others are as large and cost as much.

    Attributes:
        counter: counts what is alive while it runs.
        rows: costs by parameter name, of all outputs and blocks.
    """

    counter: LiveStorages = field(default_factory=LiveStorages)
    rows: dict[str, Row] = field(default_factory=dict)
    _groups: float = 1.0
    _cells: float = 1.0

    def kernels(self, blocks1: list[Any], blocks2: list[Any] | None = None) -> dict[str, Tensor]:
        """Those of the first two blocks, with the memory of all."""
        count = len(blocks1)
        self._cells = count * (count + 1) / 6 if count > 2 else 1.0  # of three that are rehearsed
        with self.counter:
            found = super().kernels(blocks1[:2], None)
        part, whole = (sum(batch_size(inputs_of(b)) for b in some) for some in (blocks1[:2], blocks1))
        sizes = sum(k.untyped_storage().nbytes() for k in found.values())
        self.counter.peak += int(sizes * ((whole / part) ** 2 - 1))
        return found

    def contractor(self, reduction: Reduction, dtype: torch.dtype, same: bool) -> Contractor:
        """One that contracts factors of a kind once, and then only remembers how much memory that took."""
        return _Remembering(reduction, dtype, same, counter=self.counter)

    def groups(self, one: Capture) -> list[slice]:
        """The first."""
        found, outputs = super().groups(one), range(len(one.cotangents))
        self._groups = len(outputs) / len(outputs[found[0]])
        return found[:1]

    def note(self, found: Found, n: int, m: int, contract: Contractor) -> None:
        """Adds the cost of a contraction to its parameter's row."""
        how, cost = choose(found.factor, n, m, contract.reduction, contract.dtype, contract.same)
        old = self.rows.get(found.name, Row(found.name, "", 0.0, 0.0, 0.0))
        times = self._groups * self._cells
        sums = (getattr(old, what) + times * getattr(cost, what) for what in ("flops", "bytes", "seconds"))
        self.rows[found.name] = Row(found.name, f"{found.rule}: {how}", *sums)


@dataclass
class _Remembering(Contractor):
    counter: LiveStorages = field(default_factory=LiveStorages)
    seen: dict[Any, int] = field(default_factory=dict)

    def add(self, out: Tensor, one: Factor, two: Factor) -> None:
        key = (_kind(out), _kind(one), _kind(two), one is two)
        if key in self.seen:
            self.counter.reserve(self.seen[key])
        else:
            self.seen[key] = self.counter.rise(lambda: super(_Remembering, self).add(out, one, two))


def _kind(thing: Any) -> Any:
    """All that decides how much memory a contraction of a factor takes: shapes, types and how inputs are made."""
    if isinstance(thing, Tensor):
        return (tuple(thing.shape), thing.dtype)
    if dataclasses.is_dataclass(thing):
        return (type(thing), *(_kind(getattr(thing, f.name)) for f in dataclasses.fields(thing)))
    if isinstance(thing, tuple | list):
        return tuple(map(_kind, thing))
    if callable(thing):
        cells = getattr(thing, "__closure__", None) or ()
        return (getattr(thing, "__qualname__", ""), *(_kind(cell.cell_contents) for cell in cells))
    return thing if isinstance(thing, int | float | str | bool | None) else type(thing)
