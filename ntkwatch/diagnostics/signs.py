"""The kernel of sign descent: how steps along the signs of a gradient, as sign descent or Adam at its start takes them,
would move the probes. It is not symmetric, so it has no spectrum, and no CKA but of its symmetric part."""

from __future__ import annotations

from torch import Tensor

from ntkwatch.diagnostics.diagnostic import Diagnostic, Price
from ntkwatch.diagnostics.view import View, ask, known


def _kernel(view: View) -> Tensor:
    """K_sign [n, n], trace-reduced."""
    model = view.ask_model()
    return model.once("signs", lambda: model.sign_kernel(model.state))


def sign_angle(view: View) -> Tensor:
    """Rotation of the kernel of sign descent since the baseline.

    Formula: angle(K_s(t), K_s(0)), K_s[n,m] = (1/C) Σ_c ⟨∂f_c(x_n)/∂θ, sign(∂f_c(x_m)/∂θ)⟩
    Range: [0, π] radians, for it need not be positive; undefined where a kernel is zero, or where θ_0 was not kept
    Source: Malladi et al. 2023 (the kernel); the angle is the arccos of Fort et al. 2020's similarity
    Pitfalls: signs flip at zero, so it may turn where the plain kernel does not; entries below eps^¾ of the largest of
        a parameter's gradient have no sign; signs of one example's gradient, a batch of one: those of a sum are others
    """
    model, now = view.ask_model(), _kernel(view)
    return ask("kernel_angle", now, model.at_start("signs", now, model.sign_kernel))


def sign_asymmetry(view: View) -> Tensor:
    """How far the kernel of sign descent is from its transpose: whether x moves x' as x' moves x.

    Formula: ‖K_s − K_sᵀ‖/‖K_s‖, K_s as in sign_angle
    Range: [0, 2], 0 where it is symmetric; undefined where it is zero
    Source: Malladi et al. 2023 (the asymmetric SignGD kernel)
    Pitfalls: probes whose gradients differ in size alone make it: K_s[n,m] grows with ‖∂f(x_n)/∂θ‖ and not with x_m's
    """
    return ask("asymmetry", _kernel(view))


def sign_alignment(view: View) -> Tensor:
    """CKA with the targets of the symmetric part of the kernel of sign descent, all of it that yᵀK_s y depends on.

    Formula: cos(CSC, ỸỸᵀ), S = (K_s + K_sᵀ)/2, C = I − 11ᵀ/n, K_s as in sign_angle
    Range: [−1, 1], for S need not be positive; undefined as centered_alignment is
    Source: Cortes et al. 2012; Malladi et al. 2023
    Pitfalls: leaves the skew part out: see sign_asymmetry; centered_alignment is that of the plain kernel
    """
    k = _kernel(view)
    return ask("centered_alignment", (k + k.T) / 2, known(view.targets))


def sign_cosine(view: View) -> Tensor:
    """Whether sign descent sees the probes as gradient descent does.

    Formula: cos(K_s, K) = tr(K_sᵀK)/(‖K_s‖‖K‖), K the trace kernel, K_s as in sign_angle
    Range: [−1, 1], 1 where the two are proportional; undefined where one is zero
    Source: Malladi et al. 2023 (the two kernels side by side); the cosine is Fort et al. 2020's
    Pitfalls: high where all entries are about alike: a common mean dominates both
    """
    return 1 - ask("kernel_distance", _kernel(view), view.trace)


SIGNS = Price("the kernel of sign descent", kernels=1.6)  # of a plain one: 1.2 to 1.6 on an MLP, a CNN, a transformer
SIGN_DESCENT: dict[str, Diagnostic] = {
    "sign_angle": Diagnostic(sign_angle, by_name=True, cost=SIGNS),
    "sign_asymmetry": Diagnostic(sign_asymmetry, by_name=True, cost=SIGNS),
    "sign_alignment": Diagnostic(sign_alignment, by_name=True, needs=("targets",), cost=SIGNS),
    "sign_cosine": Diagnostic(sign_cosine, by_name=True, cost=SIGNS),
}
