"""What the kernel's eigenvalues say: sizes, ranks, conditioning, decay, and whether Θ is positive definite."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch import metrics
from ntkwatch.diagnostics.diagnostic import Compute, Diagnostic, Price
from ntkwatch.diagnostics.view import View, ask
from ntkwatch.metrics.undefined import Undefined

FIRST_RANK = 2  # the first mode is the constant function's, nearly always


def _of_spectrum(name: str) -> Compute:
    def compute(view: View) -> Tensor:
        return ask(name, view.eigenvalues, floor=view.floor)

    compute.__doc__ = getattr(metrics, name).__doc__
    return compute


def log10_lambda(index: int) -> Compute:
    """log10 of the index-th largest eigenvalue (from 1)."""

    def compute(view: View) -> Tensor:
        if index > len(view.eigenvalues):
            raise Undefined(f"the kernel has only {len(view.eigenvalues)} eigenvalues")
        value = view.eigenvalues[index - 1]
        if value <= view.floor:
            raise Undefined(f"eigenvalue {index} is below the noise floor {view.floor:.1e}")
        return torch.log10(value)

    return compute


def stable_rank_centered(view: View) -> Tensor:
    """Stable rank of the Jacobian without the constant function.

    Formula: tr K̃/λ_max(K̃), K̃ = C K C, C = I − 11ᵀ/n, of the [n, n] kernel
    Range: [1, n − 1]; undefined where K̃ is zero
    Source: Rudelson & Vershynin 2007
    Pitfalls: read it where stable_rank is near 1: the constant function hides the rest there
    """
    return ask("stable_rank", view.square, floor=view.square_floor, centered=True)


def _window(view: View) -> tuple[int, int]:
    last = len(view.eigenvalues) // 2
    if last < FIRST_RANK + 2:
        raise Undefined(f"a decay needs at least {2 * (FIRST_RANK + 2)} eigenvalues and has {len(view.eigenvalues)}")
    return FIRST_RANK, last


def decay_exponent(view: View) -> Tensor:
    """Power law of the spectrum over ranks 2 … ⌊m/2⌋ of m eigenvalues."""
    return ask("decay_exponent", view.eigenvalues, _window(view), floor=view.floor)


def decay_r2(view: View) -> Tensor:
    """How much of a power law the spectrum is over ranks 2 … ⌊m/2⌋ of m eigenvalues."""
    return ask("decay_r2", view.eigenvalues, _window(view), floor=view.floor)


def decay_window_last(view: View) -> int:
    """The last rank of the window that decay_exponent and decay_r2 are taken over; the first is 2.

    Formula: ⌊m/2⌋ of m eigenvalues
    Range: 4 … m/2; undefined below 8 eigenvalues
    Source: this library's choice: the first mode is the constant function's, the last half is the least certain
    Pitfalls: exponents over different windows are different numbers
    """
    return _window(view)[1]


def log10_lambda_min_full(view: View) -> Tensor:
    """Smallest eigenvalue of the full Θ, in powers of ten: positive definiteness, which global convergence asks for.

    Formula: log10 λ_min(Θ), Θ [nC, nC]
    Range: (log10 floor, ∞); undefined at or below the noise floor n·eps·λ_max of the factors: not told from 0
    Source: Du et al. 2019 (convergence to zero loss where λ_min(Θ_0) > 0 and the net is wide)
    Pitfalls: K positive definite does not make Θ so; duplicate probes make it 0; the value at step 0 is the theorem's
    """
    return torch.log10(ask("smallest_eigenvalue", view.full_spectrum, floor=view.full_floor))


def zero_modes_full(view: View) -> Tensor:
    """Directions of the probes' outputs that training cannot move: zero modes of the full Θ.

    Formula: #{λ_i(Θ) ≤ noise floor}, Θ [nC, nC]
    Range: [0, nC]; at least nC − P for P trained parameters
    Source: Du et al. 2019
    Pitfalls: duplicate probes make C each
    """
    return ask("zero_modes", view.full_spectrum, floor=view.full_floor)


CENTRED = Price("eigenvalues of the centred kernel", squares=6)
THETA = Price("eigenvalues of Θ [nC, nC]", fulls=6)
SPECTRUM: dict[str, Diagnostic] = {
    "effective_rank": Diagnostic(_of_spectrum("effective_rank"), default=True),
    "log10_lambda_max": Diagnostic(log10_lambda(1), default=True),
    **{f"log10_lambda_{i}": Diagnostic(log10_lambda(i), default=True) for i in range(1, 6)},
}
MORE_SPECTRUM: dict[str, Diagnostic] = {
    **{
        name: Diagnostic(_of_spectrum(name))
        for name in ("participation_ratio", "stable_rank", "condition_number", "zero_modes")
    },
    "stable_rank_centered": Diagnostic(stable_rank_centered, cost=CENTRED),
    "decay_exponent": Diagnostic(decay_exponent),
    "decay_r2": Diagnostic(decay_r2),
    "decay_window_last": Diagnostic(decay_window_last),
    "log10_lambda_min_full": Diagnostic(log10_lambda_min_full, reduction="full", cost=THETA),
    "zero_modes_full": Diagnostic(zero_modes_full, reduction="full", cost=THETA),
}
