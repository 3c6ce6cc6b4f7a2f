"""Uncertainty from the kernel: Gaussian-process posteriors of wide networks, and whether they are calibrated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import columns, finite, real, symmetric
from ntkwatch.metrics.regression import cross_rows, inverse
from ntkwatch.metrics.undefined import Undefined, metric, nan


@dataclass(frozen=True)
class Posterior:
    """A Gaussian process at m test points: mean [m, C] and one covariance [m, m] that all outputs share."""

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """Of each test point, [m]; rounding below 0 is 0."""
        return self.covariance.diagonal().clamp(min=0)


def _square(s: Tensor, m: int, name: str) -> Tensor:
    s = symmetric(s, name)
    if len(s) != m:
        raise ValueError(f"{name} must be [{m}, {m}]; got shape {tuple(s.shape)}; use the probes of the other kernels")
    return s


def _nan_posterior(k_train: Tensor, y: Tensor, k_test: Tensor, *_: object, **__: object) -> Posterior:
    m = len(k_test)
    return Posterior(nan(k_train).repeat(m, y.shape[1]), nan(k_train).repeat(m, m))


@metric(_nan_posterior)
def gp_posterior(
    k_train: Tensor,
    y: Tensor,
    k_test: Tensor,
    s_train: Tensor,
    s_cross: Tensor,
    s_test: Tensor,
    ridge: float = 0.0,
    *,
    floor: float | None = None,
) -> Posterior:
    """What an ensemble of infinitely wide networks predicts after training: mean and covariance over initialisations.

    Formula: A = Θ_*(Θ + ridge·I)⁻¹; mean Ay; covariance S_** + ASAᵀ − (AS_*ᵀ + S_*Aᵀ), Θ the NTK, S the NNGP kernel
    Shape: k_train, s_train [n, n], k_test, s_cross [m, n] (test rows), s_test [m, m], y [n, C] -> Posterior
    Range: covariance positive semi-definite; undefined where anything is not finite
    Source: Lee et al. 2019
    Pitfalls: not a Bayesian posterior unless Θ ∝ S; S is analytic: one finite net has none, see ntkgp_posterior

    >>> k, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> gp_posterior(k, y, k, k, k, k).variance
    tensor([0., 0.], dtype=torch.float64)
    """
    n, m = len(k_train), len(k_test)
    target, inverted = columns(y, n), inverse(k_train, ridge, floor, "k_train")[0]
    a = cross_rows(k_test, n) @ inverted
    crossed = a @ cross_rows(s_cross, n, "s_cross").mT
    if crossed.shape != (m, m):
        raise ValueError(f"s_cross must have {m} rows; got shape {tuple(s_cross.shape)}; use the test points of k_test")
    prior, trained = _square(s_test, m, "s_test"), a @ _square(s_train, n, "s_train") @ a.mT
    return Posterior(a @ target, prior + trained - crossed - crossed.mT)


@metric(_nan_posterior)
def ntkgp_posterior(
    k_train: Tensor, y: Tensor, k_test: Tensor, k_test_test: Tensor, ridge: float = 0.0, *, floor: float | None = None
) -> Posterior:
    """The posterior of a Gaussian process whose prior covariance is the tangent kernel: all that one finite net has.

    Formula: mean Θ_*(Θ + ridge·I)⁻¹y; covariance Θ_** − Θ_*(Θ + ridge·I)⁻¹Θ_*ᵀ
    Shape: k_train [n, n], y [n, C], k_test [m, n] (test rows), k_test_test [m, m] -> Posterior
    Range: covariance positive semi-definite; undefined where anything is not finite
    Source: He et al. 2020 (NTKGP)
    Pitfalls: not the spread of trained networks, which gp_posterior is; its scale is the
        parametrisation's: calibrate it

    >>> k, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> ntkgp_posterior(k, y, k, k, ridge=1.0).variance
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    n, m = len(k_train), len(k_test)
    target, rows, inverted = columns(y, n), cross_rows(k_test, n), inverse(k_train, ridge, floor, "k_train")[0]
    prior = _square(k_test_test, m, "k_test_test")
    return Posterior(rows @ inverted @ target, prior - rows @ inverted @ rows.mT)


def _predictive(mean: Tensor, variance: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors and variances [m, C]."""
    mean, variance = real(mean, "mean"), real(variance, "variance")
    target = columns(y, len(mean))
    variance = variance[:, None].expand_as(target) if variance.ndim == 1 and len(variance) == len(target) else variance
    if mean.shape != target.shape or variance.shape != target.shape:
        got = f"{tuple(mean.shape)}, {tuple(variance.shape)} and {tuple(target.shape)}"
        raise ValueError(f"mean, variance and y must be [m, C], [m] or [m, C] and [m, C]; got {got}; match them")
    if bool((finite(variance, "the variance") <= 0).any()):
        raise Undefined(f"the variance is not positive at {int((variance <= 0).sum())} points")
    return (finite(mean, "the mean") - target).square(), variance


@metric()
def gaussian_nll(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of the targets under independent Gaussians: accuracy and calibration in one number.

    Formula: mean over points and outputs of ½·log(2πσ²) + (y − μ)²/(2σ²)
    Shape: mean [m, C], variance [m] or [m, C], y [m, C] -> []
    Range: (−∞, ∞) nats; undefined where a variance is not positive
    Source: Rasmussen & Williams 2006
    Pitfalls: compares predictions of one data set only; one overconfident point dominates it

    >>> round(float(gaussian_nll(torch.zeros(1, 1), torch.ones(1), torch.zeros(1, 1))), 6)
    0.918939
    """
    error, variance = _predictive(mean, variance, y)
    return (torch.log(2 * math.pi * variance) + error / variance).mean() / 2


@metric()
def coverage(mean: Tensor, variance: Tensor, y: Tensor, level: float = 0.95) -> Tensor:
    """Share of the targets inside the central interval that should hold `level` of them.

    Formula: share of |y − μ| ≤ √2·erf⁻¹(level)·σ over points and outputs
    Shape: mean [m, C], variance [m] or [m, C], y [m, C] -> []
    Range: [0, 1], equal to level when calibrated; undefined where a variance is not positive
    Source: Rasmussen & Williams 2006
    Pitfalls: known to √(level(1 − level)/m); wide intervals cover too: read it beside gaussian_nll

    >>> float(coverage(torch.zeros(2, 1), torch.ones(2), torch.tensor([[1.9], [2.0]])))
    0.5
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1); got {level}; pass a share such as 0.95")
    error, variance = _predictive(mean, variance, y)
    width = math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=variance.dtype, device=variance.device))
    return (error.sqrt() <= width * variance.sqrt()).double().mean()
