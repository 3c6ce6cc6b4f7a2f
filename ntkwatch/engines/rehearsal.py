"""A rehearsal of a kernel: the same passes, every kind of contraction once, and what each parameter costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Reduction, Row, entries
from ntkwatch.engines.capture import Capture, Found
from ntkwatch.engines.contract import Contractor, alone, is_single
from ntkwatch.engines.costs import Cost, choose
from ntkwatch.engines.factors import Dense, Factor, Outer, Rows
from ntkwatch.engines.machines import machine
from ntkwatch.engines.memory import LiveStorages, Repeats
from ntkwatch.engines.one_by_one import OneByOne
from ntkwatch.engines.outputs import PerOutput
from ntkwatch.engines.run import Run
from ntkwatch.engines.seen import Replay, Seen
from ntkwatch.model import batch_size, inputs_of

_KEEPING = 7  # times that a kernel of one parameter is gone through: cleared, added to the whole, finished, reduced
_CALLS = 22  # operations around a contraction, about, as whole kernels of small models were timed


@dataclass
class Rehearsal(Run):
    """A run that takes the first group of outputs and the first two blocks: the others are as large and cost as much.

    Attributes:
        counter: counts what is alive while it runs.
        rows: costs by parameter name, of all outputs and blocks.
        distinct: rows of a table that are looked up, where tensors without memory do not tell.
        seen: what a real pass told of a block, by the block's identity.
        probes: how many there are in all, where more than are handed in.
    """

    counter: LiveStorages = field(default_factory=LiveStorages)
    rows: dict[str, Row] = field(default_factory=dict)
    distinct: int | None = None
    seen: dict[int, Seen] = field(default_factory=dict)
    probes: int = 0
    _before: _Shared | None = None
    _groups: float = 1.0
    _cells: float = 1.0

    def kernels(self, blocks1: list[Any], blocks2: list[Any] | None = None) -> dict[str, Tensor]:
        """Those of the first two blocks, with the memory of all."""
        count = len(blocks1)
        self._cells = count * (count + 1) / 6 if count > 2 else 1.0  # of three that are rehearsed
        with self.counter:
            found = super().kernels(blocks1[:2], None)
        part, whole = (sum(batch_size(inputs_of(b)) for b in some) for some in (blocks1[:2], blocks1))
        whole = max(whole, self.probes)
        sizes = sum(k.untyped_storage().nbytes() for k in found.values())
        self.counter.peak += int(sizes * ((whole / part) ** 2 - 1))
        return found

    def capture(self, block: Any) -> Capture | OneByOne:
        """With the layouts and the answers of the block's real pass, if there was one."""
        seen = self.seen.get(id(block))
        return super().capture(block) if seen is None else Replay(self, block, seen, self.counter)

    def contractor(self, reduction: Reduction, dtype: torch.dtype, same: bool) -> Contractor:
        """One that contracts factors of a kind once, and then only remembers how much memory that took."""
        repeats = Repeats(self.counter)
        return _Remembering(reduction, dtype, same, self.in_blocks, repeats=repeats, distinct=self.distinct)

    def groups(self, one: Capture | OneByOne) -> list[slice]:
        """The first."""
        found, outputs = super().groups(one), range(len(one.cotangents))
        self._groups = len(outputs) / len(outputs[found[0]])
        return found[:1]

    def note(self, found: Found, n: int, m: int, contract: Contractor) -> None:
        """Adds the cost of a contraction to its parameter's row; a bias has the products of its weight for nothing."""
        one = found.factor
        how, cost = choose(one, n, m, contract.reduction, contract.dtype, contract.same)
        kept = 0.0 if self.layers is None else float(n * m * entries(contract.reduction, one.outputs))
        moved = _KEEPING * kept * contract.dtype.itemsize
        at = machine(one.device)
        more = Cost(cost.flops, cost.bytes + moved, cost.seconds + moved / at.bandwidth + _CALLS * at.call)
        self._add(found.name, f"{how}: {found.rule}", more)
        now = _Shared(_gradients(one), found.name, found.rule, cost, isinstance(one, Dense))
        before, self._before = self._before, now
        if before is not None and before.with_(now):
            bias = before if before.bias else now
            self._add(bias.name, f"shared: {bias.rule}", Cost(-bias.cost.flops, -bias.cost.bytes, -bias.cost.seconds))

    def _add(self, name: str, rule: str, cost: Cost) -> None:
        old = self.rows.get(name, Row(name, "", 0.0, 0.0, 0.0))
        pairs = ((old.flops, cost.flops), (old.bytes, cost.bytes), (old.seconds, cost.seconds))
        self.rows[name] = Row(name, rule, *(was + self._groups * self._cells * new for was, new in pairs))


@dataclass(frozen=True)
class _Shared:
    """What is known of the factor before: it is not held itself, for memory is counted."""

    gradients: tuple[int, ...]
    name: str
    rule: str
    cost: Cost
    bias: bool

    def with_(self, other: _Shared) -> bool:
        """Whether one is the bias of the other, a weight of the same module."""
        modules = {one.name.rpartition(".")[0] for one in (self, other)}
        same = bool(self.gradients) and self.gradients == other.gradients
        return same and self.bias != other.bias and len(modules) == 1


def _gradients(one: Factor) -> tuple[int, ...]:
    """Where the gradients of a bias, or of a weight of one position, lie."""
    if isinstance(one, Outer):
        return alone(one).place if is_single(one, one) else ()
    return one.j.place if isinstance(one, Dense) else ()


@dataclass
class _Remembering(Contractor):
    """Does everything once, and then only remembers how much memory it took and what shape it gave."""

    repeats: Repeats = field(default_factory=lambda: Repeats(LiveStorages()))
    distinct: int | None = None

    def add(self, out: Tensor, one: Factor, two: Factor) -> None:
        if self.distinct is not None and isinstance(one, Rows) and isinstance(two, Rows):
            same, table = one is two, min(one.table, self.distinct)
            one = dataclasses.replace(one, table=table)
            two = one if same else dataclasses.replace(two, table=table)
        counter, seen = self.repeats.counter, self.repeats.seen
        gradients = self._shareable(one, two)
        shared = gradients is not None and _places(*gradients) in self.shared
        key, before = ("add", _kind((out, one, two)), one is two, shared), counter.now
        new = key not in seen
        self.repeats.once(key, lambda: super(_Remembering, self).add(out, one, two))
        if new:  # buffers that stay are there the next time
            rise, made = seen[key]
            seen[key] = rise - max(0, counter.now - before), made
        elif gradients is not None and not shared:
            a, b = gradients
            self.shared = {_places(a, b): (a, b, self.zeros(len(a), a.shape[0], b.shape[0], a.device))}

    def _shareable(self, one: Factor, two: Factor) -> tuple[PerOutput, PerOutput] | None:
        """The gradients whose products this contraction takes and leaves to the next; None where it takes none."""
        if isinstance(one, Dense) and isinstance(two, Dense):
            return one.j, two.j
        if isinstance(one, Outer) and isinstance(two, Outer) and is_single(one, two) and self._by_gram(one, two):
            g = alone(one)
            return g, g if self.same else alone(two)
        return None

    def _blocks(self, n: int, size: int) -> Iterator[slice]:
        """The first three: with the third all that is held at once has been held, and the last is no larger."""
        return itertools.islice(super()._blocks(n, size), 3)

    def _positions(self, one: Any, rows: slice) -> Any:
        key = ("positions", _kind(one), rows.stop - rows.start)
        return self.repeats.once(key, lambda: super(_Remembering, self)._positions(one, rows))

    def _input_products(self, one: Any, a: Tensor, b: Tensor) -> Any:
        key = ("inputs", type(one), _kind((a, b)))
        return self.repeats.once(key, lambda: super(_Remembering, self)._input_products(one, a, b))

    def _block(self, inputs: Tensor, ga: Any, gb: Any, s: int, t: int) -> Any:
        key = ("block", _kind((inputs, ga, gb)), s, t)
        return self.repeats.once(key, lambda: super(_Remembering, self)._block(inputs, ga, gb, s, t))

    def _products(self, out: Tensor, x: Tensor, y: Tensor) -> None:
        """In place: takes no memory, but where a product is made at once."""
        if not machine(out.device).near:
            key = ("products", _kind((out, x, y)))
            self.repeats.once(key, lambda: super(_Remembering, self)._products(out, x, y))

    def _each(self, n: int) -> range:
        """The last example, which has the most others."""
        return range(n - 1, n)


def _places(a: PerOutput, b: PerOutput) -> tuple[int, ...]:
    """By which a contraction knows products of gradients."""
    return (*a.place, *b.place)


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
