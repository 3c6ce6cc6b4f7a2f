"""What a kernel of factors will take, before it is computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Row, entries
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.memory import Forward, LiveStorages, limit_bytes
from ntkwatch.engines.rehearsal import Rehearsal
from ntkwatch.engines.run import Run
from ntkwatch.engines.seen import Seen, affordable, look, shapes_tell
from ntkwatch.engines.separation import few, leaves_at, outputs_at
from ntkwatch.engines.shapes import shapes_only
from ntkwatch.model import batch_size, inputs_of, leaves, take

_DOZEN, _FEWEST = 12, 3  # probes of a block that is rehearsed with memory
_KERNELS = 4  # of all parameters together, and of one: no more grows with the square of the probes


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
    memory goes through, a few probes are rehearsed with memory, and continued.
    """
    chunk = min(chunk, batch_size(inputs_of(x)))
    if run.recipe is not None:
        with contextlib.suppress(Exception):  # whatever a model does with values that are not there
            tell = shapes_tell(run, blocks(x, chunk), forward)
            size = chunk if tell else affordable(run, x, chunk)
            if size == chunk:
                return _rehearsed(run, x, chunk, forward)
            return _continued(run, x, chunk, size, lambda part, size: _rehearsed(run, part, size, forward, x))
    return _continued(run, x, chunk, probes_at_hand(run, chunk), lambda part, size: _with_memory(run, part, size, x))


def _rehearsed(run: Run, x: Any, chunk: int, forward: Forward, whole: Any = None) -> Prediction:
    """Of x in blocks of `chunk`, without memory; x may be part of a `whole`."""
    n, distinct, parts = batch_size(inputs_of(x)), _distinct(x), blocks(x, chunk)
    order, seen = look(run, parts, forward)
    with shapes_only(run.network, x, run.state) as (batch, state):
        shapes = blocks(batch, chunk)
        done = _rehearse(run, state, [shapes[i] for i in order], seen, distinct, whole)
    with shapes_only(run.network, few(x if whole is None else whole), run.state) as (some, state):
        hidden = hidden_bytes(run, state, some, forward) * min(n, 2 * chunk)
    return Prediction(math.ceil(done.counter.peak + hidden), list(done.rows.values()), done.outputs[0].shape[1], True)


def _with_memory(run: Run, x: Any, chunk: int, whole: Any) -> Prediction:
    done = _rehearse(run, run.state, blocks(x, chunk), whole=whole)
    return Prediction(done.counter.peak, list(done.rows.values()), done.outputs[0].shape[1], False)


def probes_at_hand(run: Run, chunk: int) -> int:
    """Probes of a block that can be passed through with memory: a dozen, or as many as a kernel may take, but a few."""
    size = min(chunk, _DOZEN)
    while size > _FEWEST and run.rough(2 * size) > limit_bytes(run.network.device):
        size = -(-size // 2)
    return size


def _continued(run: Run, x: Any, chunk: int, top: int, rehearse: Callable[[Any, int], Prediction]) -> Prediction:
    """From blocks of up to `top` probes to larger ones, as many as are there at once."""
    n = batch_size(inputs_of(x))
    held = 1 if chunk >= n else 2
    sizes = sorted({max(1, top // part) for part in (4, 2, 1)})
    found = [rehearse(take(x, slice(0, held * size)), size) for size in sizes]
    last = found[-1]
    kept = 0 if run.layers is None else len(run.network.parameters) * entries(run.layers, last.outputs)
    most = 8.0 * (kept + _KERNELS * entries(run.reduction, last.outputs))
    peak = _parabola(sizes, [each.peak for each in found], chunk, most)
    scale = (n / min(n, held * sizes[-1])) ** 2
    rows = [Row(r.name, r.rule, r.flops * scale, r.bytes * scale, r.seconds * scale) for r in last.rows]
    return Prediction(math.ceil(peak), rows, last.outputs, False)


def _parabola(x: Sequence[int], y: Sequence[float], at: int, most: float) -> float:
    """Through the last points, at a place behind them: it never falls, and bends up by no more than `most`."""
    if len(x) == 1:
        return y[0] * at / x[0]
    slopes = [max(0.0, (y[i + 1] - y[i]) / (x[i + 1] - x[i])) for i in range(len(x) - 1)]
    bend = min(most, max(0.0, (slopes[-1] - slopes[0]) / (x[-1] - x[0])))
    return y[-1] + (at - x[-1]) * (slopes[-1] + bend * (at - x[-2]))


def _rehearse(
    run: Run,
    state: Mapping[str, Tensor] | None,
    parts: list[Any],
    seen: Sequence[Seen] = (),
    distinct: int | None = None,
    whole: Any = None,
) -> Rehearsal:
    """Of a batch in parts, of which `seen` tells of the first; they may be part of a `whole`."""
    done = Rehearsal(run.network, state, run.reduction, run.precision, run.recipe, run.layers, distinct=distinct)
    done.seen = {id(part): each for part, each in zip(parts, seen, strict=False)}
    done.probes = 0 if whole is None or len(parts) < 2 else batch_size(inputs_of(whole))
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
    """Per probe of the few in x, workspace that operations keep and shapes do not show (oneDNN's recurrent layers)."""
    with LiveStorages(forward.noted.again()) as counter:
        kept = outputs_at(run.network, x, state, leaves_at(run.network, state))
        shown = counter.now
    del kept
    return max(0.0, (forward.kept - shown) / batch_size(inputs_of(x)))
