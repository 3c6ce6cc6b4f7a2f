"""The kernel's eigenvalues, descending in float64, and what they say: ranks, conditioning, decay.

Every function takes a kernel [n, n], a full kernel [n, C, n, C] (as [nC, nC]) or its 1-D eigenvalues. `floor` is the
noise floor in the kernel's own unit, for a kernel made from float32 factors n·eps(float32)·λ_max; None takes
n·eps·λ_max with the eps of the tensor's dtype. An eigenvalue below −floor is an error, one in [−floor, 0) counts as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import finite, probe_kernel, real, symmetric
from ntkwatch.metrics.distance import center
from ntkwatch.metrics.undefined import Undefined, metric, nan


def _nan_spectrum(k: Tensor, *_: object, **__: object) -> Tensor:
    return nan(k).repeat(len(k) if k.ndim < 4 else k.shape[0] * k.shape[1])


def _default_floor(spectrum: Tensor, dtype: torch.dtype) -> float:
    return len(spectrum) * torch.finfo(dtype).eps * float(spectrum[0].clamp(min=0))


def _clip(spectrum: Tensor, floor: float) -> Tensor:
    """Descending eigenvalues with the negative ones within noise set to 0; ValueError below −floor."""
    if spectrum[-1] < -floor:
        got = f"smallest eigenvalue {float(spectrum[-1]):.3e}, noise floor {floor:.3e}"
        raise ValueError(
            f"k must be positive semi-definite; got {got}; pass floor= if k was made from float32 factors "
            "(n·eps(float32)·λ_max)"
        )
    return spectrum.clamp(min=0)


def eigensystem(k: Tensor, floor: float | None = None, name: str = "k") -> tuple[Tensor, Tensor, float]:
    """Of a kernel [n, n]: eigenvalues [n] descending and clipped, eigenvectors [n, n] in columns, the floor used."""
    spectrum, vectors = torch.linalg.eigh(probe_kernel(k, name))
    spectrum, vectors = spectrum.flip(0), vectors.flip(1)
    floor = _default_floor(spectrum, k.dtype) if floor is None else floor
    return _clip(spectrum, floor), vectors, floor


def floored(k: Tensor, floor: float | None = None) -> tuple[Tensor, float]:
    """Eigenvalues [m] descending and clipped, of a kernel or as given, and the floor used."""
    if isinstance(k, Tensor) and k.ndim == 1:
        spectrum = finite(real(k, "k"), "k").sort(descending=True).values
    else:
        spectrum = torch.linalg.eigvalsh(symmetric(k)).flip(0)
    floor = _default_floor(spectrum, k.dtype) if floor is None else floor
    return _clip(spectrum, floor), floor


def _nonzero(k: Tensor, floor: float | None) -> tuple[Tensor, float]:
    """Eigenvalues divided by the largest, and the floor in the same unit."""
    spectrum, floor = floored(k, floor)
    top = spectrum[0]
    if top <= floor:
        raise Undefined("the kernel is zero" if top == 0 else "the kernel is below its noise floor")
    return spectrum / top, floor / float(top)


@metric(_nan_spectrum)
def eigenvalues(k: Tensor, floor: float | None = None) -> Tensor:
    """Eigenvalues of the kernel, largest first.

    Formula: λ_1 ≥ … ≥ λ_m of K (float64); those in [−floor, 0) are 0
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> [m]
    Range: [0, ∞); undefined where K is not finite; ValueError below −floor (K is not positive semi-definite)
    Source: Jacot et al. 2018
    Pitfalls: those below the floor are noise; those of the trace kernel are not those of Θ, λ_max(K) ≤ λ_max(Θ)

    >>> eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).round(decimals=9)
    tensor([3., 1.], dtype=torch.float64)
    """
    return floored(k, floor)[0]


@metric()
def noise_floor(k: Tensor) -> Tensor:
    """The size below which an eigenvalue of this tensor is rounding noise.

    Formula: m·eps·λ_max, eps that of k's dtype
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: [0, ∞), in the kernel's unit; undefined where K is not finite
    Source: the backward error of a symmetric eigensolver
    Pitfalls: a float64 kernel made from float32 factors has float32's floor: pass that as floor=

    >>> float(noise_floor(torch.eye(4).double())) == 4 * 2.0**-52
    True
    """
    spectrum = floored(k, torch.inf)[0]
    return spectrum[0] * len(spectrum) * torch.finfo(k.dtype).eps


@metric()
def numerical_rank(k: Tensor, floor: float | None = None) -> Tensor:
    """Number of eigenvalues above the noise floor.

    Formula: #{λ_i > floor}
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: [0, m]; at most P (trained parameters) for Θ, CP for the trace kernel; undefined where K is not finite
    Source: the definition
    Pitfalls: duplicate probes lower it by one each; a trace kernel of full rank does not make Θ so

    >>> float(numerical_rank(torch.ones(3, 3)))
    1.0
    """
    spectrum, floor = floored(k, floor)
    return (spectrum > floor).sum().to(spectrum.dtype)


@metric()
def zero_modes(k: Tensor, floor: float | None = None) -> Tensor:
    """Number of eigenvalues at or below the noise floor: directions of function space that training cannot move.

    Formula: #{λ_i ≤ floor} = m − numerical rank
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: [0, m]; undefined where K is not finite
    Source: Du et al. 2019 (global convergence asks for none in Θ_0)
    Pitfalls: duplicate probes make one each

    >>> float(zero_modes(torch.ones(3, 3)))
    2.0
    """
    spectrum, floor = floored(k, floor)
    return (spectrum <= floor).sum().to(spectrum.dtype)


@metric()
def smallest_eigenvalue(k: Tensor, floor: float | None = None) -> Tensor:
    """The smallest eigenvalue, where it can be distinguished from noise.

    Formula: λ_min; it predicts ‖f_t − y‖ ≤ e^{−ηλ_min t}‖f_0 − y‖ for ½‖f − y‖²
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: (floor, ∞); undefined at or below the noise floor
    Source: Du et al. 2019
    Pitfalls: global convergence is about Θ in full: λ_min of the trace kernel says nothing on it

    >>> round(float(smallest_eigenvalue(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())), 12)
    1.0
    """
    spectrum, floor = floored(k, floor)
    if spectrum[-1] <= floor:
        raise Undefined(f"the smallest eigenvalue is at or below the noise floor {floor:.1e}")
    return spectrum[-1]


@metric()
def effective_rank(k: Tensor, floor: float | None = None) -> Tensor:
    """Number of directions the kernel spreads over, by entropy.

    Formula: exp(−Σ p log p), p = λ/Σλ
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: [1, m]; undefined where K is zero or not finite
    Source: Roy & Vetterli 2007
    Pitfalls: not a measure of richness: it rose 76 to 115 in a feature-learning run and 30 to 84 on random labels

    >>> round(float(effective_rank(torch.eye(6))), 12)
    6.0
    """
    spectrum, _ = _nonzero(k, floor)
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp()


@metric()
def participation_ratio(k: Tensor, floor: float | None = None) -> Tensor:
    """Number of directions the kernel spreads over, by second moments.

    Formula: (Σλ)²/Σλ²
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: [1, m]; undefined where K is zero or not finite
    Source: the inverse participation ratio of physics
    Pitfalls: one large eigenvalue (the constant function's, often) hides the rest

    >>> round(float(participation_ratio(torch.eye(6))), 12)
    6.0
    """
    spectrum, _ = _nonzero(k, floor)
    return spectrum.sum() ** 2 / (spectrum**2).sum()


@metric()
def stable_rank(k: Tensor, floor: float | None = None, centered: bool = False) -> Tensor:
    """Stable rank of the Jacobian: how many times its top direction fits into the kernel's trace.

    Formula: Σλ/λ_max = ‖J‖_F²/‖J‖₂²; with centered=True that of C K C (k must be [n, n])
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: [1, m]; undefined where K (centred: K̃) is zero or not finite
    Source: Rudelson & Vershynin 2007
    Pitfalls: near 1 whenever the constant function dominates: then read the centred one

    >>> round(float(stable_rank(torch.eye(6))), 12), round(float(stable_rank(torch.eye(6), centered=True)), 12)
    (6.0, 5.0)
    """
    if centered:
        floor = floored(k)[1] if floor is None else floor  # centring leaves noise of the size of K's, not of K̃'s
        k = center(k)
    spectrum, _ = _nonzero(k, floor)
    return spectrum.sum()


@metric()
def condition_number(k: Tensor, floor: float | None = None) -> Tensor:
    """Ratio of the fastest to the slowest learning rate of the kernel's own directions.

    Formula: λ_max/λ_min⁺, λ_min⁺ the smallest eigenvalue above the floor
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m] -> []
    Range: [1, 1/(m·eps)); undefined where K is zero or not finite
    Source: Xiao et al. 2020 (conditioning with depth)
    Pitfalls: leaves zero modes out: read it beside zero_modes; close to the floor it is the floor's

    >>> round(float(condition_number(torch.diag(torch.tensor([8.0, 2.0, 0.0])))), 12)
    4.0
    """
    spectrum, floor = _nonzero(k, floor)
    return 1 / spectrum[spectrum > floor][-1]


def _logarithms(k: Tensor, window: tuple[int, int], floor: float | None) -> tuple[Tensor, Tensor]:
    """Centred (log rank, log eigenvalue) over the window."""
    spectrum, floor = floored(k, floor)
    first, last = window
    if not (first >= 1 and first + 2 <= last <= len(spectrum)):
        raise ValueError(
            f"window must be (first, last) with 1 ≤ first, at least 3 ranks, last ≤ {len(spectrum)}; got {window}; "
            "ranks count from 1 and last is included"
        )
    if spectrum[last - 1] <= floor:
        raise Undefined(f"the window reaches eigenvalues at or below the noise floor {floor:.1e}")
    rank = torch.arange(first, last + 1, dtype=spectrum.dtype, device=spectrum.device).log()
    value = spectrum[first - 1 : last].log()
    return rank - rank.mean(), value - value.mean()


@metric()
def decay_exponent(k: Tensor, window: tuple[int, int], floor: float | None = None) -> Tensor:
    """Power law of the spectrum over a stated window of ranks.

    Formula: α of λ_k ∝ k^(−α), ordinary least squares of log λ_k on log k over ranks first … last, both included
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m]; window (first, last), ranks from 1 -> []
    Range: [0, ∞); undefined where the window reaches the noise floor or K is not finite
    Source: Canatar et al. 2021 (power-law spectra)
    Pitfalls: never quote it without its window and decay_r2: any falling curve has a slope

    >>> k = torch.arange(1, 21).double() ** -1.5
    >>> round(float(decay_exponent(k, (1, 20))), 12), round(float(decay_r2(k, (1, 20))), 12)
    (1.5, 1.0)
    """
    rank, value = _logarithms(k, window, floor)
    return -(rank @ value) / (rank @ rank)


@metric()
def decay_r2(k: Tensor, window: tuple[int, int], floor: float | None = None) -> Tensor:
    """How much of a power law the spectrum is over a stated window.

    Formula: R² of the least-squares line behind decay_exponent
    Shape: [n, n], full [n, C, n, C] or eigenvalues [m]; window (first, last), ranks from 1 -> []
    Range: [0, 1]; undefined on a flat window, one that reaches the noise floor, or where K is not finite
    Source: the coefficient of determination
    Pitfalls: high on any smooth monotone curve over a short window

    >>> round(float(decay_r2(torch.exp(-torch.arange(20).double()), (1, 20))), 3)
    0.867
    """
    rank, value = _logarithms(k, window, floor)
    if value.abs().max() <= 8 * torch.finfo(k.dtype).eps:
        raise Undefined("the spectrum is flat over the window")
    return (rank @ value) ** 2 / ((rank @ rank) * (value @ value))
