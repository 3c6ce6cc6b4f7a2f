"""What a real pass tells of blocks of probes, where their shapes alone do not say what a kernel takes.

A model whose shapes depend on values (tokens dropped or routed to experts, lengths, distinct words), or whose examples
lie where only gradients tell, is passed through once for its two largest blocks, one after the other: forward, and as
many backward passes as tell whose each row is. A rehearsal without memory then repeats these very blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ntkwatch.engines.capture import Capture, Found
from ntkwatch.engines.layouts import Scattered
from ntkwatch.engines.memory import Forward, LiveStorages, limit_bytes
from ntkwatch.engines.run import Run
from ntkwatch.engines.separation import Separation, few
from ntkwatch.engines.values import Answers
from ntkwatch.model import batch_size, inputs_of

_SURE = 1.5  # times what few probes take: rows of others may be longer, and from 16 on a third pass tells them apart


@dataclass(frozen=True)
class Seen:
    """One block: what it asks of values, where its examples lie, bytes at a capture's worst, and in passing alone."""

    answers: Answers
    recipe: Separation
    peak: int
    more: int

    def without_memory(self) -> Separation:
        """The layouts for tensors of the same shapes that have no memory."""
        layouts = {id(layout): layout for _, _, layout in self.recipe.boundary}  # edges of one node share theirs
        copies = {i: layout.without_memory() for i, layout in layouts.items() if isinstance(layout, Scattered)}
        boundary = tuple((i, k, copies.get(id(layout), layout)) for i, k, layout in self.recipe.boundary)
        return dataclasses.replace(self.recipe, boundary=boundary, sure=True)


class Replay(Capture):
    """A capture of the block that was seen, on tensors without memory.

    Raises:
        LookupError: the graph is another one there.
    """

    def __init__(self, run: Run, block: Any, seen: Seen, counter: LiveStorages) -> None:
        self._counter, self._answers = counter, seen.answers.again(counter.answers)
        counter.answers, recipe = self._answers, seen.without_memory()
        super().__init__(run.network, block, run.state, summed=run.reduction == "sum", recipe=recipe)
        if self.recipe is not recipe:
            raise LookupError("the graph is another one on tensors without memory")
        counter.reserve(seen.more)

    def factors(self, outputs: slice = slice(None)) -> Iterator[Found]:
        """As of any capture; backward passes ask too, and are told what was seen of this block."""
        stream = super().factors(outputs)
        while True:
            self._counter.answers = self._answers
            found = next(stream, None)
            if found is None:
                return
            yield found


def shapes_tell(run: Run, parts: Sequence[Any], forward: Forward) -> bool:
    """Whether the shapes of a batch in parts tell all, by the notes of a forward pass on few probes."""
    assert run.recipe is not None
    sizes = [batch_size(inputs_of(part)) for part in parts[:2]]
    alone = any((size == 1) != (run.recipe.n == 1) for size in sizes)  # one example lies otherwise than several
    return run.recipe.sure and not forward.noted and not alone


def affordable(run: Run, x: Any, size: int) -> int:
    """Probes in a block, `size` or fewer, of which a real pass takes no more than a kernel may; by a pass of a few."""
    each = _SURE * _pass(run, few(x)).peak / batch_size(inputs_of(few(x)))
    return max(1, min(size, int(limit_bytes(run.network.device) / max(each, 1))))


def look(run: Run, parts: Sequence[Any], forward: Forward) -> tuple[Sequence[int], list[Seen]]:
    """The blocks' order, the two largest first (the earlier one first), what was seen of these; shapes may tell all."""
    order: Sequence[int] = range(len(parts))
    if shapes_tell(run, parts, forward):
        return order, []
    if len(parts) > 2 and forward.noted:
        order = sorted(order, key=[_made(run, part) for part in parts].__getitem__, reverse=True)
        order = [
            *sorted(order[:2]),
            *order[2:],
        ]  # as they meet in a kernel: the later one decides how they are contracted
    return order, [_pass(run, parts[i]) for i in order[:2]]


def _made(run: Run, block: Any) -> int:
    """Bytes of all that a forward pass makes."""
    with torch.no_grad(), Forward() as forward:
        run.network.outputs(block, run.state)
    return forward.made


def _pass(run: Run, block: Any) -> Seen:
    with Forward() as forward:
        one = Capture(run.network, block, run.state, summed=run.reduction == "sum", recipe=run.recipe)
        more = forward.peak - forward.now
    for _, _, layout in one.recipe.boundary:
        if isinstance(layout, Scattered) and layout.owner.ndim == 2:
            _ = layout.rows  # while there are values to find them by
    return Seen(forward.noted, one.recipe, forward.peak, more)
