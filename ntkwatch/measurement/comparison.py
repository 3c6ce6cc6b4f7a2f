"""What a measurement is compared with and judged by, or in one sentence why that is not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ntkwatch import metrics
from ntkwatch.measurement.baseline import Baseline
from ntkwatch.model.loss import LossAt
from ntkwatch.probes import ProbeSet, encode_targets


class Compared(Protocol):
    """What is read here of a Monitor."""

    baseline: Baseline | None
    loss: Callable[[Tensor, Tensor], Tensor] | str
    n_outputs: int
    path_length: float | None
    previous: tuple[int, Tensor] | None
    probes: ProbeSet
    targets: Tensor | None
    targets_reason: str | None


def targets_of(monitor: Compared, probes: ProbeSet | None) -> Tensor | str:
    """[n, C] targets of the monitor's probes, or of fresh ones."""
    targets, reason = monitor.targets, monitor.targets_reason
    if probes is not None:
        targets, reason = encode_targets(probes.targets, monitor.n_outputs)
    return targets if targets is not None else (reason or "there are no targets")


def loss_at(monitor: Compared, outputs: Tensor, probes: ProbeSet | None) -> LossAt | str:
    """The loss at outputs [n, C] of the monitor's probes, or of fresh ones."""
    raw = (probes or monitor.probes).targets
    if isinstance(monitor.loss, str):
        return monitor.loss
    return LossAt(monitor.loss, outputs.detach().double(), raw) if raw is not None else "the batch holds no targets"


def previous_kernel(monitor: Compared, probes: ProbeSet | None) -> tuple[int, Tensor] | str:
    """The step and kernel of the measurement before this one."""
    if probes is not None:
        return "resample=True: kernels on different inputs are not compared"
    return monitor.previous or "first probe: there is no earlier kernel to compare with"


def path_length(monitor: Compared, kernel: Tensor, previous: tuple[int, Tensor] | str) -> float | str:
    """The sum of the angles between successive kernels, up to `kernel`."""
    if isinstance(previous, str):
        return 0.0 if monitor.baseline is None else previous
    if monitor.path_length is None:
        return "the path before this process was not followed"
    angle = float(metrics.kernel_angle(kernel, previous[1]))
    if math.isfinite(angle):
        return monitor.path_length + angle
    return metrics.why_undefined("kernel_angle", kernel, previous[1]) or "it is not finite"
