"""Error bars of the headline numbers over probes: the delete-one jackknife, never a bootstrap of Gram rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Compute, Diagnostic, Price
from ntkwatch.diagnostics.laziness import taylor_ratio
from ntkwatch.diagnostics.view import View, known
from ntkwatch.metrics.undefined import Undefined

Arguments = tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]


def _angle(view: View) -> Arguments:
    return metrics.kernel_angle, (view.kernel, view.kernel_0), ()


def _scale(view: View) -> Arguments:
    return metrics.kernel_scale, (view.kernel, view.kernel_0), ()


def _alignment(view: View) -> Arguments:
    return metrics.centered_alignment, (view.square,), (known(view.targets),)


def _taylor(view: View) -> Arguments:
    taylor_ratio(view)  # where it is undefined, so is its error
    motion = known(view.motion)
    return metrics.taylor_ratio, (), (motion.delta_f, motion.j0_delta_theta)


HEADLINES = {
    "kernel_angle": _angle,
    "kernel_scale": _scale,
    "centered_alignment": _alignment,
    "taylor_ratio": _taylor,
}
DOC = """Standard error of {name} over the probes.

Formula: √((n − 1)/n · Σ_i (θ̂_(i) − θ̂_·)²), θ̂_(i) the number without probe i, θ̂_· their mean
Range: [0, ∞); undefined where {name} is, with a probe left out or without
Source: Quenouille 1956; Tukey 1958
Pitfalls: of the draw of probes, not of training seeds; runs on the same probes share this error
"""
CORRECTED = """kernel_angle without its bias from there being few probes.

Formula: n·θ̂ − (n − 1)·θ̂_·, θ̂_· the mean of the angles with one probe left out
Range: about [0, π/2] radians; undefined where kernel_angle is
Source: Quenouille 1956
Pitfalls: takes off the bias of order 1/n only: prefer more probes
"""


def _jackknife(view: View, name: str) -> metrics.Jackknife:
    statistic, kernels, rows = HEADLINES[name](view)

    def compute() -> metrics.Jackknife:
        return metrics.jackknife(statistic, *kernels, rows=rows)

    if len(view.outputs) < 4:
        raise Undefined(f"an error bar needs at least 4 probes and there are {len(view.outputs)}")
    bars = compute() if view.instruments is None else view.instruments.once(f"jackknife {name}", compute)
    if not bool(torch.isfinite(bars.standard_error)):
        raise Undefined(f"{name} is undefined on the probes or with one of them left out")
    return bars


def _standard_error(name: str) -> Compute:
    def compute(view: View) -> Tensor:
        return _jackknife(view, name).standard_error

    compute.__doc__ = DOC.format(name=name)
    return compute


def kernel_angle_corrected(view: View) -> Tensor:
    """The kernel angle minus its jackknife bias, rad; undefined where the jackknife is."""
    return _jackknife(view, "kernel_angle").corrected


kernel_angle_corrected.__doc__ = CORRECTED

COST = Price("each probe left out in turn", sweeps=60)
ERRORS: dict[str, Diagnostic] = {
    **{
        f"{name}_se": Diagnostic(
            _standard_error(name), needs=("targets",) if name == "centered_alignment" else (), cost=COST
        )
        for name in HEADLINES
    },
    "kernel_angle_corrected": Diagnostic(kernel_angle_corrected, cost=COST),
}
