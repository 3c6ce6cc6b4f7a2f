"""The plan of a kernel before its computation: rule, cost and memory per parameter, predicted by a small kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ntkwatch.engines.auto import Choice
from ntkwatch.engines.base import Plan, Precision, Reduction, Row, at_hand
from ntkwatch.engines.extrapolation import ScaledStorages, clock, extrapolate, kernel_sizes, small_block
from ntkwatch.engines.functional import Functional, quiet, trained_at
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.machines import has_fast_double, machine, pace
from ntkwatch.engines.memory import limit_bytes
from ntkwatch.engines.run import Run
from ntkwatch.model import Network, batch_size, inputs_of, take

PASSES = "forward and backward"
ROUGH = "Peak memory could not be measured on smaller batches; it is a rough estimate."
_BLOCKS = 3  # blocks of the functional engine's small kernel: two Jacobians are cached while it computes the third


@dataclass(frozen=True)
class Wanted:
    """The requested kernel; `reduction` is the computed one, which determines that of `layers`."""

    reduction: Reduction
    layers: Reduction | None
    precision: Precision
    chunk_size: int | None


def make_plan(choice: Choice, network: Network, x: Any, wanted: Wanted) -> Plan:
    """The plan of `choice.engine.kernel(network, x)`, from a small kernel of the same engine."""
    if isinstance(choice.engine, Layerwise):
        return _layerwise(choice, choice.engine, network, x, wanted)
    return _functional(choice, network, x, wanted)


def _layerwise(choice: Choice, engine: Layerwise, network: Network, x: Any, wanted: Wanted) -> Plan:
    n, points = batch_size(inputs_of(x)), engine.points(network, x, None)
    run = Run(network, None, wanted.reduction, at_hand(wanted.precision, network.device), points, wanted.layers)
    notes = _notes(network.device, wanted.precision)
    with quiet():
        chunk = min(n, wanted.chunk_size or engine.chunk(run, x))
        try:
            found = extrapolate(run, x, chunk)
        except Exception:  # models may raise anything on few probes
            return Plan(engine.name, choice.reason, int(run.rough(min(n, 2 * chunk))), chunk, (), (*notes, ROUGH))
    rounds = (-(-n // chunk) + 1) / 2  # passes per block, including repetitions for other blocks
    times, saved = (1 + found.outputs) * rounds, points.saved * n if points else 0.0
    passes = Row(PASSES, "autograd", found.forward_flops * n * times, 2.0 * saved * times, found.passes)
    rows = (found.rows.get(name, Row(name, "unused", 0.0, 0.0, 0.0)) for name in network.parameters)
    return Plan(engine.name, choice.reason, found.peak, chunk, (passes, *rows), notes)


def _notes(device: torch.device, precision: Precision) -> tuple[str, ...]:
    """Remarks about float64 on this device."""
    if precision == "single" or has_fast_double(device):
        return ()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if at_hand(precision, device) == "single":
        return (f"{name} has no float64: products are computed in float32, and the noise floor accounts for it",)
    return (f"float64 is slow on {name}: precision='single' is faster, at twice the noise floor",)


def _functional(choice: Choice, network: Network, x: Any, wanted: Wanted) -> Plan:
    n, precision = batch_size(inputs_of(x)), at_hand(wanted.precision, network.device)
    with torch.no_grad():
        c = network.outputs(take(x, slice(0, 1))).shape[1]
    parameters = trained_at(network, None)
    chunk = min(n, wanted.chunk_size or Functional().chunk(parameters, c, limit_bytes(network.device)))
    pairs, at, rows = n * n * c * (c if wanted.reduction == "full" else 1), machine(network.device), []
    for name, p in parameters.items():
        flops, moved = 2.0 * pairs * p.numel(), 4.0 * n * c * p.numel() * p.element_size() * math.ceil(n / chunk)
        seconds = (flops / at.double + moved / at.bandwidth) / pace(network.device)
        rows.append(Row(name, "vmap(jacrev)", flops, moved, seconds))
    peak, forward, seconds = _small_functional(network, x, chunk, wanted, precision)
    passes = Row(PASSES, "autograd", forward * n * (1 + c), 0.0, seconds)
    notes = _notes(network.device, wanted.precision)
    return Plan("functional", choice.reason, peak, chunk, (passes, *rows), notes)


def _small_functional(
    network: Network, x: Any, chunk: int, wanted: Wanted, precision: Precision
) -> tuple[int, float, float]:
    """Peak bytes, operations of one probe's forward pass, and seconds, from a kernel of few probes."""
    n, size = batch_size(inputs_of(x)), small_block(chunk)
    part = take(x, slice(0, min(n, size * min(_BLOCKS, -(-n // chunk)))))
    count, scale = batch_size(inputs_of(part)), chunk / size
    run = Run(network, None, wanted.reduction, precision, None, wanted.layers)
    with ScaledStorages(1.0, {}, lambda: clock(network.device)) as counter, counter.forward(), torch.no_grad():
        outputs = network.outputs(part)
    forward_flops = counter.flops
    squares = kernel_sizes(run, outputs.shape[1], size, count, (chunk / size) ** 2, (n / count) ** 2)
    counter = ScaledStorages(scale, squares, lambda: clock(network.device))
    start = clock(network.device)
    with counter, quiet():
        Functional().kernel(
            network, part, reduction=wanted.reduction, layers=wanted.layers, chunk_size=size, precision=precision
        )
    seconds = clock(network.device) - start - counter.counting
    return int(counter.peak), forward_flops / count, seconds * n / count
