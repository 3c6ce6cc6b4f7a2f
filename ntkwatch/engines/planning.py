"""The plan of a kernel: rule, cost and memory per parameter, before it is computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.auto import Choice
from ntkwatch.engines.base import Plan, Precision, Reduction, Row
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.costs import BANDWIDTH, FLOPS
from ntkwatch.engines.functional import Functional, quiet, trained_at
from ntkwatch.engines.layerwise import Layerwise, Run
from ntkwatch.engines.memory import Forward, LiveStorages, limit_bytes, shapes_only
from ntkwatch.engines.rehearsal import Rehearsal
from ntkwatch.engines.separation import few, leaves_at, outputs_at
from ntkwatch.model import Network, batch_size, inputs_of, take

PASSES = "forward and backward"


def make_plan(
    choice: Choice, network: Network, x: Any, reduction: Reduction, precision: Precision, chunk_size: int | None
) -> Plan:
    """The plan of `choice.engine.kernel(network, x)`; nothing of size n is computed."""
    if isinstance(choice.engine, Layerwise):
        return _layerwise(choice, choice.engine, network, x, reduction, precision, chunk_size)
    return _functional(choice, network, x, reduction, precision, chunk_size)


def _layerwise(
    choice: Choice,
    engine: Layerwise,
    network: Network,
    x: Any,
    reduction: Reduction,
    precision: Precision,
    chunk_size: int | None,
) -> Plan:
    n = batch_size(inputs_of(x))
    with quiet():
        recipe, forward = engine.recipe(network, x, None), _forward(network, x)
        chunk = chunk_size or engine.chunk(network, n, Run(network, None, reduction, precision, recipe))
        rows, peak, outputs = _dry_run(network, x, reduction, precision, engine, chunk, forward)
        while chunk_size is None and peak > limit_bytes(network.device) and chunk > 1:
            chunk //= 2
            rows, peak, outputs = _dry_run(network, x, reduction, precision, engine, chunk, forward)
    passes = _passes(forward, x, outputs, recipe.saved * n if recipe else 0.0)
    found = {row.name: row for row in rows}
    ordered = [found.get(name, Row(name, "unused", 0.0, 0.0, 0.0)) for name in network.parameters]
    return Plan(engine.name, choice.reason, peak, chunk, (passes, *ordered))


def _dry_run(
    network: Network, x: Any, reduction: Reduction, precision: Precision, engine: Layerwise, chunk: int, forward: Forward
) -> tuple[list[Row], int, int]:
    """Rows, peak and C: on tensors without memory, or where shapes depend on values, on few probes and continued."""
    n, recipe = batch_size(inputs_of(x)), engine.recipe(network, x, None)

    def rehearse(batch: Any, state: Mapping[str, Tensor] | None, answers: Sequence[Any] = ()) -> Rehearsal:
        run = Rehearsal(network, state, reduction, precision, recipe, counter=LiveStorages(answers))
        with run.counter:
            run.kernels(blocks(batch, chunk), None)
        return run

    if recipe is not None:
        with contextlib.suppress(Exception):  # whatever a model does with values that are not there
            with shapes_only(network, x, None) as (batch, state):
                run = rehearse(batch, state, forward.answers)
            hidden = _hidden(network, x, forward) * min(n, 2 * chunk)
            return list(run.rows.values()), math.ceil(run.counter.peak + hidden), run.outputs[0].shape[1]
    sizes = [min(n, times * batch_size(inputs_of(few(x)))) for times in (1, 2)]
    small, large = (rehearse(take(x, slice(0, size)), None) for size in sizes)
    each = (large.counter.peak - small.counter.peak) / max(1, sizes[1] - sizes[0])
    peak = large.counter.peak + max(0.0, each) * (max(sizes[1], min(n, 2 * chunk)) - sizes[1])
    scale = (n / sizes[1]) ** 2
    rows = [Row(r.name, r.rule, r.flops * scale, r.bytes * scale, r.seconds * scale) for r in large.rows.values()]
    return rows, math.ceil(peak), large.outputs[0].shape[1]


def _forward(network: Network, x: Any) -> Forward:
    """Notes of one forward pass on few probes."""
    with Forward() as forward:
        kept = network.outputs(few(x))
        forward.kept = forward.now
    del kept
    return forward


def _hidden(network: Network, x: Any, forward: Forward) -> float:
    """Bytes per probe of workspace that operations keep and that shapes do not show (oneDNN's recurrent layers)."""
    some = few(x)
    with shapes_only(network, some, None) as (batch, state), LiveStorages(forward.answers) as counter:
        kept = outputs_at(network, batch, state, leaves_at(network, state))
        shown = counter.now
    del kept
    return max(0.0, (forward.kept - shown) / batch_size(inputs_of(some)))


def _passes(forward: Forward, x: Any, outputs: int, saved: float) -> Row:
    """One forward and C backward passes to the activations, each about as much work as the forward."""
    n, some = batch_size(inputs_of(x)), few(x)
    flops = forward.flops * n / batch_size(inputs_of(some)) * (1 + outputs)
    moved = 2.0 * saved * (1 + outputs)
    return Row(PASSES, "autograd", flops, moved, flops / FLOPS[torch.float32] + moved / BANDWIDTH)


def _functional(
    choice: Choice, network: Network, x: Any, reduction: Reduction, precision: Precision, chunk_size: int | None
) -> Plan:
    n = batch_size(inputs_of(x))
    with torch.no_grad():
        c = network.outputs(take(x, slice(0, 1))).shape[1]
    parameters, forward = trained_at(network, None), _forward(network, x)
    chunk = min(n, chunk_size or Functional().chunk(parameters, c))
    pairs = n * n * (c * c if reduction == "full" else c)
    rows = []
    for name, p in parameters.items():
        flops, moved = 2.0 * pairs * p.numel(), 4.0 * n * c * p.numel() * p.element_size() * math.ceil(n / chunk)
        seconds = flops / FLOPS[torch.float64] + moved / BANDWIDTH
        rows.append(Row(name, "vmap(jacrev)", flops, moved, seconds))
    entries = sum(p.numel() for p in parameters.values())
    largest = max(p.numel() for p in parameters.values())
    peak = 2 * chunk * c * (entries * next(iter(parameters.values())).element_size() + 8 * largest)
    return Plan("functional", choice.reason, peak, chunk, (_passes(forward, x, c, 0.0), *rows))
