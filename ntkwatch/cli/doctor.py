"""`ntkwatch doctor`: how a model's kernel would be measured, at what cost, and what stands in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn

from ntkwatch.cli.factory import Factory, FactoryError, describe_error
from ntkwatch.diagnostics import select
from ntkwatch.engines import Plan
from ntkwatch.engines.base import Reduction, at_hand, noise_floor
from ntkwatch.engines.memory import free_bytes
from ntkwatch.guard import leave_no_trace
from ntkwatch.measurement import cost as costs
from ntkwatch.measurement.arguments import REDUCTIONS
from ntkwatch.measurement.infinite_limit import wide_limit
from ntkwatch.model import Network, UnsupportedModel, take
from ntkwatch.model.batch import raw_of
from ntkwatch.model.batch_statistics import running_statistics, untracked_statistics
from ntkwatch.model.errors import check_batch, explain_failure
from ntkwatch.probes import ProbeSet, taken

SLOW_PROBE = 30.0  # seconds: the callback says so before it starts


@dataclass
class DoctorReport:
    """What is known of the model, the plan of a probe, and the problems: none where it can be measured as it is."""

    facts: dict[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    problems: list[str] = field(default_factory=list)

    def lines(self, width: int) -> list[str]:
        """For people; width: columns that the table of costs may take."""
        lines = [f"{name:<9}  {fact}" for name, fact in self.facts.items()]
        lines += ["", self.plan.text(width), ""] if self.plan is not None else []
        return [*lines, *([f"PROBLEM  {each}" for each in self.problems] or ["It can be measured as it is."])]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        plan = None if self.plan is None else {**asdict(self.plan), "seconds": self.plan.seconds}
        return {"measurable": not self.problems, "problems": self.problems, "facts": self.facts, "plan": plan}


@dataclass(frozen=True)
class DoctorOptions:
    """What the callback would be given."""

    reduction: str = "trace"
    diagnostics: Sequence[str] = ("default",)
    probes: int = 64
    outputs: str | None = None
    targets: str | None = None

    def check(self) -> None:
        """Raises FactoryError for a value that the callback would not take."""
        if self.reduction not in REDUCTIONS:
            raise FactoryError(f"--reduction {self.reduction} is unknown: use one of {', '.join(REDUCTIONS)}")
        if self.probes < 2:
            raise FactoryError(f"--probes {self.probes} is too few: use 2 or more")
        try:
            select(self.diagnostics)
        except ValueError as error:
            raise FactoryError(f"--diagnostics: {error}") from error


@dataclass(frozen=True)
class NamedArguments:
    """What `--outputs` and `--targets` name."""

    outputs: Any
    targets: Any

    @classmethod
    def by(cls, factory: Factory, asked: DoctorOptions) -> NamedArguments:
        """Raises FactoryError where a name leads to nothing."""
        outputs = factory.named("--outputs", asked.outputs)
        if outputs is not None and not callable(outputs):
            raise FactoryError(
                f"--outputs {asked.outputs} is a {type(outputs).__name__}: name a callable (model, batch)"
            )
        return cls(outputs, factory.named("--targets", asked.targets))


def examine(spec: str, asked: DoctorOptions) -> DoctorReport:
    """The checkup of what FILE:FACTORY returns; raises FactoryError where a name leads to nothing."""
    asked.check()
    factory = Factory(spec)
    given = NamedArguments.by(factory, asked)
    model, batch = factory.build()
    done = DoctorReport()
    try:
        check_batch(batch)
        network = Network(model, given.outputs)
    except (UnsupportedModel, ValueError) as error:
        done.problems.append(str(error))
        return done
    try:
        _run_model(done, network, batch, asked, given)
    except (UnsupportedModel, MemoryError) as error:
        done.problems.append(str(error))
    except Exception as error:  # whatever the model raises on its batch
        done.problems.append(
            explain_failure(network, batch, error) or f"the model raised {describe_error(error)} on this batch"
        )
    return done


def _run_model(done: DoctorReport, network: Network, batch: Any, asked: DoctorOptions, given: NamedArguments) -> None:
    with leave_no_trace(network.module), torch.no_grad():
        settled = network.batch(batch)
        few = raw_of(take(settled, slice(0, asked.probes))) if settled.n > asked.probes else batch
        f = network.outputs(network.batch(few))
    done.facts |= _facts(network, f)
    done.facts["batch"] = _describe_batch(done, network, few, given.targets, f.shape[1])
    done.facts["probes"] = f"{asked.probes}, as the callback takes them: {_rows(settled.n, asked.probes)}"
    done.facts["limit"] = _limit(network, few)
    if bad := int((~torch.isfinite(f)).any(dim=1).sum()):
        done.problems.append(f"the outputs are not finite on {bad} of {len(f)} probes")
        return
    done.plan = _plan(network, take(settled, [i % settled.n for i in range(asked.probes)]), asked, given)
    done.problems += _excessive_costs(done.plan, f.device)


def _plan(network: Network, batch: Any, asked: DoctorOptions, given: NamedArguments) -> Plan:
    reduction = cast(Reduction, asked.reduction)
    return costs.plan(network.module, batch, reduction=reduction, outputs=given.outputs, diagnostics=asked.diagnostics)


def _rows(n: int, wanted: int) -> str:
    if n == wanted:
        return "the rows of the batch"
    return f"the batch's {n} rows, repeated for the costs" if n < wanted else f"the first of the batch's {n} rows"


def _describe_batch(done: DoctorReport, network: Network, batch: Any, targets: Any, n_outputs: int) -> str:
    """What was taken as inputs and as targets; targets= that do not fit are a problem."""
    with leave_no_trace(network.module):
        try:
            probes = ProbeSet.of(batch, targets)
        except Exception as error:
            done.problems.append(f"--targets: {error if isinstance(error, ValueError) else describe_error(error)}")
            probes = ProbeSet.of(batch)
        return taken(network, probes.for_network(network), n_outputs)


def _facts(network: Network, outputs: torch.Tensor) -> dict[str, str]:
    count = sum(p.numel() for p in network.parameters.values())
    tensors = f"{len(network.parameters)} tensor{'s' * (len(network.parameters) != 1)}"
    return {
        "model": f"{type(network.module).__name__}, {count:,} trained parameters in {tensors}, on {network.device}",
        "outputs": f"{list(outputs.shape)} {str(outputs.dtype).removeprefix('torch.')}",
        "mode": _mode(network.module),
        "precision": _precision(network, outputs),
    }


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


def _excessive_costs(plan: Plan, device: torch.device) -> list[str]:
    problems = []
    free = free_bytes(device)
    if plan.peak_bytes > free:
        problems.append(
            f"it needs {plan.peak_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} are free: use fewer probes, "
            "another reduction, or a smaller chunk_size"
        )
    if plan.seconds > SLOW_PROBE:
        problems.append(f"a probe takes about {plan.seconds:.0f} s: use fewer probes or a sparser every=")
    return problems
