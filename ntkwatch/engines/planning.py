"""The plan of a kernel: rule, cost and memory per parameter, before it is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ntkwatch.engines.auto import Choice
from ntkwatch.engines.base import Plan, Precision, Reduction, Row, at_hand, work_dtype
from ntkwatch.engines.foresight import Foresight
from ntkwatch.engines.functional import Functional, quiet, trained_at
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.machines import has_fast_double, machine, pace
from ntkwatch.engines.memory import Forward, limit_bytes
from ntkwatch.engines.prediction import predict, probes_at_hand, try_forward
from ntkwatch.engines.run import Run
from ntkwatch.engines.separation import few
from ntkwatch.engines.trial import seconds_of_kernel
from ntkwatch.model import Network, batch_size, inputs_of, take

PASSES = "forward and backward"
CONTINUED = (
    "this cannot be rehearsed without memory, so that the peak is continued from smaller blocks: mostly close, but it "
    "may be a third of what is taken, or four times as much"
)


@dataclass(frozen=True)
class Wanted:
    """What is asked of an engine: `reduction` is the one measured, rich enough for that of `layers`."""

    reduction: Reduction
    layers: Reduction | None
    precision: Precision
    chunk_size: int | None


def make_plan(choice: Choice, network: Network, x: Any, wanted: Wanted) -> Plan:
    """The plan of `choice.engine.kernel(network, x)`.

    Nothing of size n is computed, but where shapes depend on values: a pass over two blocks of the layerwise engine.
    Its passes are timed on a few probes (`trial`); only their seconds rest on that.
    """
    if isinstance(choice.engine, Layerwise):
        return _layerwise(choice, choice.engine, network, x, wanted)
    return _functional(choice, network, x, wanted)


def _layerwise(choice: Choice, engine: Layerwise, network: Network, x: Any, wanted: Wanted) -> Plan:
    n, recipe = batch_size(inputs_of(x)), engine.recipe(network, x, None)
    precision = at_hand(wanted.precision, network.device)
    run = Run(network, None, wanted.reduction, precision, recipe, wanted.layers)
    with quiet():
        forward = try_forward(run, x)
        chunk, found = (wanted.chunk_size, None) if wanted.chunk_size else engine.chunk(run, x)
        chunk = min(n, chunk)
        found = found or predict(run, x, chunk, forward)
    rounds = (-(-n // chunk) + 1) / 2  # how often a block is passed through again for the others
    passes = _passes(forward, x, network.device, found.outputs, recipe.saved * n if recipe else 0.0, rounds)
    rows = {row.name: row for row in found.rows}
    ordered = [rows.get(name, Row(name, "unused", 0.0, 0.0, 0.0)) for name in network.parameters]
    notes = _notes(network.device, wanted.precision) + (() if found.exact else (CONTINUED,))
    table = _in_wall_time([passes, *ordered], network.device)
    if recipe is not None:
        table = (_timed(table[0], run, x, chunk, rounds), *table[1:])
    return Plan(engine.name, choice.reason, found.peak, chunk, table, notes)


def _passes(forward: Forward, x: Any, device: torch.device, outputs: int, saved: float, rounds: float = 1.0) -> Row:
    """One forward and C backward passes to the activations, each about as much work as the forward.

    Where calls cost most, the backward passes are made in one.
    """
    n, some = batch_size(inputs_of(x)), few(x)
    flops = forward.flops * n / batch_size(inputs_of(some)) * (1 + outputs) * rounds
    moved = 2.0 * saved * (1 + outputs) * rounds
    at = machine(device)
    calls = forward.calls * (1 + (outputs if at.near else 1)) * rounds
    return Row(PASSES, "autograd", flops, moved, flops / at.single + moved / at.bandwidth + calls * at.call)


def _timed(passes: Row, run: Run, x: Any, chunk: int, rounds: float) -> Row:
    """With the seconds of a trial; where a few probes leave most of a device idle, no less than arithmetic takes."""
    with quiet():
        seconds = seconds_of_kernel(run, x, chunk, rounds, probes_at_hand(run, chunk))
    return replace(passes, seconds=seconds if machine(run.network.device).near else max(seconds, passes.seconds))


def _in_wall_time(rows: Iterable[Row], device: torch.device) -> tuple[Row, ...]:
    """On the threads that this process has now."""
    return tuple(replace(row, seconds=row.seconds / pace(device)) for row in rows)


def _notes(device: torch.device, precision: Precision) -> tuple[str, ...]:
    """What to know of float64 on this device."""
    if precision == "single" or has_fast_double(device):
        return ()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if at_hand(precision, device) == "single":
        return (f"{name} has no float64: products are taken in float32, and the noise floor says so",)
    return (f"float64 is slow on {name}: precision='single' is faster, at twice the noise floor",)


def _functional(choice: Choice, network: Network, x: Any, wanted: Wanted) -> Plan:
    n = batch_size(inputs_of(x))
    with torch.no_grad():
        c = network.outputs(take(x, slice(0, 1))).shape[1]
    run = Run(network, None, wanted.reduction, wanted.precision, None)
    parameters, forward = trained_at(network, None), try_forward(run, x)
    chunk = min(n, wanted.chunk_size or Functional().chunk(parameters, c, limit_bytes(network.device)))
    pairs = n * n * (c * c if wanted.reduction == "full" else c)
    rows, at = [], machine(network.device)
    for name, p in parameters.items():
        flops, moved = 2.0 * pairs * p.numel(), 4.0 * n * c * p.numel() * p.element_size() * math.ceil(n / chunk)
        seconds = flops / at.double + moved / at.bandwidth
        rows.append(Row(name, "vmap(jacrev)", flops, moved, seconds))
    dtype = work_dtype(next(iter(parameters.values())).dtype, at_hand(wanted.precision, network.device))
    peak = Foresight(network, chunk, wanted.reduction, wanted.layers, dtype, forward.noted).peak(x)
    passes, notes = _passes(forward, x, network.device, c, 0.0), _notes(network.device, wanted.precision)
    return Plan("functional", choice.reason, peak, chunk, _in_wall_time([passes, *rows], network.device), notes)
