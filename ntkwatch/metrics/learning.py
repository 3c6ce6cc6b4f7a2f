"""How much a kernel learns from how many samples: the eigenlearning theory of kernel regression's test error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import columns
from ntkwatch.metrics.spectrum import eigensystem, floored
from ntkwatch.metrics.undefined import Undefined, metric, nan


@dataclass(frozen=True)
class Eigenlearning:
    """Learning curve of kernel regression: kappa [], learnability [M] of each mode, error [] (mean squared, test)."""

    kappa: Tensor
    learnability: Tensor
    error: Tensor


@metric(lambda spectrum, *_, **__: Eigenlearning(nan(spectrum), nan(spectrum).repeat(len(spectrum)), nan(spectrum)))
def eigenlearning(spectrum: Tensor, coefficients: Tensor, n: float, ridge: float = 0.0) -> Eigenlearning:
    """Test error of kernel regression on n samples, from the kernel's eigenvalues and the target's coefficients.

    Formula: Σλ_i/(λ_i + κ) + ridge/κ = n; 𝓛_i = λ_i/(λ_i + κ); E = Σ(1 − 𝓛_i)²‖v_i‖² · n/(n − Σ𝓛_i²)
    Shape: spectrum [M] of the kernel's integral operator, coefficients v [M, C], n samples -> Eigenlearning
    Range: 𝓛_i in [0, 1], Σ𝓛_i ≤ n; undefined where n ≥ rank and ridge = 0 (the samples fix every mode, κ = 0)
    Source: Simon et al. 2023
    Pitfalls: noise-free targets; eigenvalues of K/n on the probes stand for the operator's, the small ones poorly

    >>> curve = eigenlearning(torch.ones(10), torch.ones(10, 1), n=4)
    >>> round(float(curve.error), 9)
    6.0
    """
    return _eigenlearning(spectrum, coefficients, n, ridge)


def _eigenlearning(spectrum: Tensor, coefficients: Tensor, n: float, ridge: float) -> Eigenlearning:
    if spectrum.ndim != 1:
        raise ValueError(f"spectrum must be [M]; got shape {tuple(spectrum.shape)}; pass metrics.eigenvalues(k)")
    modes, floor = floored(spectrum)
    order = spectrum.argsort(descending=True)
    v = columns(coefficients, len(modes), "coefficients")[order]
    rank = int((modes > floor).sum())
    if not (n > 0 and ridge >= 0):
        raise ValueError(f"n must be > 0 and ridge ≥ 0; got {n} and {ridge}; pass samples and an unscaled ridge")
    if ridge == 0 and n >= rank:
        raise Undefined(f"{n} samples fix all {rank} modes of the kernel")
    kappa = _kappa(modes, n, ridge)
    learnability = modes / (modes + kappa)
    error = ((1 - learnability).square() * v.square().sum(1)).sum() * n / (n - learnability.square().sum())
    return Eigenlearning(kappa, learnability[order.argsort()], error)


@metric(lambda k, y, samples, *_, **__: nan(k).repeat(len(samples)))
def learning_curve(
    k: Tensor, y: Tensor, samples: Sequence[float], ridge: float = 0.0, *, floor: float | None = None
) -> Tensor:
    """Expected error of kernel regression on the probes it was not given, from so many of them.

    Formula: (n·E − s·E_train)/(n − s) at s samples of n probes, E of `eigenlearning` at λ_i = λ_i(K)/n and coefficients
        u_iᵀy/√n, E_train = (ridge/(s·κ))²·E
    Shape: k [n, n], y [n, C], samples of length S, each in (0, n) -> [S]; squared errors, summed over C
    Range: [0, ∞), ‖y‖²/n without samples; undefined where s ≥ rank K and ridge = 0, or anything is not finite
    Source: Simon et al. 2023 (E, and the train error as a multiple of it)
    Pitfalls: a mean over draws of the samples; the probes stand for the distribution, so s is at most n

    >>> learning_curve(torch.eye(4), torch.ones(4, 1), [1, 2]).round(decimals=6)
    tensor([1., 1.], dtype=torch.float64)
    """
    n = len(k)
    if not all(0 < s < n for s in samples):
        raise ValueError(f"samples must lie in (0, {n}); got {list(samples)}; pass fewer than there are probes")
    spectrum, vectors, noise = eigensystem(k, floor, "k")
    spectrum = torch.where(spectrum > noise, spectrum, torch.zeros_like(spectrum))
    coefficients = vectors.mT @ columns(y, n) / math.sqrt(n)
    errors = []
    for s in samples:
        found = _eigenlearning(spectrum / n, coefficients, s, ridge)
        train = (ridge / (s * found.kappa)) ** 2 * found.error
        errors.append(((n * found.error - s * train) / (n - s)).clamp(min=0))
    return torch.stack(errors)


def _kappa(modes: Tensor, n: float, ridge: float) -> Tensor:
    """The κ > 0 with Σλ/(λ + κ) + ridge/κ = n, by bisection of its logarithm; κ ≤ (Σλ + ridge)/n."""
    high = ((modes.sum() + ridge) / n).log()
    low = high - 700
    for _ in range(70):  # 700/2^70: below the spacing of float64
        middle = (low + high) / 2
        kappa = middle.exp()
        too_small = (modes / (modes + kappa)).sum() + ridge / kappa > n
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    return ((low + high) / 2).exp()
