"""What regression with the kernel as it stands would do on the probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Diagnostic, Price
from ntkwatch.diagnostics.view import View, ask, ask_vector, known
from ntkwatch.metrics.regression import right_classes
from ntkwatch.metrics.undefined import Undefined

RELATIVE_RIDGE = 1e-4  # of tr K/n
SHUFFLES = 20
SIDES = 8  # halvings of the probes
MIN_PROBES_PER_HALF = 8  # probes


def ridge_of(k: Tensor) -> float:
    """1e-4·tr K/n; raises `Undefined` for the zero kernel, of which nothing can be learned."""
    ridge = RELATIVE_RIDGE * float(k.trace()) / len(k)
    if not ridge > 0:
        raise Undefined("the kernel is zero")
    return ridge


def _scaled(view: View) -> tuple[Tensor, float]:
    """The [n, n] kernel at trace n/2, the trace of H^∞ at unit inputs, and its noise floor."""
    ridge_of(view.square)
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
    orders = [torch.randperm(len(y), generator=generator, device="cpu") for _ in range(SHUFFLES)]
    return torch.stack([ask("complexity", k, y[order], floor=floor) for order in orders]).mean()


def gcv(view: View) -> Tensor:
    """Generalised cross-validation of kernel regression, ridge 1e-4·tr K/n."""
    return ask("gcv", view.square, known(view.targets), ridge_of(view.square), floor=view.square_floor)


def loo_error(view: View) -> Tensor:
    """Mean squared leave-one-out error of kernel regression on the probes.

    Formula: (1/n) Σ_i ‖[(K + ridge·I)⁻¹y]_i/[(K + ridge·I)⁻¹]_ii‖², ridge = 1e-4·tr K/n
    Range: [0, ∞); undefined where K + ridge·I is singular at the noise floor
    Source: Wei et al. 2022; the shortcut is exact (Allen 1974)
    Pitfalls: of the kernel as it stands, which has seen training probes; duplicate probes leak their targets
    """
    k, y = view.square, known(view.targets)
    residuals = ask_vector("loo_residuals", k, y, ridge_of(k), floor=view.square_floor)
    return residuals.square().sum(1).mean()


# ── held out ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def halves(view: View, n: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """8 seeded (training, held-out) halvings of n things (None: of the probes), the same at every step."""
    n = len(view.square) if n is None else n
    if n < MIN_PROBES_PER_HALF:
        raise Undefined(f"half of {n} probes is too few to hold out")
    generator = torch.Generator().manual_seed(view.seed)
    orders = [torch.randperm(n, generator=generator, device="cpu") for _ in range(SIDES)]
    return [(order[: n // 2], order[n // 2 :]) for order in orders]


def _mean_square(y: Tensor) -> Tensor:
    size = y.square().sum(1).mean()
    if size == 0:
        raise Undefined("the targets are zero")
    return size


def _held_out(view: View, of: Callable[[Tensor, Tensor], Tensor], ridgeless: bool = False) -> Tensor:
    """Mean over the halvings of `of`(predictions, targets) on the held-out half."""
    k, y = view.square, known(view.targets)
    ridge = ridge_of(k) * (not ridgeless)
    found = []
    for train, test in halves(view):
        block = k[train][:, train]
        guess = metrics.kernel_regression(block, y[train], k[test][:, train], ridge, floor=view.square_floor)
        found.append(of(guess, y[test]))
    return torch.stack(found).mean()


def _error(guess: Tensor, y: Tensor) -> Tensor:
    return (guess - y).square().sum(1).mean()


def holdout_error(view: View) -> Tensor:
    """Error of kernel regression on probes that it was not given, as a share of the targets' own size.

    Formula: mean over 8 seeded halvings of (1/m) Σ‖y − K_*(K + ridge·I)⁻¹y‖² on the held-out half, over mean ‖y‖²;
        ridge = 1e-4·tr K/n of all probes, modes that it does not lift above the noise floor left out
    Range: [0, ∞), 1 for predictions of 0; undefined below 8 probes or without targets
    Source: Jacot et al. 2018
    Pitfalls: of the kernel as it stands, which has seen training probes; beside eigenlearning_error, its theory
    """
    return _held_out(view, _error) / _mean_square(known(view.targets))


def holdout_error_ridgeless(view: View) -> Tensor:
    """The same of the least-norm interpolation.

    Formula: holdout_error at ridge = 0, modes at the noise floor left out
    Range: [0, ∞); undefined as holdout_error is
    Source: Jacot et al. 2018
    Pitfalls: small eigenvalues amplify what the kernel cannot fit: far above holdout_error where it is ill-conditioned
    """
    return _held_out(view, _error, ridgeless=True) / _mean_square(known(view.targets))


def holdout_accuracy(view: View) -> Tensor:
    """Accuracy of kernel regression on probes that it was not given.

    Formula: share of right argmax (sign for C = 1; a tie by its share) on the held-out half, mean over 8 seeded
        halvings; ridge = 1e-4·tr K/n of all probes
    Range: [0, 1]; undefined below 8 probes, and where targets are values
    Source: Fort et al. 2020; Vyas et al. 2022 (kernel regression with the kernel of a step)
    Pitfalls: known to 1/√n; after_kernel_gain is its change since the baseline
    """
    y = view.labels
    return _held_out(replace(view, targets=y), right_classes)


def eigenlearning_error(view: View) -> Tensor:
    """What theory expects of holdout_error, from the kernel's eigenvalues and the targets' coefficients alone.

    Formula: learning_curve at s = ⌊n/2⌋ of the probes, ridge = 1e-4·tr K/n, over mean ‖y‖²
    Range: [0, ∞); undefined without targets
    Source: Simon et al. 2023
    Pitfalls: holdout_error far from it means that the kernel's eigenfunctions are not as good as random to each other
    """
    k, y = view.square, _enough(view)
    curve = ask_vector("learning_curve", k, y, [len(y) // 2], ridge_of(k), floor=view.square_floor)
    return curve[0] / _mean_square(y)


def eigenlearning_samples(view: View) -> float:
    """How many of the probes theory expects regression to need for half of the targets' size: its curve as one number.

    Formula: the least s of 1 … ⌊n/2⌋ at which learning_curve is at most half of mean ‖y‖², ridge = 1e-4·tr K/n
    Range: 1 … n/2; undefined where half of the probes are not enough, below 8 probes, or without targets
    Source: Simon et al. 2023
    Pitfalls: the whole curve is metrics.learning_curve(run.kernel(step), y, samples) of a record that keeps kernels;
        above n/2 samples the probes are too few to stand for a distribution
    """
    k, y = view.square, _enough(view)
    samples = range(1, len(y) // 2 + 1)
    curve = ask_vector("learning_curve", k, y, samples, ridge_of(k), floor=view.square_floor)
    reached = curve <= _mean_square(y) / 2
    if not bool(reached.any()):
        raise Undefined(f"{samples[-1]} probes are not enough for half of the targets' size")
    return float(samples[int(reached.int().argmax())])


def _enough(view: View) -> Tensor:
    """The targets, of probes enough to hold half of them out."""
    y = known(view.targets)
    if len(y) < MIN_PROBES_PER_HALF:
        raise Undefined(f"half of {len(y)} probes is too few to hold out")
    return y


INVERSE = Price("inverses of the kernel", squares=3 * 14)
SHUFFLED = Price("20 shuffles of the labels", squares=SHUFFLES * 14)
HALVES = Price("regression on 8 halves of the probes", squares=SIDES * 14 / 8)
THEORY = Price("eigenlearning of the kernel", squares=8 * 14)
GENERALISATION: dict[str, Diagnostic] = {
    "complexity": Diagnostic(complexity, needs=("targets",), cost=INVERSE),
    "complexity_random": Diagnostic(complexity_random, needs=("targets",), cost=SHUFFLED),
    "gcv": Diagnostic(gcv, needs=("targets",), cost=INVERSE),
    "loo_error": Diagnostic(loo_error, needs=("targets",), cost=INVERSE),
    "holdout_error": Diagnostic(holdout_error, needs=("targets",), cost=HALVES),
    "holdout_error_ridgeless": Diagnostic(holdout_error_ridgeless, needs=("targets",), cost=HALVES),
    "holdout_accuracy": Diagnostic(holdout_accuracy, needs=("targets",), cost=HALVES),
    "eigenlearning_error": Diagnostic(eigenlearning_error, needs=("targets",), cost=THEORY),
    "eigenlearning_samples": Diagnostic(eigenlearning_samples, needs=("targets",), cost=THEORY),
}
