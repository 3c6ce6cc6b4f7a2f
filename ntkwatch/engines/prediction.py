"""What a kernel of factors will take, before it is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Row
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.memory import Forward, LiveStorages
from ntkwatch.engines.rehearsal import Rehearsal
from ntkwatch.engines.run import Run
from ntkwatch.engines.seen import Seen, affordable, look, shapes_tell
from ntkwatch.engines.separation import few, leaves_at, outputs_at
from ntkwatch.engines.shapes import shapes_only
from ntkwatch.model import batch_size, inputs_of, leaves, take


@dataclass(frozen=True)
class Prediction:
    """Memory and costs of a kernel that has not been computed; `exact` where its very blocks were rehearsed."""

    peak: int
    rows: list[Row]
    outputs: int
    exact: bool


def predict(run: Run, x: Any, chunk: int, forward: Forward) -> Prediction:
    """What `run.kernels` of x in blocks of `chunk` will take, `forward` being the notes of a pass on few probes.

    On tensors without memory. Where shapes do not tell all, with what a real pass sees of the two largest blocks; where
    that might take more than a kernel may, smaller blocks are rehearsed so, and continued. Where no rehearsal without
    memory goes through, few probes are rehearsed with memory, and continued.
    """
    size = min(chunk, batch_size(inputs_of(x)))
    if run.recipe is not None:
        with contextlib.suppress(Exception):  # whatever a model does with values that are not there
            if shapes_tell(run, blocks(x, chunk), forward) or affordable(run, size):
                return _rehearsed(run, x, chunk, forward)
            while size > 1 and not affordable(run, size):
                size = -(-size // 2)
            sizes = (-(-size // 2), size)
            return _continued([_rehearsed(run, x, each, forward) for each in sizes], sizes, chunk)
    return _from_few(run, x, chunk)


def _rehearsed(run: Run, x: Any, chunk: int, forward: Forward) -> Prediction:
    n, distinct, parts = batch_size(inputs_of(x)), _distinct(x), blocks(x, chunk)
    order, seen = look(run, parts, forward)
    with shapes_only(run.network, x, run.state) as (batch, state):
        shapes = blocks(batch, chunk)
        done = _rehearse(run, state, [shapes[i] for i in order], seen, distinct)
        hidden = hidden_bytes(run, state, batch, forward) * min(n, 2 * chunk)
    return Prediction(math.ceil(done.counter.peak + hidden), list(done.rows.values()), done.outputs[0].shape[1], True)


def _continued(found: Sequence[Prediction], sizes: Sequence[int], chunk: int) -> Prediction:
    """From two sizes of blocks to a larger one; the costs of the larger stand."""
    one, two = found
    each = max(0.0, (two.peak - one.peak) / max(1, sizes[1] - sizes[0]))
    return dataclasses.replace(two, peak=math.ceil(two.peak + each * (chunk - sizes[1])), exact=False)


def _from_few(run: Run, x: Any, chunk: int) -> Prediction:
    n = batch_size(inputs_of(x))
    sizes = [min(n, times * batch_size(inputs_of(few(x)))) for times in (1, 2)]
    small, large = (_rehearse(run, run.state, blocks(take(x, slice(0, size)), chunk)) for size in sizes)
    each = (large.counter.peak - small.counter.peak) / max(1, sizes[1] - sizes[0])
    peak = large.counter.peak + max(0.0, each) * (max(sizes[1], min(n, 2 * chunk)) - sizes[1])
    scale = (n / sizes[1]) ** 2
    rows = [Row(r.name, r.rule, r.flops * scale, r.bytes * scale, r.seconds * scale) for r in large.rows.values()]
    return Prediction(math.ceil(peak), rows, large.outputs[0].shape[1], False)


def _rehearse(
    run: Run,
    state: Mapping[str, Tensor] | None,
    parts: list[Any],
    seen: Sequence[Seen] = (),
    distinct: int | None = None,
) -> Rehearsal:
    """Of a batch in parts, of which `seen` tells of the first."""
    done = Rehearsal(run.network, state, run.reduction, run.precision, run.recipe, run.layers, distinct=distinct)
    done.seen = {id(part): each for part, each in zip(parts, seen, strict=False)}
    done.kernels(parts)
    return done


def _distinct(x: Any) -> int | None:
    """How many different whole numbers a batch holds, and no fewer than there are positions; None without any."""
    whole = [t for t in leaves(inputs_of(x)) if isinstance(t, Tensor) and t.dtype in (torch.int64, torch.int32)]
    return max((max(len(t.unique()), *t.shape[1:]) for t in whole if t.ndim > 1), default=None)


def try_forward(run: Run, x: Any) -> Forward:
    """Notes of one forward pass on few probes."""
    with Forward() as forward:
        kept = outputs_at(run.network, few(x), run.state, leaves_at(run.network, run.state))
        forward.kept = forward.now
    del kept
    return forward


def hidden_bytes(run: Run, state: Mapping[str, Tensor], x: Any, forward: Forward) -> float:
    """Per probe, workspace that operations keep and that shapes do not show (oneDNN's recurrent layers)."""
    some = few(x)
    with LiveStorages(forward.noted.again()) as counter:
        kept = outputs_at(run.network, some, state, leaves_at(run.network, state))
        shown = counter.now
    del kept
    return max(0.0, (forward.kept - shown) / batch_size(inputs_of(some)))
