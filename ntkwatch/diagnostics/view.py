"""What one probe has seen: kernels, targets and motion, and what can still be asked of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.metrics.undefined import Undefined
from ntkwatch.model.loss import LossAt
from ntkwatch.model.optimizer import UpdateRule
from ntkwatch.record import Limit

if TYPE_CHECKING:
    from ntkwatch.diagnostics.evaluations import Instruments

T = TypeVar("T")


@dataclass(frozen=True)
class Motion:
    """How the outputs and parameters moved since the baseline, at the baseline's BatchNorm statistics.

    delta_f, j0_delta_theta: [n, C]; how: which differentiation gave J_0 Δθ. f_rounding, j_rounding: [n, C], estimates
    of the rounding errors of f_0 and J_0 Δθ; rounded_to: the type that makes them.
    """

    delta_f: Tensor
    j0_delta_theta: Tensor
    how: str
    f_rounding: Tensor
    j_rounding: Tensor
    rounded_to: str


@dataclass(frozen=True)
class View:
    """Everything that one probe has measured; what the diagnostics are functions of. A string is why it is not there.

    kernel, kernel_0: in the run's reduction. trace: [n, n], what alignment is defined on. theta: [n, C, n, C] and
    blocks: [C, n, n], where a diagnostic asked for them. layers, layers_0: parameter name -> [n, n].
    relative_floor: the noise floor of the eigenvalues over λ_max. path_length: Σ angle up to this probe.
    f_lazy: outputs [n, C] of the linear forecast; lazy_start: its gradient_error. nngp: the analytic NNGP kernel
    [m, m] of some of the probes, and which, [m]. instruments: what else the model can be asked, inside the guard.
    limit: K_∞ on some of the probes.
    """

    step: int
    kernel: Tensor
    kernel_0: Tensor
    trace: Tensor
    layers: Mapping[str, Tensor]
    layers_0: Mapping[str, Tensor]
    outputs: Tensor
    relative_floor: float
    previous: tuple[int, Tensor] | str
    targets: Tensor | str
    motion: Motion | str
    parameter_distances: Mapping[str, tuple[float, float]] | str
    statistics_kernel: Tensor | None = None
    statistics_outputs: Tensor | None = None
    seed: int = 0
    theta: Tensor | str = "the full kernel was not measured"
    blocks: Tensor | str = "the class blocks were not measured"
    path_length: float | str = "the path was not followed"
    loss: LossAt | str = "no loss is known"
    optimizer: UpdateRule | str = "no optimizer is known"
    f_lazy: Tensor | str = "no forecast is attached"
    lazy_start: float | str = "no forecast is attached"
    nngp: tuple[Tensor, Tensor] | str = "no NNGP kernel is known"
    instruments: Instruments | None = None
    start_step: int = 0
    limit: Limit | str = "the infinite-width limit was not computed"

    @cached_property
    def spectrum(self) -> Tensor:
        """Eigenvalues descending, as computed; of Θ as [nC, nC] for the full reduction, else of `square`."""
        side = math.isqrt(self.kernel.numel())
        matrix = self.kernel.reshape(side, side) if self.kernel.ndim == 4 else self.square
        return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)

    @property
    def floor(self) -> float:
        """Eigenvalues below this are rounding noise of the factors."""
        return self.relative_floor * float(self.spectrum[0].clamp(min=0))

    @property
    def eigenvalues(self) -> Tensor:
        """The spectrum with noise below zero set to zero; ValueError where it is more than noise."""
        return metrics.eigenvalues(self.spectrum, floor=self.floor)

    @property
    def square(self) -> Tensor:
        """[n, n]: the kernel itself where it is one, else its trace reduction."""
        return self.kernel if self.kernel.ndim == 2 else self.trace

    @property
    def square_0(self) -> Tensor:
        """`square` of the baseline."""
        return self.kernel_0 if self.kernel_0.ndim == 2 else self.trace_0

    @cached_property
    def trace_0(self) -> Tensor:
        """[n, n]: the baseline's trace kernel, the sum of its layers."""
        return torch.stack(list(self.layers_0.values())).sum(0)

    @property
    def square_floor(self) -> float:
        """The noise floor of `square`."""
        if self.kernel.ndim == 2:
            return self.floor
        return self.relative_floor * float(torch.linalg.eigvalsh(self.square)[-1].clamp(min=0))

    @cached_property
    def full_spectrum(self) -> Tensor:
        """Eigenvalues of Θ [nC], descending, noise below zero set to zero; raises `Undefined` where Θ is not there."""
        theta = known(self.theta)
        side = math.isqrt(theta.numel())
        spectrum = torch.linalg.eigvalsh(theta.reshape(side, side)).flip(0)
        return metrics.eigenvalues(spectrum, floor=self.relative_floor * float(spectrum[0].clamp(min=0)))

    @property
    def full_floor(self) -> float:
        """The noise floor of Θ."""
        return self.relative_floor * float(self.full_spectrum[0])

    @cached_property
    def baseline_outputs(self) -> Tensor:
        """f_0 [n, C] float64; the outputs themselves at the baseline."""
        if self.step == self.start_step and isinstance(self.motion, str):
            return self.outputs.double()
        return self.outputs.double() - known(self.motion).delta_f

    @property
    def labels(self) -> Tensor:
        """The targets [n, C] where they are classes; raises `Undefined` where they are values."""
        y = known(self.targets)
        if not bool(((y == 0) | (y.abs() == 1)).all()):
            raise Undefined("the targets are values, not classes")
        return y

    def ask_model(self) -> Instruments:
        """The instruments; raises `Undefined` where the model is not at hand."""
        if self.instruments is None:
            raise Undefined("the model is not at hand")
        return self.instruments


def known(value: T | str) -> T:
    """The value; raises `Undefined` with the reason where there is only one."""
    if isinstance(value, str):
        raise Undefined(value)
    return value


def ask(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The metric of that name (0-d), with its reason raised where it is undefined."""
    value: Tensor = getattr(metrics, name)(*args, **kwargs)
    if not torch.isfinite(value):
        raise Undefined(metrics.why_undefined(name, *args, **kwargs) or "it is not finite")
    return value


def ask_vector(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The metric of that name where it is a vector; undefined unless all of it is finite."""
    value: Tensor = getattr(metrics, name)(*args, **kwargs)
    if not bool(torch.isfinite(value).all()):
        raise Undefined(metrics.why_undefined(name, *args, **kwargs) or "it is not finite")
    return value
