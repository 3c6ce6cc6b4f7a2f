"""How far the kernel moved since the baseline, along which path, and on which probes."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Compute, Diagnostic
from ntkwatch.diagnostics.view import View, ask, known
from ntkwatch.metrics.undefined import Undefined


def _against_baseline(name: str) -> Compute:
    def compute(view: View) -> Tensor:
        return ask(name, view.kernel, view.kernel_0)

    compute.__doc__ = getattr(metrics, name).__doc__
    return compute


def kernel_velocity(view: View) -> Tensor:
    """angle(K_t, K_previous) / (steps between them)."""
    step, kernel = known(view.previous)
    if step == view.step:
        raise Undefined("no step has passed since the previous probe")
    return ask("kernel_angle", view.kernel, kernel) / (view.step - step)


def centered_distance(view: View) -> Tensor:
    """1 − CKA(K_t, K_0) of the [n, n] kernel."""
    return ask("centered_distance", view.square, view.square_0)


def path_length(view: View) -> float:
    """Σ angle over successive probes since the baseline."""
    return known(view.path_length)


def directness(view: View) -> float:
    """angle(K_t, K_0)/path length."""
    length, angle = known(view.path_length), float(ask("kernel_angle", view.kernel, view.kernel_0))
    if length <= 1e-12:
        raise Undefined("the kernel has not turned")
    return min(angle / length, 1.0)


def per_example(view: View) -> Tensor:
    """[n]: ‖K̂[i,:] − K̂_0[i,:]‖/‖K̂_0[i,:]‖ of the [n, n] kernel, of the probes whose baseline row is not zero."""
    motion = metrics.per_example_motion(view.square, view.square_0)
    if not bool(torch.isfinite(motion).any()):
        raise Undefined(metrics.why_undefined("per_example_motion", view.square, view.square_0) or "it is not finite")
    return motion


def per_example_motion_max(view: View) -> Tensor:
    """Motion of the probe that the kernel's rotation is most about.

    Formula: max_i ‖K̂[i,:] − K̂₀[i,:]‖/‖K̂₀[i,:]‖, K̂ = K/‖K‖ (Frobenius), of the [n, n] kernel
    Range: [0, ∞); undefined where a kernel is zero or not finite
    Source: the row by row form of relative_change
    Pitfalls: the whole vector is metrics.per_example_motion(run.kernel(step), run.kernel(0)) of a record that keeps
        kernels; a probe whose baseline row is small moves most
    """
    motion = per_example(view)
    return motion[torch.isfinite(motion)].max()


def per_example_motion_median(view: View) -> Tensor:
    """Motion of the typical probe, beside per_example_motion_max.

    Formula: median_i ‖K̂[i,:] − K̂₀[i,:]‖/‖K̂₀[i,:]‖, K̂ = K/‖K‖ (Frobenius), of the [n, n] kernel
    Range: [0, ∞); undefined where a kernel is zero or not finite
    Source: the row by row form of relative_change
    Pitfalls: far below the maximum means outliers: look at per_example_motion_index
    """
    motion = per_example(view)
    return motion[torch.isfinite(motion)].quantile(0.5)  # of an even number, torch.median is the lower of the two


def per_example_motion_index(view: View) -> int:
    """Which probe moved most: its row in the probe set, from 0.

    Formula: argmax_i of per_example_motion
    Range: 0 … n − 1; undefined where a kernel is zero, not finite, or has not moved
    Source: the row by row form of relative_change
    Pitfalls: the manifest's probes.indices turns it into a row of the dataset; ties go to the first
    """
    motion = per_example(view).nan_to_num(-1.0)
    if float(motion.max()) <= 0:
        raise Undefined("no probe has moved")
    return int(motion.argmax())


def distance_to_infinite(view: View) -> Tensor:
    """How far the kernel is from that of the infinitely wide network with the same architecture and initialisation.

    Formula: ‖K_t − K_∞‖/‖K_∞‖ (Frobenius), of the trace kernel, on as many of the probes as K_∞ is cheap on
    Range: [0, ∞); at step 0 it falls as width^−½; undefined where infinite.from_module cannot convert the model
    Source: Jacot et al. 2018; Lee et al. 2019
    Pitfalls: K_∞ is the mean over initialisations at the model's own width, scheme and parametrization; with torch's
        default initialisation bias gradients, which hardly fluctuate, hide the width law. Scale counts: read
        kernel_scale beside it
    """
    limit = known(view.limit)
    return ask("relative_change", view.trace[limit.rows][:, limit.rows], limit.kernel)


MOTION: dict[str, Diagnostic] = {
    **{
        name: Diagnostic(_against_baseline(name), default=True)
        for name in ("kernel_distance", "kernel_angle", "kernel_scale", "relative_change")
    },
    "kernel_velocity": Diagnostic(kernel_velocity, default=True),
    "distance_to_infinite": Diagnostic(distance_to_infinite, default=True, needs=("limit",)),
    "centered_distance": Diagnostic(centered_distance),
    "path_length": Diagnostic(path_length),
    "directness": Diagnostic(directness),
    "per_example_motion_max": Diagnostic(per_example_motion_max),
    "per_example_motion_median": Diagnostic(per_example_motion_median),
    "per_example_motion_index": Diagnostic(per_example_motion_index),
}
