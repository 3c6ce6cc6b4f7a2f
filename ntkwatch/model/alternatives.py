"""A batch that a model does not take as it is read: which of its parts the model does run on, as code to pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.guard import leave_no_trace
from ntkwatch.model.batch import leaves, raw_of
from ntkwatch.model.batch_reading import Place, Reading, as_python, as_tensor, at, describe_inputs, places_of_tensors
from ntkwatch.model.module import Network
from ntkwatch.model.output import as_output


def alternative_call(network: Network, batch: Any) -> str | None:
    """What to pass where a batch was taken otherwise than the model takes it; None where nothing else works either."""
    value = raw_of(batch)
    if network.custom_outputs or not isinstance(value, Mapping | tuple | list):
        return None
    if (found := _first_working_call(network, value)) is None:
        return None
    name, reading = found
    code, target = reading.code().replace("model(", f"{name}(", 1), _likely_target(value, reading)
    said = f", targets=lambda batch: {as_python(target)}" if target is not None else ""
    return f"outputs=lambda model, batch: {code}" + (f" (and to a monitor{said})" if said else "")


def describe_reading(network: Network, batch: Any) -> str:
    """What was taken as the model's inputs, in words."""
    return describe_inputs(network.reading(batch), network.call.signature, raw_of(batch))


def _first_working_call(network: Network, value: Any) -> tuple[str, Reading] | None:
    """The first way of calling the model, or a part of it where it has no forward, that gives a row per example.

    None where the model runs as it is called: then it failed for another reason.
    """
    with leave_no_trace(network.module), torch.no_grad():
        if _gives_rows(network.module, network.reading(value), value):
            return None
        for reading in _candidate_readings(value, len(network.call.signature.required)):
            for name, module in _callables(network.module):
                if _gives_rows(module, reading, value):
                    return name, reading
    return None


def _callables(module: nn.Module) -> list[tuple[str, nn.Module]]:
    if getattr(module.forward, "__name__", "") != "_forward_unimplemented" and not _lacks_forward(module):
        return [("model", module)]
    return [(f"model.{name}", child) for name, child in module.named_children()]


def _lacks_forward(module: nn.Module) -> bool:
    """Whether forward is the one of LightningModule, which only raises."""
    return getattr(module.forward, "__qualname__", "") == "LightningModule.forward"


def _candidate_readings(value: Any, required: int) -> Iterator[Reading]:
    """One part alone; then as many as forward requires, in the order of the batch."""
    places = list(places_of_tensors(value))
    yield from (Reading((place,)) for place in places)
    if 1 < required <= len(places):
        yield Reading(tuple(places[:required]))


def _gives_rows(module: nn.Module, reading: Reading, value: Any) -> bool:
    """Whether the call gives real numbers, a row for each of its first argument's."""
    first = next((leaf for leaf in leaves(reading.inputs(value)) if isinstance(leaf, Tensor)), None)
    try:
        f = as_output(reading.call(module, value)).tensor
    except Exception:
        return False
    return first is not None and first.ndim > 0 and f.is_floating_point() and f.ndim in (1, 2) and len(f) == len(first)


def _likely_target(value: Any, reading: Reading) -> Place | None:
    """A part that may be the target: the first that does not go in, of as many rows."""
    used = {place[:1] for place in reading.args}
    n = len(at(value, reading.args[0]))
    keys = list(value) if isinstance(value, Mapping) else range(len(value))
    rows = {(key,): as_tensor(value[key]) for key in keys if (key,) not in used}
    return next((place for place, t in rows.items() if t is not None and t.ndim and len(t) == n), None)
