"""How far the network left its linearisation, how its weights moved, and a self-test of the kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Compute, Diagnostic, Price
from ntkwatch.diagnostics.rounding import above_rounding, departure_rounding, moved
from ntkwatch.diagnostics.view import View, ask, known
from ntkwatch.metrics.undefined import Undefined

MAX_HALVINGS = 20  # of the self-test's step, at most
CLEAR_MARGIN = 10  # times the outputs' rounding error: an error that tells something
MAX_MATRIX_ENTRIES = 2**24  # entries of a weight: above, its singular values cost more than the probe


def taylor_ratio(view: View) -> Tensor:
    """‖Δf − J_0Δθ‖ / (‖Δf‖ + ‖J_0Δθ‖), undefined while nothing has moved, and where rounding makes it.

    Rounding error is that of the coarsest type in the model (autocast included), measured by rounding the weights
    otherwise; it makes what is not three times as large, unless it is below 0.001.
    """
    motion = moved(view)
    value = ask("taylor_ratio", motion.delta_f, motion.j0_delta_theta)
    error = departure_rounding(motion) / float(motion.delta_f.norm() + motion.j0_delta_theta.norm())
    return above_rounding(value, error, motion.rounded_to)


def linearization_error(view: View) -> Tensor:
    """‖Δf − J_0Δθ‖/‖Δf‖, the raw form of taylor_ratio."""
    motion = moved(view)
    value = ask("linearization_error", motion.delta_f, motion.j0_delta_theta)
    return above_rounding(value, departure_rounding(motion) / float(motion.delta_f.norm()), motion.rounded_to)


def parameter_distance(view: View) -> float:
    """‖θ_t − θ_0‖ / ‖θ_0‖ over all trained parameters."""
    return parameter_ratio(view, view.layers)


def parameter_ratio(view: View, names: Mapping[str, object] | Sequence[str]) -> float:
    """‖Δθ‖/‖θ_0‖ over the parameters named."""
    distances = known(view.parameter_distances)
    gone = math.hypot(*(distances[name][0] for name in names))
    start = math.hypot(*(distances[name][1] for name in names))
    if start == 0:
        raise Undefined("the parameters started at zero")
    return gone / start


def statistics_shift(view: View) -> float:
    """What BatchNorm's running statistics alone changed in the outputs.

    Formula: ‖f(θ_t, s_t) − f(θ_t, s_0)‖/‖f(θ_t, s_0)‖, s the running statistics, s_0 the baseline's
    Range: [0, ∞); undefined where the outputs are zero or the change is below their rounding; absent in models without
        running statistics
    Source: the definition
    Pitfalls: taylor_ratio, kernel_angle and the rest are at s_0 and leave this out
    """
    assert view.statistics_outputs is not None
    frozen = view.outputs.double()
    if float(frozen.norm()) == 0:
        raise Undefined("the outputs are zero")
    shift = float((view.statistics_outputs.double() - frozen).norm() / frozen.norm())
    if shift == 0 or view.instruments is None:
        return shift
    error = view.instruments.rounding(view.outputs) / float(frozen.norm())
    return above_rounding(shift, error, view.instruments.rounded_to(view.outputs))


def statistics_angle(view: View) -> Tensor:
    """What BatchNorm's running statistics alone changed in the kernel.

    Formula: angle(K(θ_t, s_t), K(θ_t, s_0)), s the running statistics, s_0 the baseline's
    Range: [0, π/2] radians; absent in models without running statistics
    Source: the arccos of Fort et al. 2020's similarity
    Pitfalls: costs a second kernel at every probe
    """
    assert view.statistics_kernel is not None
    return ask("kernel_angle", view.statistics_kernel, view.kernel)


def has_statistics(view: View) -> bool:
    """Whether the model normalises by running statistics."""
    return view.statistics_outputs is not None


# ── weights, by layer and over layers ─────────────────────────────────────────────────────────────────────────────────
def spectral_updates(view: View) -> dict[str, float]:
    """Parameter name -> ‖ΔW‖₂/‖W_0‖₂ of every trained matrix that did not start at zero."""
    return view.ask_model().once(
        "spectral_update", lambda: {n: _spectral(w, w0) for n, (w, w0) in view.ask_model().weights().items()}
    )


def _spectral(w: Tensor, w0: Tensor) -> float:
    return float(metrics.spectral_update(w, w0)) if w.numel() <= MAX_MATRIX_ENTRIES else math.nan


def feature_correlations(view: View) -> dict[str, float]:
    """Linear module -> cos(WᵀW, mean GᵀG)."""
    return _correlations(view, centred=False)


def update_correlations(view: View) -> dict[str, float]:
    """Linear module -> cos(ΔWᵀΔW, mean GᵀG)."""
    return _correlations(view, centred=True)


def _correlations(view: View, centred: bool) -> dict[str, float]:
    model = view.ask_model()

    def compute() -> dict[str, float]:
        weights, found = model.weights(), {}
        for name, gradients in model.input_gradients.items():
            own = f"{name}.weight" if name else "weight"
            if own not in weights:
                continue  # tied to another layer's, which stands for it
            w, w0 = weights[own]
            if not centred and gradients.shape[1:] == w.shape and bool(torch.isclose(gradients, w).all()):
                continue  # the readout: its gradients are its weights
            found[name] = float(metrics.neural_feature_correlation(w, gradients, w0 if centred else None))
        return found

    return model.once(f"neural_feature_correlation {centred}", compute)


def _over_layers(of: Callable[[View], Mapping[str, float]], pick: str, doc: str) -> Compute:
    def compute(view: View) -> float:
        values = [v for v in of(view).values() if math.isfinite(v)]
        if not values:
            raise Undefined("no layer has a defined value")
        return max(values) if pick == "max" else sum(values) / len(values)

    compute.__doc__ = doc
    return compute


SPECTRAL_DOC = """Size of the weights' updates in the norm that decides how far features move: {pick} over layers.

Formula: {pick} over trained matrices W of ‖W − W_0‖₂/‖W_0‖₂; by module under ntk_layers/<module>/spectral_update
Range: [0, ∞); undefined where θ_0 was not kept or every matrix started at zero
Source: Yang, Simon & Bernstein 2023
Pitfalls: width laws (flat in muP, n^(−1/2) in NTP) hold at matched training
"""
CORRELATION_DOC = """Whether the weights of Linear layers point where the function's gradients do: {pick} over layers.

Formula: {pick} over Linear layers of cos(WᵀW, (1/N) Σ_n G_nᵀG_n), G = ∂f/∂(input of the layer); by module under
    ntk_layers/<module>/; positions count as further examples
Range: [0, 1]; undefined without a Linear layer or where its factors are zero
Source: Radhakrishnan et al. 2024; Beaglehole et al. 2024
Pitfalls: counterexamples are known: a correlation, not a law; convolutions and the readout (1 by construction) are
    left out
"""
UPDATE_CORRELATION_DOC = """Whether updates of Linear layers point where the function's gradients do: mean over layers.

Formula: mean over Linear layers of cos(ΔWᵀΔW, (1/N) Σ_n G_nᵀG_n), ΔW = W − W_0, G = ∂f/∂(input of the layer); by module
    under ntk_layers/<module>/; positions count as further examples
Range: [0, 1]; undefined without a Linear layer, where θ_0 was not kept, or where no weight has moved
Source: Radhakrishnan et al. 2024; Beaglehole et al. 2024 (the centred form)
Pitfalls: counterexamples are known: a correlation, not a law; convolutions are left out; the readout counts, whose
    update is not its gradients: neural_feature_correlation_mean leaves it out
"""


# ── the self-test ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _step_errors(view: View) -> tuple[float, float, bool, float]:
    """One-step errors at η and η/2 on the baseline, whether the second stands clear of rounding, and the first's own.

    η is halved for as long as it does: in a ReLU net that is trained already, large steps cross kinks, and then a right
    kernel's error stalls there, and a wrong one's falls.
    """
    if view.step != view.start_step:
        raise Undefined("a self-test of the baseline: see the first probe")
    loss, theta, model = known(view.loss), known(view.theta), view.ask_model()

    def errors() -> tuple[float, float, bool, float]:
        found: list[tuple[float, float]] = []  # each error, and how much of it rounding makes
        for df, lr in itertools.islice(model.gradient_steps(loss), MAX_HALVINGS + 1):
            error = float(ask("one_step_error", df, theta, loss.gradient, lr))
            rounding = float(model.rounding(view.outputs) / df.norm())
            if len(found) >= 2 and error <= CLEAR_MARGIN * rounding:
                break
            found.append((error, rounding))
        (whole, at_whole), (half, at_half) = found[-2:]
        return whole, half, half > CLEAR_MARGIN * at_half, at_whole

    return model.once("one_step", errors)


def one_step_error(view: View) -> float:
    """Self-test at the first probe: a gradient step as small as rounding allows against what Θ predicts for it."""
    error, _, _, rounding = _step_errors(view)
    return above_rounding(error, rounding, view.ask_model().rounded_to(view.outputs))


def one_step_halving(view: View) -> float:
    """Self-test at the first probe: how the one-step error falls when the step is halved; ½ where all is right.

    Formula: one_step_error(η/2)/one_step_error(η), η the least of η_0, η_0/2, … η_0/2¹⁹ with an error at η/2 above
        ten times the outputs' rounding error; η_0 = eps^⅓·‖θ‖/‖∇𝓛‖, eps that of the outputs' dtype
    Range: [0, ∞), ½ where all is right; 1 where the kernel is wrong (mode, tied or frozen parameters, dropout);
        undefined where both errors are rounding (a linear model) and after the first probe
    Source: Jacot et al. 2018 (df/dt = −Θ∇_f𝓛)
    Pitfalls: in between, kinks lie closer to the probes than rounding can step: in float32 a ReLU net that has trained
        on them; use float64, or held-out probes, to decide
    """
    whole, half, clear, _ = _step_errors(view)
    if not clear:
        raise Undefined(f"the one-step error is rounding ({half:.1e}): nothing is left to halve")
    return half / whole


TANGENT = Price("two forward-mode products at θ_0", passes=4)
STATISTICS = Price("a second kernel, in models with BatchNorm", passes=1, kernels=1)
SINGULAR = Price("singular values of the weights", weights=14)
BACKWARD = Price("C backward passes", passes=1, per_output=2)
STEPS = Price("gradient steps on a copy, at the first probe", passes=16)
LAZINESS: dict[str, Diagnostic] = {
    "taylor_ratio": Diagnostic(taylor_ratio, default=True, cost=TANGENT),
    "parameter_distance": Diagnostic(parameter_distance, default=True),
    "statistics_shift": Diagnostic(statistics_shift, default=True, when=has_statistics, cost=STATISTICS),
    "statistics_angle": Diagnostic(statistics_angle, default=True, when=has_statistics, cost=STATISTICS),
}
MORE_LAZINESS: dict[str, Diagnostic] = {
    "linearization_error": Diagnostic(linearization_error, cost=TANGENT),
    **{
        f"spectral_update_{pick}": Diagnostic(
            _over_layers(spectral_updates, pick, SPECTRAL_DOC.format(pick=pick)), cost=SINGULAR
        )
        for pick in ("mean", "max")
    },
    **{
        f"neural_feature_correlation_{pick}": Diagnostic(
            _over_layers(feature_correlations, pick, CORRELATION_DOC.format(pick=pick)), cost=BACKWARD
        )
        for pick in ("mean", "max")
    },
    "neural_feature_correlation_update": Diagnostic(
        _over_layers(update_correlations, "mean", UPDATE_CORRELATION_DOC), cost=BACKWARD
    ),
    "one_step_error": Diagnostic(one_step_error, reduction="full", needs=("loss",), cost=STEPS),
    "one_step_halving": Diagnostic(one_step_halving, reduction="full", needs=("loss",), cost=STEPS),
}
