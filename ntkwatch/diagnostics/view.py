"""What one probe has seen → the numbers it reports: a table of named functions that can be asked.

A diagnostic is a function of a `View`. It returns a number, or raises `Undefined` with the reason, which a NaN from
`ntkwatch.metrics` is turned into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.metrics.undefined import Undefined


@dataclass(frozen=True)
class Motion:
    """How the outputs and parameters moved since the baseline, at the baseline's BatchNorm statistics.

    delta_f, j0_delta_theta: [n, C]; how: which differentiation gave J_0 Δθ.
    """

    delta_f: Tensor
    j0_delta_theta: Tensor
    how: str


@dataclass(frozen=True)
class View:
    """Everything that one probe has measured; what the diagnostics are functions of.

    kernel, kernel_0: in the run's reduction. trace, trace_0: [n, n], what alignment is defined on.
    layers, layers_0: parameter name -> [n, n]. relative_floor: the noise floor of the eigenvalues over λ_max.
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

    def known_targets(self) -> Tensor:
        """[n, C]; raises `Undefined` with the reason where there are none."""
        if isinstance(self.targets, str):
            raise Undefined(self.targets)
        return self.targets


def _ask(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The metric of that name, with its reason raised where it is undefined."""
    value = getattr(metrics, name)(*args, **kwargs)
    if not torch.isfinite(value):
        raise Undefined(metrics.why_undefined(name, *args, **kwargs) or "it is not finite")
    return value


def _motion_of_kernel(name: str) -> Callable[[View], Tensor]:
    return lambda view: _ask(name, view.kernel, view.kernel_0)


def _of_spectrum(name: str) -> Callable[[View], Tensor]:
    return lambda view: _ask(name, view.eigenvalues, floor=view.floor)


def kernel_velocity(view: View) -> Tensor:
    """angle(K_t, K_previous) / (steps between them)."""
    if isinstance(view.previous, str):
        raise Undefined(view.previous)
    step, kernel = view.previous
    if step == view.step:
        raise Undefined("no step has passed since the previous probe")
    return _ask("kernel_angle", view.kernel, kernel) / (view.step - step)


def centered_alignment(view: View) -> Tensor:
    """CKA of the [n, n] kernel with the targets."""
    return _ask("centered_alignment", view.square, view.known_targets())


def centered_alignment_z(view: View) -> Tensor:
    """The alignment against 200 label permutations, the same ones at every step."""
    generator = torch.Generator().manual_seed(view.seed)
    return _ask("alignment_z", view.square, view.known_targets(), generator)


def log10_lambda(index: int) -> Callable[[View], Tensor]:
    """log10 of the index-th largest eigenvalue (from 1)."""

    def compute(view: View) -> Tensor:
        if index > len(view.eigenvalues):
            raise Undefined(f"the kernel has only {len(view.eigenvalues)} eigenvalues")
        value = view.eigenvalues[index - 1]
        if value <= view.floor:
            raise Undefined(f"eigenvalue {index} is below the noise floor {view.floor:.1e}")
        return torch.log10(value)

    return compute


def taylor_ratio(view: View) -> Tensor:
    """‖Δf − J_0Δθ‖ / (‖Δf‖ + ‖J_0Δθ‖), undefined while nothing has moved."""
    motion = view.motion
    if isinstance(motion, str):
        raise Undefined(motion)
    resolution = 100 * torch.finfo(view.outputs.dtype).eps * float(view.outputs.double().norm())
    if float(motion.delta_f.norm()) <= resolution:
        raise Undefined("no motion yet: the outputs have not moved beyond rounding since the baseline")
    return _ask("taylor_ratio", motion.delta_f, motion.j0_delta_theta)


def parameter_distance(view: View) -> float:
    """‖θ_t − θ_0‖ / ‖θ_0‖ over all trained parameters."""
    return _ratio(view, view.layers)


def _ratio(view: View, names: Mapping[str, object] | Sequence[str]) -> float:
    if isinstance(view.parameter_distances, str):
        raise Undefined(view.parameter_distances)
    moved = math.hypot(*(view.parameter_distances[name][0] for name in names))
    start = math.hypot(*(view.parameter_distances[name][1] for name in names))
    if start == 0:
        raise Undefined("the parameters started at zero")
    return moved / start


def statistics_shift(view: View) -> float:
    """‖f(θ_t, s_t) − f(θ_t, s_0)‖ / ‖f(θ_t, s_0)‖: what BatchNorm's running statistics alone changed."""
    assert view.statistics_outputs is not None
    frozen = view.outputs.double()
    if float(frozen.norm()) == 0:
        raise Undefined("the outputs are zero")
    return float((view.statistics_outputs.double() - frozen).norm() / frozen.norm())


def statistics_angle(view: View) -> Tensor:
    """Kernel angle between the run's own and the baseline's BatchNorm statistics, at θ_t."""
    assert view.statistics_kernel is not None
    return _ask("kernel_angle", view.statistics_kernel, view.kernel)


@dataclass(frozen=True)
class Diagnostic:
    """One named number. `when` tells whether the name exists for a model (BatchNorm has its own)."""

    compute: Callable[[View], Tensor | float]
    default: bool = True
    when: Callable[[View], bool] = lambda view: True


def _has_statistics(view: View) -> bool:
    return view.statistics_outputs is not None


DIAGNOSTICS: dict[str, Diagnostic] = {
    **{
        name: Diagnostic(_motion_of_kernel(name))
        for name in ("kernel_distance", "kernel_angle", "kernel_scale", "relative_change")
    },
    "kernel_velocity": Diagnostic(kernel_velocity),
    "centered_alignment": Diagnostic(centered_alignment),
    "centered_alignment_z": Diagnostic(centered_alignment_z),
    "effective_rank": Diagnostic(_of_spectrum("effective_rank")),
    "log10_lambda_max": Diagnostic(log10_lambda(1)),
    **{f"log10_lambda_{i}": Diagnostic(log10_lambda(i)) for i in range(1, 6)},
    "taylor_ratio": Diagnostic(taylor_ratio),
    "parameter_distance": Diagnostic(parameter_distance),
    "statistics_shift": Diagnostic(statistics_shift, when=_has_statistics),
    "statistics_angle": Diagnostic(statistics_angle, when=_has_statistics),
    "participation_ratio": Diagnostic(_of_spectrum("participation_ratio"), default=False),
    "stable_rank": Diagnostic(_of_spectrum("stable_rank"), default=False),
}


def select(diagnostics: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the preset "default" or "full", or of the list given, in the table's order.

    Raises ValueError naming what is unknown.
    """
    if diagnostics == "full":
        return tuple(DIAGNOSTICS)
    if diagnostics == "default":
        return tuple(name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.default)
    wanted = [diagnostics] if isinstance(diagnostics, str) else list(diagnostics)
    unknown = [name for name in wanted if name not in DIAGNOSTICS]
    if unknown:
        raise ValueError(
            f"unknown diagnostics {unknown}: use 'default', 'full', or a list of names out of {', '.join(DIAGNOSTICS)}"
        )
    return tuple(name for name in DIAGNOSTICS if name in wanted)


def evaluate(names: Sequence[str], view: View) -> tuple[dict[str, float | None], dict[str, str]]:
    """(values, reasons): every name that exists for this model; an undefined one is None and has a reason."""
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name in names:
        diagnostic = DIAGNOSTICS[name]
        if diagnostic.when(view):
            values[name], reason = _defined(partial(diagnostic.compute, view))
            if reason is not None:
                reasons[name] = reason
    return values, reasons


def _defined(compute: Callable[[], Tensor | float]) -> tuple[float | None, str | None]:
    try:
        value = float(compute())
    except (Undefined, ValueError) as gap:  # ValueError: a kernel that a metric refuses, such as an indefinite one
        return None, str(gap)
    return (value, None) if math.isfinite(value) else (None, "it is not finite")


def layer_metrics(view: View) -> dict[str, dict[str, float | None]]:
    """Module name -> share of the trace, kernel angle, alignment and parameter distance of its own parameters."""
    modules: dict[str, list[str]] = {}
    for name in view.layers:
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {module: _layer(view, names) for module, names in modules.items()}


def _layer(view: View, names: Sequence[str]) -> dict[str, float | None]:
    kernel, start = (sum((k[name] for name in names), torch.zeros(())) for k in (view.layers, view.layers_0))
    computed: dict[str, Callable[[], Tensor | float]] = {
        "share": lambda: kernel.trace() / view.trace.trace(),
        "angle": lambda: _ask("kernel_angle", kernel, start),
        "alignment": lambda: _ask("centered_alignment", kernel, view.known_targets()),
        "parameter_distance": lambda: _ratio(view, names),
    }
    return {name: _defined(compute)[0] for name, compute in computed.items()}
