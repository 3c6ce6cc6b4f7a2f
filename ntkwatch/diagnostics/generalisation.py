"""What regression with the kernel as it stands would do on the probes."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch.diagnostics.diagnostic import Diagnostic, Price
from ntkwatch.diagnostics.view import View, ask, ask_vector, known

RELATIVE_RIDGE = 1e-4  # of tr K/n
SHUFFLES = 20


def _scaled(view: View) -> tuple[Tensor, float]:
    """The [n, n] kernel at trace n/2, the trace of H^∞ at unit inputs, and its noise floor."""
    scale = len(view.square) / 2 / view.square.trace()
    return view.square * scale, view.square_floor * float(scale)


def complexity(view: View) -> Tensor:
    """√(2·tr(yᵀK⁻¹y)/n) at trace n/2."""
    k, floor = _scaled(view)
    return ask("complexity", k, known(view.targets), floor=floor)


def complexity_random(view: View) -> Tensor:
    """What complexity is for labels shuffled over the probes: the mean of 20 seeded shuffles.

    Formula: mean_π √(2·tr((πy)ᵀK⁻¹(πy))/n), K scaled to trace n/2
    Range: [0, ∞); undefined where K has zero modes
    Source: Arora et al. 2019b (random labels beside the true ones)
    Pitfalls: complexity says something only as far as it is below this
    """
    k, floor = _scaled(view)
    y, generator = known(view.targets), torch.Generator().manual_seed(view.seed)
    orders = [torch.randperm(len(y), generator=generator) for _ in range(SHUFFLES)]
    return torch.stack([ask("complexity", k, y[order], floor=floor) for order in orders]).mean()


def _ridge(view: View) -> float:
    return RELATIVE_RIDGE * float(view.square.trace()) / len(view.square)


def gcv(view: View) -> Tensor:
    """Generalised cross-validation of kernel regression, ridge 1e-4·tr K/n."""
    return ask("gcv", view.square, known(view.targets), _ridge(view), floor=view.square_floor)


def loo_error(view: View) -> Tensor:
    """Mean squared leave-one-out error of kernel regression on the probes.

    Formula: (1/n) Σ_i ‖[(K + ridge·I)⁻¹y]_i/[(K + ridge·I)⁻¹]_ii‖², ridge = 1e-4·tr K/n
    Range: [0, ∞); undefined where K + ridge·I is singular at the noise floor
    Source: Wei et al. 2022; the shortcut is exact (Allen 1974)
    Pitfalls: of the kernel as it stands, which has seen training probes; duplicate probes leak their targets
    """
    residuals = ask_vector("loo_residuals", view.square, known(view.targets), _ridge(view), floor=view.square_floor)
    return residuals.square().sum(1).mean()


INVERSE = Price("inverses of the kernel", squares=3 * 14)
SHUFFLED = Price("20 shuffles of the labels", squares=SHUFFLES * 14)
GENERALISATION: dict[str, Diagnostic] = {
    "complexity": Diagnostic(complexity, needs=("targets",), cost=INVERSE),
    "complexity_random": Diagnostic(complexity_random, needs=("targets",), cost=SHUFFLED),
    "gcv": Diagnostic(gcv, needs=("targets",), cost=INVERSE),
    "loo_error": Diagnostic(loo_error, needs=("targets",), cost=INVERSE),
}
