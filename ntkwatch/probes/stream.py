"""Probes of a stream: the rows of its first batches, gathered as they come."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkwatch.model.batch import as_batch, batch_size, leaves, map_leaves, raw_of, take
from ntkwatch.probes.probeset import ProbeSet, Targets, content_hash, frozen_copy

MIN_PROBES = 8  # probes below which angles say little
MAX_BATCHES_PER_PROBE = 8  # that are read for each probe asked for, where few of them fit together
MAX_BYTES = 2**30  # of rows that are kept meanwhile


class RowCollector:
    """Copies of the rows of batches, up to n that can be one batch: alike in form, and in the shape of a row.

    Batches that do not fit together (padded to other lengths) are gathered apart, and the most rows of one form become
    the probes. settle: tells which leaves of a batch have a row for each example, as `Network.batch` does.
    """

    def __init__(self, n: int, settle: Callable[[Any], Any] = as_batch) -> None:
        self.n, self._settle = n, settle
        self.batches = 0
        self._rows: dict[Hashable, list[Any]] = {}
        self._counts: dict[Hashable, int] = {}
        self._bytes = 0

    def __len__(self) -> int:
        """Rows that fit together."""
        return max(self._counts.values(), default=0)

    def add(self, batch: Any) -> None:
        """Look at one more batch; rows beyond n are not kept."""
        self.batches += 1
        batch = self._settle(batch)
        form, size = row_format(batch), batch_size(batch)
        room = self.n - self._counts.get(form, 0)
        if min(size, room) <= 0:
            return
        kept = map_leaves(_on_cpu, take(batch, slice(0, room)) if size > room else batch)
        self._rows.setdefault(form, []).append(kept)
        self._counts[form] = self._counts.get(form, 0) + min(size, room)
        self._bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves(kept) if isinstance(leaf, Tensor))

    @property
    def enough(self) -> bool:
        """Whether there are as many rows as angles need, be they fewer than n."""
        return len(self) >= min(MIN_PROBES, self.n)

    @property
    def complete(self) -> bool:
        """Whether there are n rows, or further batches are not worth waiting for.

        That is after n batches with FEWEST rows that fit together, after MOST_BATCHES · n, or above MOST_BYTES.
        """
        given_up = self.batches >= MAX_BATCHES_PER_PROBE * self.n or self._bytes > MAX_BYTES
        return len(self) >= self.n or given_up or (self.batches >= self.n and self.enough)

    def probes(self, targets: Targets = None, source: str = "train", how: str | None = None) -> ProbeSet:
        """The probes that there are; raises ValueError where there are none, or targets= do not fit."""
        if not len(self):
            raise ValueError(f"the {source} loader gave no batch with rows: pass probes= a batch")
        form = max(self._counts, key=lambda each: self._counts[each])
        rows = self._counts[form]
        if isinstance(targets, Tensor) and len(targets) > rows:
            raise ValueError(
                f"targets= has {len(targets)} rows for {rows} probes of a stream; pass a callable of the batch"
            )
        return ProbeSet.from_batch(_joined(self._rows[form]), targets, source, how or self._how(rows, source))

    def _how(self, rows: int, source: str) -> str:
        asked = f" ({self.n} were asked for)" if rows < self.n else ""
        said = f"the first {rows} rows of the {source} stream{asked}"
        if len(self._rows) > 1:
            return f"{said} that fit together, of {self.batches} batches in {len(self._rows)} shapes"
        return said


def from_stream(
    batches: Sequence[Any], n: int = 64, source: str = "train", targets: Targets = None, how: str | None = None
) -> ProbeSet:
    """The first n rows of these batches; fewer where there are fewer, or where batches do not fit together."""
    gathered = RowCollector(n)
    for batch in batches:
        gathered.add(batch)
        if gathered.complete:
            break
    return gathered.probes(targets, source, how)


def row_format(batch: Any, row_shapes: bool = True) -> Hashable:
    """Equal for batches whose rows can stand in one batch; for those of one kind at least, without `row_shapes`.

    Tensors that have no row for each example, as positions or a mask that all share, must be the same.
    """
    known, raw = as_batch(batch), raw_of(batch)
    keys = tuple(raw) if isinstance(raw, Mapping) else None
    kind = type(raw) if row_shapes else None  # a list of two and a pair are of one kind
    return (kind, keys, *(_form(leaf, own, row_shapes) for leaf, own in zip(leaves(raw), known.rows, strict=True)))


def _form(leaf: Any, own: bool, row_shapes: bool) -> tuple[Any, ...]:
    if not isinstance(leaf, Tensor):
        return (type(leaf),)
    if not row_shapes:
        return leaf.dtype, leaf.ndim
    if own:
        return leaf.dtype, leaf.layout, tuple(leaf.shape[1:])
    return leaf.dtype, tuple(leaf.shape), content_hash(leaf)


def _on_cpu(leaf: Any) -> Any:
    return frozen_copy(leaf.detach().cpu().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf)


def _joined(batches: Sequence[Any]) -> Any:
    """The rows of batches of one form, one after the other; what they share is the first's."""
    known = [as_batch(batch) for batch in batches]
    columns, own = zip(*map(leaves, known), strict=True), iter(known[0].rows)

    def join(first: Any) -> Any:
        column = next(columns)
        if not next(own):
            return first
        if isinstance(first, Tensor):
            return torch.cat(column)
        return type(first)(item for leaf in column for item in leaf)

    return map_leaves(join, known[0]).fresh()
