"""What the kernel says about the run's own optimizer and loss: curvature, stability, time constants, speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Compute, Diagnostic, Price
from ntkwatch.diagnostics.view import View, ask, known
from ntkwatch.metrics.undefined import Undefined
from ntkwatch.model.optimizer import UpdateRule


def weighted_theta(view: View) -> Tensor:
    """J S Jᵀ [n, C, n, C], S the learning rates over the preconditioner: how a unit of −∇ moves the outputs."""
    rule = known(view.optimizer)
    theta = known(view.theta)
    if rule.uniform is not None:
        return rule.uniform * theta
    model = view.ask_model()
    return model.once("weighted", lambda: model.kernel(rule.scales(), "full").value.double().cpu())


def _curvatures(view: View, theta: Tensor) -> Tensor:
    """Eigenvalues of H^½ΘH^½, descending, of the kernel given."""
    hessian = known(view.loss).hessian
    side = math.isqrt(theta.numel())
    floor = view.relative_floor * float(torch.linalg.eigvalsh(theta.reshape(side, side))[-1].clamp(min=0))
    spectrum = metrics.gauss_newton_spectrum(theta, hessian, floor)
    if not bool(torch.isfinite(spectrum).all()):
        why = metrics.why_undefined("gauss_newton_spectrum", theta, hessian, floor)
        raise Undefined(why or "it is not finite")
    return spectrum


def weighted_curvatures(view: View) -> Tensor:
    """Eigenvalues of H^½(J S Jᵀ)H^½ [nC], descending: curvatures in the optimizer's own step."""
    compute = lambda: _curvatures(view, weighted_theta(view))  # noqa: E731
    return compute() if view.instruments is None else view.instruments.once("weighted curvatures", compute)


def gauss_newton_mu_max(view: View) -> Tensor:
    """Largest curvature of the loss along directions the network can move in: Gauss–Newton, on the probes.

    Formula: μ_max = λ_max(H^½ΘH^½), H = ∂²𝓛/∂f² of the run's own loss (1/n included), Θ in full
    Range: [0, ∞); for mean cross-entropy at most λ_max(Θ)/(2n); undefined without loss= (or the module's ntk_loss),
        where H is indefinite, or where the full kernel is above 1 GB
    Source: Schraudolph 2002; Jacot et al. 2018
    Pitfalls: leaves out the loss's own bend, Σ ∂𝓛/∂f·∇²f; from few probes it is biased up (6.2 at 8, 4.97 at 1,000)
    """
    return _curvatures(view, known(view.theta))[0]


def stability_ratio(view: View) -> Tensor:
    """The optimizer's own learning rates as a share of the largest stable ones.

    Weight decay is left out: under SGD it adds its λ to μ.
    """
    rule, mu = known(view.optimizer), weighted_curvatures(view)[0]
    return metrics.stability_ratio(mu, rule.factor, rule.momentum, rule.nesterov)


def max_stable_lr(view: View) -> Tensor:
    """The largest stable learning rate; with several groups, of the one with the largest, all scaled together.

    Weight decay is left out: under SGD it adds its λ to μ_max.
    """
    ratio = stability_ratio(view)
    if ratio == 0:
        raise Undefined("the curvature is zero: every learning rate is stable")
    return known(view.optimizer).largest_lr / ratio


def _time_constants(view: View) -> Tensor:
    """Steps in which each mode's error falls by e, fastest curvature first; only modes above the noise floor."""
    rule, mu = known(view.optimizer), weighted_curvatures(view)
    mu = mu[mu > len(mu) * view.relative_floor * mu[0]]
    if len(mu) == 0:
        raise Undefined("the curvature is zero (a fitted loss): time constants are infinite")
    return metrics.discrete_time_constants(mu, rule.factor, rule.momentum, rule.nesterov)


def time_constant_fastest(view: View) -> Tensor:
    """Steps in which the error along the most curved mode falls by e.

    Formula: −1/log|z|, z the larger root of the optimizer's recursion at μ_1 (heavy ball z² − (1 + β − ημ)z + β);
        (1 − β)/(ημ_1) at small rates
    Range: (0, ∞); negative where that mode is unstable; undefined without a loss and an optimizer of known rule
    Source: Polyak 1964; Jacot et al. 2018
    Pitfalls: Gauss–Newton on the probes as the sample; near the edge of stability it is not the fastest mode
    """
    return _time_constants(view)[0]


def time_constant_slowest(view: View) -> Tensor:
    """Steps in which the error along the least curved mode (above the noise floor) falls by e.

    Formula: −1/log|z|, z the larger root of the optimizer's recursion at the smallest μ above the floor
    Range: (0, ∞); undefined as time_constant_fastest is
    Source: Polyak 1964; Jacot et al. 2018
    Pitfalls: modes below the floor are slower still: see zero_modes_full
    """
    return _time_constants(view)[-1]


def predicted_rate(view: View) -> Tensor:
    """How fast the loss falls at least, per step, if the kernel and the curvature stay as they are.

    Formula: 2/τ_slowest ≈ 2ημ_min, the guarantee 𝓛_t ≤ 𝓛_0·e^(−2ημ_min·t) of a quadratic loss with no zero mode
    Range: (0, ∞); undefined where the curvature has zero modes (no guarantee), without loss or optimizer
    Source: Du et al. 2019
    Pitfalls: a lower bound, often far below loss_rate: most of the error lies along fast modes; of training probes only
    """
    mu = weighted_curvatures(view)
    zeros = int((mu <= len(mu) * view.relative_floor * mu[0]).sum())
    if zeros:
        raise Undefined(f"the curvature has {zeros} zero modes: there is no guaranteed rate")
    return 2 / _time_constants(view)[-1]


def loss(view: View) -> float:
    """The run's own loss on the probes, in evaluation mode.

    Formula: 𝓛(f(x), y), the mean that loss= or the module's ntk_loss returns
    Range: the loss's own; undefined without one
    Source: the run's loss
    Pitfalls: of the probes, which may be held out: the manifest names their source
    """
    return known(view.loss).value


def loss_rate(view: View) -> float:
    """How fast the loss on the probes fell on average since the baseline, per step: beside predicted_rate.

    Formula: log(𝓛_0/𝓛_t)/t
    Range: (−∞, ∞), negative where the loss grew; undefined at the baseline and where a loss is not positive
    Source: the exponential decay of Du et al. 2019
    Pitfalls: an average over the run: its beginning is faster than its end
    """
    now = known(view.loss)
    if view.step == view.start_step:
        raise Undefined("no step has passed since the baseline")
    with torch.no_grad():
        before = float(now.at(view.baseline_outputs.to(now.outputs.device)))
    if now.value <= 0 or before <= 0:
        raise Undefined("the loss is not positive")
    return math.log(before / now.value) / (view.step - view.start_step)


# ── optimizer-aware kernels ───────────────────────────────────────────────────────────────────────────────────────────
def lr_weighted(view: View) -> tuple[Tensor, Tensor]:
    """Σ_g η_g K_g now and at the baseline, both at the learning rates of now; [n, n]."""
    rule: UpdateRule = known(view.optimizer)
    now, start = (
        torch.stack([rule.lr[name] * layer for name, layer in layers.items()]).sum(0)
        for layers in (view.layers, view.layers_0)
    )
    return now, start


def lr_weighted_angle(view: View) -> Tensor:
    """Rotation of the kernel that the optimizer sees, every parameter weighted with its group's learning rate.

    Formula: angle(Σ_g η_g K_g(t), Σ_g η_g K_g(0)), K_g the trace kernel of group g, η_g the rates at t
    Range: [0, π/2] radians; undefined without an optimizer of known rule
    Source: Yang & Hu 2021 (per-layer learning rates)
    Pitfalls: equals kernel_angle under one learning rate; unlike it, it does not depend on how matched rescalings of
        weights and rates split a layer's size
    """
    return ask("kernel_angle", *lr_weighted(view))


def lr_weighted_trace(view: View) -> Tensor:
    """Speed that the learning rates give the outputs, in powers of ten.

    Formula: log10 tr Σ_g η_g K_g, unnormalised
    Range: (−∞, ∞); undefined without an optimizer of known rule
    Source: Yang & Hu 2021 (per-layer learning rates)
    Pitfalls: without momentum (times 1/(1 − β) in the long run) and without Adam's preconditioner
    """
    trace = lr_weighted(view)[0].trace()
    if trace <= 0:
        raise Undefined("the kernel is zero")
    return torch.log10(trace)


def preconditioned_alignment(view: View) -> Tensor:
    """Alignment with the targets of the kernel that Adam trains with.

    Formula: CKA(tr-reduced J S D⁻¹ Jᵀ, YYᵀ), D = √v̂ + ε from the optimizer's own state
    Range: [0, 1]; undefined for SGD, before Adam's first step, and as centered_alignment is
    Source: Cohen et al. 2022 (the preconditioner); Cortes et al. 2012
    Pitfalls: D is of this step: it moves with the gradients even where the plain kernel does not
    """
    rule = known(view.optimizer)
    if rule.preconditioner is None:
        raise Undefined(f"{rule.name} has no preconditioner: see centered_alignment")
    model = view.ask_model()
    kernel = model.once("preconditioned", lambda: model.kernel(rule.scales(), "trace").value.double().cpu())
    return ask("centered_alignment", kernel, known(view.targets))


def _rule(compute: Compute, **options: Price) -> Diagnostic:
    return Diagnostic(compute, reduction="full", needs=("loss", "optimizer"), **options)  # type: ignore[arg-type]


CURVED = Price("curvature of the loss in Θ [nC, nC]", fulls=24)
ADAM = Price("curvature in the optimizer's step; a further kernel under Adam or several rates", fulls=24, kernels=1)
MOMENTS = Price("a further kernel under Adam", kernels=1)
OPTIMISATION: dict[str, Diagnostic] = {
    "loss": Diagnostic(loss, needs=("loss",)),
    "loss_rate": Diagnostic(loss_rate, needs=("loss",)),
    "gauss_newton_mu_max": Diagnostic(gauss_newton_mu_max, reduction="full", needs=("loss",), cost=CURVED),
    "stability_ratio": _rule(stability_ratio, cost=ADAM),
    "max_stable_lr": _rule(max_stable_lr, cost=ADAM),
    "time_constant_fastest": _rule(time_constant_fastest, cost=ADAM),
    "time_constant_slowest": _rule(time_constant_slowest, cost=ADAM),
    "predicted_rate": _rule(predicted_rate, cost=ADAM),
    "lr_weighted_angle": Diagnostic(lr_weighted_angle, needs=("optimizer",)),
    "lr_weighted_trace": Diagnostic(lr_weighted_trace, needs=("optimizer",)),
    "preconditioned_alignment": Diagnostic(preconditioned_alignment, needs=("optimizer", "targets"), cost=MOMENTS),
}
