"""The plan of a kernel: rule, cost and memory per parameter, before it is computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ntkwatch.engines.auto import Choice
from ntkwatch.engines.base import Plan, Precision, Reduction, Row
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.costs import BANDWIDTH, FLOPS
from ntkwatch.engines.functional import Functional, quiet, trained_at
from ntkwatch.engines.layerwise import Layerwise, Run
from ntkwatch.engines.memory import limit_bytes, shapes_only
from ntkwatch.engines.rehearsal import Rehearsal
from ntkwatch.engines.separation import few
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
        recipe = engine.recipe(network, x, None)
        chunk = chunk_size or engine.chunk(network, n, Run(network, None, reduction, precision, recipe))
        rows, peak, outputs = _dry_run(network, x, reduction, precision, engine, chunk)
        while chunk_size is None and peak > limit_bytes(network.device) and chunk > 1:
            chunk //= 2
            rows, peak, outputs = _dry_run(network, x, reduction, precision, engine, chunk)
    passes = _passes(network, x, outputs, recipe.saved * n if recipe else 0.0)
    found = {row.name: row for row in rows}
    ordered = [found.get(name, Row(name, "unused", 0.0, 0.0, 0.0)) for name in network.parameters]
    return Plan(engine.name, choice.reason, peak, chunk, (passes, *ordered))


def _dry_run(
    network: Network, x: Any, reduction: Reduction, precision: Precision, engine: Layerwise, chunk: int
) -> tuple[list[Row], int, int]:
    """Rows, peak and C: on fake tensors, or where the model's control flow asks for values, on a few and scaled."""
    n, recipe = batch_size(inputs_of(x)), engine.recipe(network, x, None)

    def rehearse(batch: Any, state: Mapping[str, Tensor] | None) -> Rehearsal:
        run = Rehearsal(network, state, reduction, precision, recipe)
        with run.counter:
            run.kernels(blocks(batch, chunk), None)
        return run

    if recipe is not None:
        with contextlib.suppress(Exception), shapes_only(network, x, None) as (batch, state):  # models that ask for values
            run = rehearse(batch, state)
            return list(run.rows.values()), run.counter.peak, run.outputs[0].shape[1]
    some = few(x)
    run, scale = rehearse(some, None), n / batch_size(inputs_of(some))
    rows = [
        Row(row.name, row.rule, row.flops * scale**2, row.bytes * scale**2, row.seconds * scale**2)
        for row in run.rows.values()
    ]
    return rows, math.ceil(run.counter.peak * min(scale, chunk)), run.outputs[0].shape[1]


def _passes(network: Network, x: Any, outputs: int, saved: float) -> Row:
    """One forward and C backward passes to the activations, each about as much work as the forward."""
    n, some = batch_size(inputs_of(x)), few(x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.outputs(some)
    flops = float(counter.get_total_flops()) * n / batch_size(inputs_of(some)) * (1 + outputs)
    moved = 2.0 * saved * (1 + outputs)
    return Row(PASSES, "autograd", flops, moved, flops / FLOPS[torch.float32] + moved / BANDWIDTH)


def _functional(
    choice: Choice, network: Network, x: Any, reduction: Reduction, precision: Precision, chunk_size: int | None
) -> Plan:
    n = batch_size(inputs_of(x))
    with torch.no_grad():
        c = network.outputs(take(x, slice(0, 1))).shape[1]
    parameters = trained_at(network, None)
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
    return Plan("functional", choice.reason, peak, chunk, (_passes(network, x, c, 0.0), *rows))
