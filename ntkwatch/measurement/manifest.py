"""The manifest of a run: what a reader must know about model, probes and engine to understand the numbers."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ntkwatch.diagnostics import needs_limit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ntkwatch.engines.auto import Choice
    from ntkwatch.engines.base import Kernel, Reduction
    from ntkwatch.measurement.infinite_limit import WideLimit
    from ntkwatch.model import Network
    from ntkwatch.probes import ProbeSet

DISTRIBUTIONS = ("ntkwatch", "torch", "lightning", "pytorch-lightning")


class Described(Protocol):
    """What the manifest says of a Monitor."""

    model: nn.Module
    network: Network
    probes: ProbeSet
    choice: Choice | None
    n_outputs: int
    reduction: Reduction
    hparams: dict[str, Any]
    seed: int
    diagnostics: tuple[str, ...]
    calibration: str | None
    statistics: dict[str, Tensor]
    limit: WideLimit


def describe(monitor: Described) -> dict[str, Any]:
    """Primitives only, for the record and the loggers; complete once the monitor has chosen its engine."""
    probes, choice, network = monitor.probes, monitor.choice, monitor.network
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "model": type(monitor.model).__name__,
        "parameters": list(network.parameters),
        "n_parameters": sum(p.numel() for p in network.parameters.values()),
        "n_outputs": monitor.n_outputs,
        "probes": {
            "n": len(probes),
            "source": probes.source,
            "how": probes.how,
            "indices": list(probes.indices) if probes.indices is not None else None,
            "hash": probes.hash,
            "targets_hash": probes.targets_hash,
        },
        "reduction": monitor.reduction,
        "engine": choice.engine.name if choice is not None else None,
        "engine_reason": choice.reason if choice is not None else None,
        "mode": "eval",
        "precision": "double",
        "hparams": monitor.hparams,
        "seed": monitor.seed,
        "diagnostics": list(monitor.diagnostics),
        "baseline": monitor.calibration,
        "infinite": str(monitor.limit) if needs_limit(monitor.diagnostics) else None,
    }


def optimizers(known: Sequence[Any]) -> dict[str, list[str]]:
    """The manifest's entry on the run's optimizers, by their classes; nothing where none is known."""
    names = [type(optimizer).__name__ for optimizer in known if optimizer is not None]
    return {"optimizer": names} if names else {}


def context(
    monitor: Described, kernel: Kernel, floor: float | None, probes: ProbeSet | None
) -> dict[str, str | int | float | bool | None]:
    """What one measurement's numbers are numbers of."""
    return {
        "reduction": kernel.reduction,
        "engine": kernel.engine,
        "mode": "eval",
        "precision": kernel.precision,
        "dtype": str(kernel.outputs.dtype).removeprefix("torch."),
        "noise_floor": floor,
        "probe_hash": (probes or monitor.probes).hash,
        "statistics": "none" if not monitor.statistics else "calibrated" if monitor.calibration else "baseline",
    }


def not_finite(monitor: Described, kernel: Kernel) -> tuple[dict[str, float | None], dict[str, str]]:
    """(values, reasons) of a probe whose kernel is not finite: nothing is defined, and why."""
    bad = int((~torch.isfinite(kernel.outputs)).any(dim=1).sum())
    what = f"the outputs are not finite on {bad} of {len(kernel.outputs)} probes" if bad else "its gradients overflow"
    names = [name for name in monitor.diagnostics if not name.startswith("statistics_") or monitor.statistics]
    return dict.fromkeys(names), dict.fromkeys(names, f"the kernel is not finite: {what}")


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
