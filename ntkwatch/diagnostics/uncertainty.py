"""Whether the kernel knows what it does not know: Gaussian-process posteriors on held-out probes, and calibration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Compute, Diagnostic, Price
from ntkwatch.diagnostics.generalisation import RELATIVE_RIDGE, halves, ridge_of
from ntkwatch.diagnostics.view import View, ask, known
from ntkwatch.metrics.undefined import Undefined

Half = tuple[Tensor, Tensor, Tensor]  # predictive mean [m, C], variance [m], targets [m, C]


def _one_net(view: View) -> list[Half]:
    """The tangent kernel as a prior covariance, its scale fitted to the training half of each halving."""
    k, y = view.square, known(view.targets)
    ridge = ridge_of(k)
    found = []
    for train, test in halves(view):
        block, cross = k[train][:, train], k[test][:, train]
        posterior = metrics.ntkgp_posterior(block, y[train], cross, k[test][:, test], ridge, floor=view.square_floor)
        scale = _likeliest_scale(block, y[train], ridge)
        found.append((posterior.mean, scale * (posterior.variance + ridge), y[test]))
    return found


def _likeliest_scale(k: Tensor, y: Tensor, ridge: float) -> Tensor:
    """s of the prior s·(K + ridge·I) under which the targets are likeliest: tr(yᵀ(K + ridge·I)⁻¹y)/(nC)."""
    lifted = k + ridge * torch.eye(len(k), dtype=k.dtype)
    scale = (y * torch.linalg.solve(lifted, y)).sum() / y.numel()
    if not float(scale) > 0:
        raise Undefined("the targets are zero over half of the probes")
    return scale


def _ensemble(view: View) -> list[Half]:
    """Infinitely wide networks trained on one half, with the NNGP kernel's spread at initialisation."""
    y, (s, rows) = known(view.targets), known(view.nngp)
    k, y = view.square[rows][:, rows], y[rows]
    ridge = ridge_of(k)
    noise = RELATIVE_RIDGE * float(s.trace()) / len(s)
    found = []
    for train, test in halves(view, len(rows)):
        posterior = metrics.gp_posterior(
            k[train][:, train], y[train], k[test][:, train],
            s[train][:, train], s[test][:, train], s[test][:, test], ridge, floor=view.square_floor,
        )  # fmt: skip
        found.append((posterior.mean, posterior.variance + noise, y[test]))
    return found


def _calibration(name: str, of: Callable[[View], list[Half]], doc: str) -> Compute:
    def compute(view: View) -> Tensor:
        return torch.stack([ask(name, *half) for half in of(view)]).mean()

    compute.__doc__ = doc
    return compute


NLL_FORMULA = "mean over 8 seeded halvings of ½·log(2πσ²) + (y − μ)²/(2σ²) on the held-out half"
COVERAGE_FORMULA = "share of held-out targets within 1.96σ of μ, mean over 8 seeded halvings"
ONE_NET = """{first}

Formula: {formula}; μ, σ² of the
    posterior whose prior covariance is s·(K + ridge·I), ridge = 1e-4·tr K/n, s the likeliest for the training half
Range: {range}; undefined below 8 probes, without targets, or where they are zero over half of them
Source: He et al. 2020 (NTKGP); Rasmussen & Williams 2006
Pitfalls: one net's kernel has no NNGP beside it: this is not the spread of trained networks, gp_{other} is; one-hot
    targets are not Gaussian
"""
ENSEMBLE = """{first}

Formula: {formula}; μ, σ² of the
    ensemble: A = Θ_*(Θ + ridge·I)⁻¹, mean Ay, variance of S_** + ASAᵀ − (AS_*ᵀ + S_*Aᵀ) with 1e-4·tr S/n added
Range: {range}; undefined without the NNGP kernel S: that of the infinite-width limit at the run's start,
    on as many of the probes as it is cheap on, where infinite.from_module converts the model; or monitor.nngp, [n, n]
Source: Lee et al. 2019; Rasmussen & Williams 2006
Pitfalls: the spread over initialisations alone: targets that are noisy, or that no member fits, lie outside it; Θ is
    the run's own kernel of now, so that later than step 0 it is the ensemble of networks with that kernel
"""
FIRSTS = {
    "ntkgp_nll": "How likely held-out targets are under the Gaussian process that the net's tangent kernel makes.",
    "ntkgp_coverage": "Share of held-out targets inside the 95 % interval of the tangent kernel's Gaussian process.",
    "gp_nll": "How likely held-out targets are under an ensemble of infinitely wide networks with this kernel.",
    "gp_coverage": "Share of held-out targets inside the 95 % interval of an ensemble of infinitely wide networks.",
}
NLL_RANGE, COVERAGE_RANGE = "(−∞, ∞) nats", "[0, 1], .95 when calibrated"


def _diagnostic(name: str) -> Diagnostic:
    family, _, kind = name.partition("_")
    metric, formula, span = {
        "nll": ("gaussian_nll", NLL_FORMULA, NLL_RANGE),
        "coverage": ("coverage", COVERAGE_FORMULA, COVERAGE_RANGE),
    }[kind]
    of, doc = (_one_net, ONE_NET) if family == "ntkgp" else (_ensemble, ENSEMBLE)
    text = doc.format(first=FIRSTS[name], formula=formula, range=span, other=kind)
    needs = ("targets",) if family == "ntkgp" else ("targets", "nngp")
    return Diagnostic(_calibration(metric, of, text), needs=needs, cost=POSTERIOR)


POSTERIOR = Price("posteriors on 8 halves of the probes", squares=8 * 20 / 8)
UNCERTAINTY: dict[str, Diagnostic] = {name: _diagnostic(name) for name in FIRSTS}
