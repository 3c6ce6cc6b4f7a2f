"""What softmax cross-entropy can see of the kernel: all but the shift that the logits share."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Diagnostic
from ntkwatch.diagnostics.view import View, ask, known
from ntkwatch.metrics.undefined import Undefined


def _centred(theta: Tensor, floor: float) -> Tensor:
    """PΘP [n, C, n, C]; raises `Undefined` for one output, and where the logits move by their common shift alone."""
    if not bool(theta.any()):
        raise Undefined("the kernel is zero")
    found = metrics.softmax_centred(theta, floor=floor)
    if not bool(torch.isfinite(found).all()):
        raise Undefined(metrics.why_undefined("softmax_centred", theta) or "it is not finite")
    if not bool(found.any()):
        raise Undefined("the logits move by a shift that they share, and softmax does not see it")
    return found


def _theta_0(view: View) -> Tensor:
    """Θ of the baseline: the run's own kernel where that is full, else measured at θ_0."""
    if view.kernel_0.ndim == 4:
        return view.kernel_0
    model = view.ask_model()
    return model.at_start("theta", known(view.theta), lambda state: model.plain_kernel(state, "full"))


def softmax_centred_angle(view: View) -> Tensor:
    """Rotation since the baseline of the kernel that softmax cross-entropy trains with.

    Formula: angle(PΘ_tP, PΘ_0P), P = I − 11ᵀ/C over outputs, Θ in full
    Range: [0, π/2] radians; undefined for one output, where nothing but the logits' common shift moves, where θ_0 was
        not kept, or where the full kernel is above 1 GB
    Source: df/dt = −Θ∇𝓛 with Σ_c ∇𝓛_c = 0; the angle is the arccos of Fort et al. 2020's similarity
    Pitfalls: of the full kernel, which turns a quarter or more further than its trace reduction: not to be read
        beside kernel_angle
    """
    theta, theta_0 = known(view.theta), _theta_0(view)
    relative = view.relative_floor
    return ask("kernel_angle", *(_centred(k, relative * float(k.norm())) for k in (theta, theta_0)))


def softmax_centred_share(view: View) -> Tensor:
    """How much of the kernel softmax cross-entropy can see.

    Formula: tr PΘP/tr Θ, P = I − 11ᵀ/C over outputs, Θ in full
    Range: [0, 1], (C − 1)/C where outputs move independently and alike; undefined for one output, or where the full
        kernel is above 1 GB
    Source: df/dt = −Θ∇𝓛 with Σ_c ∇𝓛_c = 0
    Pitfalls: falls where the outputs come to share their motion, whatever they share it with
    """
    return ask("softmax_share", known(view.theta))


def softmax_centred_alignment(view: View) -> Tensor:
    """CKA with the targets of the kernel that softmax cross-entropy trains with.

    Formula: cos(K̃, ỸỸᵀ), K = (1/C) Σ_c (PΘP)[:,c,:,c] = trace kernel − sum kernel/C
    Range: [0, 1]; undefined for one output, and as centered_alignment is
    Source: Cortes et al. 2012; df/dt = −Θ∇𝓛 with Σ_c ∇𝓛_c = 0
    Pitfalls: beside centered_alignment it says whether the shift that the logits share was aligned, which is lost on
        the loss
    """
    theta = known(view.theta)
    centred = _centred(theta, view.relative_floor * float(theta.norm()))
    blocks = centred.diagonal(dim1=1, dim2=3)
    return ask("centered_alignment", blocks.mean(2), known(view.targets))


SOFTMAX: dict[str, Diagnostic] = {
    "softmax_centred_angle": Diagnostic(softmax_centred_angle, reduction="full"),
    "softmax_centred_share": Diagnostic(softmax_centred_share, reduction="full"),
    "softmax_centred_alignment": Diagnostic(softmax_centred_alignment, reduction="full", needs=("targets",)),
}
