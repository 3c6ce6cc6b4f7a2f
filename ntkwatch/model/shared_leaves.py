"""Which leaves of a batch hold a row for each example: read from the model's outputs where shapes do not tell.

A leaf that all examples share (a causal mask [T, T], positions [T], a bank of contexts) may have n rows by coincidence.
Only the model tells it from one that has a row for each: a few examples are run apart, with and without its rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkwatch.model.batch import Batch, has_rows, is_per_example, leaves, take

_SUBSET_SIZE = 3  # examples that are run apart, of either end
_MAX_COMBINATIONS = 64  # ways in which leaves may be shared, at most

Outputs = Callable[[Batch], Tensor]


def infer_rows(
    raw: Any, inputs: Sequence[int], outputs: Outputs, moved: Outputs, limit: Callable[[Tensor], Tensor]
) -> Batch:
    """The batch with what is known of its leaves.

    Args:
        inputs: numbers of the leaves that may go in, tensors with a first side; n is read from the first of them.
        outputs: of a Batch; may raise anything.
        moved: the same at other weights, for outputs that are zero (a readout that starts so).
        limit: by how much two outputs may differ that are the same.
    """
    flat = leaves(raw)
    lead = inputs[0]
    found = _by_shape(raw, len(flat[lead]))
    if found.n == 1 or len(inputs) == 1:
        return found
    try:
        whole = outputs(found)
        if not whole.any():
            outputs, whole = moved, moved(found)
        if whole.ndim == 0:
            return found
        if len(whole) != found.n:  # what n was read from is shared
            lead = next((i for i in inputs if len(flat[i]) == len(whole)), lead)
            found = _by_shape(raw, len(flat[lead]))
    except Exception:  # whoever runs it next says so
        return found
    doubtful = [i for i in reversed(inputs) if is_per_example(flat[i], found.n)]
    ways = itertools.islice(_row_assignments(found, doubtful), _MAX_COMBINATIONS if len(doubtful) > 1 else 0)
    return next((way for way in ways if _is_consistent(way, whole, outputs, limit)), found)


def elsewhere(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """`state` with every trained weight moved by up to its own size; a zero one, by up to the mean size of all."""
    draw = torch.Generator().manual_seed(0)
    here = {name: (state or {}).get(name, p).detach() for name, p in parameters.items()}
    mean = float(torch.stack([p.abs().double().mean() for p in here.values()]).mean()) or 1.0
    moved = dict(state or {})
    for name, p in here.items():
        by = (2 * torch.rand(p.shape, generator=draw) - 1).to(p.device)
        moved[name] = (p + by * torch.where(p == 0, mean, p.abs())).to(p.dtype)
    return moved


def _by_shape(raw: Any, n: int) -> Batch:
    return Batch.of(raw, n, [has_rows(leaf, n) for leaf in leaves(raw)])


def _row_assignments(batch: Batch, doubtful: Sequence[int]) -> Iterator[Batch]:
    """With none of the leaves shared, with one of them, with two, …: all but one at most."""
    for count in range(len(doubtful)):
        for shared in itertools.combinations(doubtful, count):
            rows = tuple(own and i not in shared for i, own in enumerate(batch.rows))
            yield dataclasses.replace(batch, rows=rows)


def _is_consistent(batch: Batch, whole: Tensor, outputs: Outputs, limit: Callable[[Tensor], Tensor]) -> bool:
    """Whether the first few and the last few examples alone give what they give in the whole."""
    few = min(_SUBSET_SIZE, batch.n - 1)
    for part in (slice(0, few), slice(batch.n - few, batch.n)):
        try:
            alone = outputs(take(batch, part))
        except Exception:
            return False
        if alone.shape != whole[part].shape or bool(((alone - whole[part]).abs() > limit(whole)).any()):
            return False
    return True
