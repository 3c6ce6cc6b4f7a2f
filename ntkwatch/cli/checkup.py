"""`ntkwatch doctor`: how a model's kernel would be measured, at what cost, and what stands in the way."""

from __future__ import annotations

import importlib.util
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ntkwatch import costs
from ntkwatch.diagnostics import select
from ntkwatch.engines.base import Reduction, at_hand, noise_floor
from ntkwatch.engines.memory import free_bytes
from ntkwatch.guard import leave_no_trace
from ntkwatch.limit import wide_limit
from ntkwatch.misfits import check_batch, why_not
from ntkwatch.model import Network, UnsupportedModel
from ntkwatch.statistics import running_statistics, untracked_statistics

LONGEST = 400  # characters of somebody else's error
SLOW_PROBE = 30.0  # seconds: the callback says so before it starts


class FactoryError(ValueError):
    """FILE:FACTORY that does not lead to (model, batch): what, got, do this."""


def check(
    spec: str, reduction: str = "trace", diagnostics: Sequence[str] = ("default",), width: int = 80
) -> tuple[list[str], bool]:
    """(lines to print, whether it can be measured) for FILE:FACTORY; raises FactoryError where that fails.

    width: columns that the table of costs may take.
    """
    if reduction not in ("trace", "sum", "blocks", "full"):
        raise FactoryError(f"--reduction {reduction} is unknown: use trace, sum, blocks or full")
    try:
        select(diagnostics)
    except ValueError as error:
        raise FactoryError(f"--diagnostics: {error}") from error
    model, batch = load(spec)
    lines: list[str] = []
    try:
        check_batch(batch)
    except ValueError as error:
        return [f"PROBLEM  {error}"], False
    try:
        network = Network(model)
        with leave_no_trace(network.module), torch.no_grad():
            outputs = network.outputs(network.batch(batch))
        lines = _facts(network, batch, outputs)
        bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
        if bad:
            return [*lines, f"PROBLEM  the outputs are not finite on {bad} of {len(outputs)} probes"], False
        plan = costs.plan(model, batch, reduction=cast(Reduction, reduction), diagnostics=diagnostics)
    except (UnsupportedModel, MemoryError) as error:
        return [*lines, f"PROBLEM  {error}"], False
    except Exception as error:  # whatever the model raises on its batch
        why = why_not(network, batch, error)
        return [*lines, f"PROBLEM  {why or f'the model raised {_where(error)} on this batch'}"], False
    problems = _problems(plan, outputs.device)
    return [*lines, "", plan.text(width), "", *(problems or ["It can be measured as it is."])], not problems


def load(spec: str) -> tuple[nn.Module, Any]:
    """FACTORY() of FILE:FACTORY, which returns (model, batch)."""
    file, colon, name = spec.rpartition(":")
    path = Path(file)
    if not colon or not name or not path.is_file():
        why = f"there is no file {file}; " if colon and name else ""
        raise FactoryError(
            f"{spec} does not name a factory: {why}give FILE:FACTORY, for example train.py:model_and_batch"
        )
    factory = getattr(_module(path), name, None)
    if not callable(factory):
        raise FactoryError(f"{path} has no function {name}: define one that returns (model, batch)")
    try:
        made = factory()
    except Exception as error:
        raise FactoryError(f"{name}() in {path} raised {_where(error)}") from error
    if not (isinstance(made, tuple | list) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise FactoryError(f"{name}() returned {_kind(made)}: it must return (model, batch), an nn.Module and a batch")
    return made[0], made[1]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_ntkwatch_doctor_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FactoryError(f"{path} is not a Python file: give FILE:FACTORY, for example train.py:model_and_batch")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FactoryError(f"{path} cannot be imported: {_where(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _where(error: Exception) -> str:
    """The error and the line that raised it, in one line: the last that is not torch's own, where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parent.parent)
    theirs = [f for f in frames if "/torch/" not in f.filename.replace(os.sep, "/") and not f.filename.startswith(own)]
    last = (theirs or list(frames))[-1]
    return f"{type(error).__name__}: {_in_one_line(str(error))} (line {last.lineno} of {Path(last.filename).name})"


def _in_one_line(message: str) -> str:
    """Its lines one after the other, and not more of them than can be read."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return textwrap.shorten(" / ".join(lines), LONGEST, placeholder=" …") or "no message"


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value)}"
    return type(value).__name__


def _facts(network: Network, batch: Any, outputs: torch.Tensor) -> list[str]:
    targets = network.targets(batch)
    count = sum(p.numel() for p in network.parameters.values())
    tensors = f"{len(network.parameters)} tensor{'s' * (len(network.parameters) != 1)}"
    return [
        f"model      {type(network.module).__name__}, {count:,} trained parameters in {tensors}, on {network.device}",
        f"outputs    {list(outputs.shape)} {str(outputs.dtype).removeprefix('torch.')}",
        f"targets    {f'{list(targets.shape)} {targets.dtype}' if targets is not None else NO_TARGETS}",
        f"mode       {_mode(network.module)}",
        f"precision  {_precision(network, outputs)}",
        f"limit      {_limit(network, batch)}",
    ]


NO_TARGETS = "none in the batch: alignment will be undefined (targets= gives them)"


def _limit(network: Network, batch: Any) -> str:
    """Whether K_0 has an infinite-width limit to be compared with, and how signals pass the network."""
    with leave_no_trace(network.module):
        return str(wide_limit(network, batch, calibrated=untracked_statistics(network.module)))


def _precision(network: Network, outputs: torch.Tensor) -> str:
    precision = at_hand("double", outputs.device)
    floor = noise_floor(network.rounding(outputs.dtype), precision)
    products = "float64" if precision == "double" else "float32"
    return f"{products} products; eigenvalues below {floor:.1e} of the largest are rounding of the factors"


def _mode(module: nn.Module) -> str:
    """What evaluation mode does to this model."""
    said = ["eval"]
    dropouts = sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules())
    if dropouts:
        said.append(f"{dropouts} Dropout layer{'s are' if dropouts > 1 else ' is'} off")
    if untracked_statistics(module):
        said.append("BatchNorm has seen no batch: the baseline's statistics are calibrated on the probes")
    elif running_statistics(module):
        said.append("BatchNorm's statistics are frozen at the baseline")
    return "; ".join(said)


def _problems(plan: Any, device: torch.device) -> list[str]:
    problems = []
    free = free_bytes(device)
    if plan.peak_bytes > free:
        problems.append(
            f"PROBLEM  it needs {plan.peak_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} are free: use fewer probes, "
            "another reduction, or a smaller chunk_size"
        )
    if plan.seconds > SLOW_PROBE:
        problems.append(f"PROBLEM  a probe takes about {plan.seconds:.0f} s: use fewer probes or a sparser every=")
    return problems
