"""What a fixed kernel would have done: the linear forecast on the run's batches, and gradient flow on the probes."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Diagnostic, Price
from ntkwatch.diagnostics.optimisation import lr_weighted
from ntkwatch.diagnostics.rounding import above_rounding, forecast_rounding
from ntkwatch.diagnostics.view import Motion, View, ask, known
from ntkwatch.linearized.forecast import NO_FORECAST
from ntkwatch.metrics.undefined import Undefined

DIVERGED = "the linearised network diverged under the run's learning rates"


def _finite(lazy: Tensor) -> Tensor:
    if not bool(torch.isfinite(lazy).all()):
        raise Undefined(DIVERGED)
    return lazy


def loss_if_lazy(view: View) -> float:
    """The loss on the probes that the linearised network would have now, trained on the same batches.

    Formula: 𝓛(f_0 + J_0·(θ_lin − θ_0), y), θ_lin trained by a copy of the run's optimizer on the linear model
    Range: the loss's own; undefined unless a LinearForecast is attached: NTKWatch does where this is named in
        diagnostics=, at the cost of two to three training steps a step, which no budget bounds
        (`python -m tests.bench.forecast` prints the ratio)
    Source: Lee et al. 2019
    Pitfalls: read it beside loss; in evaluation mode at the baseline's BatchNorm statistics, whatever mode the run
        trains in, and without the run's reduced precision: forecast_start_error tells how far that is from its gradient
    """
    if view.f_lazy == NO_FORECAST:
        known(view.loss)
    outputs, at = _finite(known(view.f_lazy)), known(view.loss)  # why a run cannot be followed holds under any loss
    with torch.no_grad():
        return float(at.at(outputs.to(at.outputs.device)))


def forecast_error(view: View) -> Tensor:
    """How far the run left the linearised network trained on the same batches.

    Formula: ‖Δf − Δf̂‖/(‖Δf‖ + ‖Δf̂‖), Δf̂ the motion of the linearised network under a copy of the optimizer
    Range: [0, 1]; undefined while nothing moved beyond rounding, and unless a LinearForecast is attached
    Source: Lee et al. 2019; the symmetric ratio is this library's
    Pitfalls: usually, not always, at least taylor_ratio: the two trajectories part, the linearisation is the same
    """
    lazy, motion = _finite(known(view.f_lazy)), known(view.motion)
    predicted = lazy - view.baseline_outputs
    return _apart(motion, predicted, forecast_rounding(motion, predicted))


def _apart(motion: Motion, predicted: Tensor, rounding: float) -> Tensor:
    """‖Δf − Δf̂‖/(‖Δf‖ + ‖Δf̂‖); undefined where the rounding error of the difference makes it."""
    value = ask("taylor_ratio", motion.delta_f, predicted)
    return above_rounding(value, rounding / float(motion.delta_f.norm() + predicted.norm()), motion.rounded_to)


def forecast_start_error(view: View) -> float:
    """Whether the forecast is trained on what the run is trained on: their gradients at the first step.

    Formula: ‖g_run − g‖/‖g_run‖, g the gradient of loss= at θ_0 in evaluation mode, on the first step's batches
    Range: [0, ∞), rounding where the two are one; undefined unless a LinearForecast is attached, and before the first
        step
    Source: this library's check
    Pitfalls: dropout, BatchNorm in training mode, other terms of the training loss and hooks on gradients show here,
        and forecast_error holds them too
    """
    return known(view.lazy_start)


# ── gradient flow ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _curvature(view: View) -> float:
    """h of a squared loss, whose Hessian is h·I for every probe."""
    hessian = known(view.loss).hessian
    h = hessian[0, 0, 0]
    if not torch.allclose(hessian, h * torch.eye(hessian.shape[1], dtype=hessian.dtype), rtol=1e-9, atol=0) or h <= 0:
        raise Undefined("the flow has a closed form for squared loss alone: see loss_if_lazy")
    return float(h)


def flowed(view: View) -> Tensor:
    """Outputs [n, C] on the probes after gradient flow of the first kernel for the run's time, from the run's start."""
    rule, h = known(view.optimizer), _curvature(view)
    if rule.preconditioner is not None:
        raise Undefined(f"{rule.name} does not descend along the gradient: see loss_if_lazy")
    at = known(view.loss)
    goal = at.outputs.detach().double().cpu() - at.gradient / h  # where the squared loss is zero
    _, start = lr_weighted(view)
    rate = h * rule.factor / (1 - rule.momentum)
    found = metrics.gradient_flow(start, view.baseline_outputs, goal, view.step - view.start_step, rate)
    if not bool(torch.isfinite(found).all()):
        raise Undefined("the first kernel or its outputs are not finite")
    return found


def loss_if_flow(view: View) -> float:
    """The loss on the probes after gradient flow of the first kernel on them, for as long as the run has trained.

    Formula: 𝓛(f̂_t, y), f̂_t = y + e^(−h·Σ_g η_g K_g(0)·t/(1−β))·(f_0 − y), h the curvature of the squared loss
        (2/(nC) of nn.MSELoss), t in steps, at the learning rates of now
    Range: [0, ∞); undefined for any loss but a squared one, and under any optimizer but SGD (with momentum)
    Source: Jacot et al. 2018; Lee et al. 2019
    Pitfalls: of training on the probes alone, in full batches, at one learning rate, with Θ taken as K ⊗ I: on other
        data it is no forecast, loss_if_lazy is
    """
    at, outputs = known(view.loss), flowed(view)
    with torch.no_grad():
        return float(at.at(outputs.to(at.outputs.device)))


def flow_error(view: View) -> Tensor:
    """How far the outputs are from gradient flow of the first kernel on the probes.

    Formula: ‖Δf − Δf̂‖/(‖Δf‖ + ‖Δf̂‖), Δf̂ = f̂_t − f_0 as in loss_if_flow
    Range: [0, 1]; undefined while nothing moved, and as loss_if_flow is
    Source: Jacot et al. 2018; the symmetric ratio is this library's
    Pitfalls: those of loss_if_flow: it means something where the probes are the training set
    """
    motion = known(view.motion)
    return _apart(motion, flowed(view) - view.baseline_outputs, float(motion.f_rounding.norm()))


START = "forecast_start_error"
LAZY = Price("outputs of the linear forecast, where one is fed", passes=2)
FLOW = Price("eigenvectors of the first kernel", squares=14)
FIXED_KERNEL: dict[str, Diagnostic] = {
    "loss_if_lazy": Diagnostic(loss_if_lazy, needs=("loss", "forecast"), beside=("loss", START), cost=LAZY),
    "forecast_error": Diagnostic(forecast_error, needs=("forecast",), beside=(START,), cost=LAZY),
    START: Diagnostic(forecast_start_error, needs=("forecast",), cost=LAZY),
    "loss_if_flow": Diagnostic(loss_if_flow, needs=("loss", "optimizer"), beside=("loss",), cost=FLOW),
    "flow_error": Diagnostic(flow_error, needs=("loss", "optimizer"), cost=FLOW),
}
