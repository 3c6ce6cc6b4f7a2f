"""One line on a batch: what was taken as inputs and what as targets, by name, type and shape, and what was left."""

from __future__ import annotations

from typing import Any

from ntkwatch.model import Network
from ntkwatch.model.batch_reading import Reading, describe_inputs, describe_value, ignored_parts, name_of
from ntkwatch.probes.probeset import ProbeSet
from ntkwatch.probes.targets import describe_targets

_MANY = 3  # arguments that forward may be called without: more are not listed


def taken(network: Network, probes: ProbeSet, n_outputs: int) -> str:
    """Such as "inputs: x float32 [64, 8]; targets: item 2 of 3, int64 [64], 2 classes; ignored: item 3 of 3"."""
    reading, batch = network.reading(probes.batch), probes.batch
    if network.custom_outputs:
        inputs, left = "what outputs= (or ntk_outputs) takes of the batch", []
    else:
        inputs, left = describe_inputs(reading, network.call.signature, batch), ignored_parts(reading, batch)
    parts = [f"inputs: {inputs}", f"targets: {_targets(probes, reading, n_outputs)}"]
    if not network.custom_outputs and (unfilled := _unfilled(network, reading, batch)):
        parts.append(f"forward is called without its optional {unfilled}")
    return "; ".join([*parts, *([f"ignored: {', '.join(left)}"] if left else [])])


def _targets(probes: ProbeSet, reading: Reading, n_outputs: int) -> str:
    if probes.targets is None:
        return "none in the batch (targets= gives them)"
    where = "those given" if not probes.own or reading.target is None else name_of(probes.batch, reading.target)
    return f"{where}, {describe_value(probes.targets)}, {describe_targets(probes.targets, n_outputs)}"


def _unfilled(network: Network, reading: Reading, batch: Any) -> str:
    """Arguments of forward that items of a tuple might have been meant for."""
    if not isinstance(batch, tuple | list) or len(batch) <= len(reading.args):
        return ""
    optional = [name for name in network.call.signature.named if name not in network.call.signature.required]
    return ", ".join(optional) if len(optional) <= _MANY else ""
