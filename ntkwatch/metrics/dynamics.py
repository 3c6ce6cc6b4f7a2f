"""What the kernel says about optimisation: curvature, the edge of stability, time constants, gradient flow.

Curvatures μ are eigenvalues of H^½ΘH^½ with H = ∂²𝓛/∂f² of the user's reduced loss: H holds 1/n already.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import columns, finite, real
from ntkwatch.metrics.spectrum import eigensystem, floored
from ntkwatch.metrics.undefined import Undefined, metric, nan


def _curvature(mu: float | Tensor) -> Tensor:
    mu = torch.as_tensor(mu, dtype=torch.float64)
    if bool((mu < 0).any()):
        raise ValueError(f"mu must be ≥ 0; got {float(mu.min())}; pass eigenvalues of H^½ΘH^½")
    return finite(mu, "the curvature")


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1); got {value}; pass the optimizer's own")
    return value


def _edge(momentum: float, nesterov: bool, dampening: float) -> float:
    """The product η·μ at which a quadratic's direction stops converging."""
    beta = _share("momentum", momentum)
    if nesterov and dampening:
        raise ValueError(f"dampening must be 0 with nesterov=True; got {dampening}; torch refuses the pair too")
    return 2 * (1 + beta) / ((1 + 2 * beta) if nesterov else 1) / (1 - _share("dampening", dampening))


@metric()
def max_stable_lr(
    mu_max: float | Tensor, momentum: float = 0.0, nesterov: bool = False, *, dampening: float = 0.0
) -> Tensor:
    """Largest learning rate at which full-batch gradient descent is stable.

    Formula: 2(1 + β)/μ_max for heavy ball β (2/μ_max without momentum), over (1 + 2β) for Nesterov, over
        (1 − dampening)
    Shape: mu_max a number or [], the largest eigenvalue of H^½ΘH^½ (for nn.MSELoss 2·λ_max(Θ)/(nC)) -> []
    Range: (0, ∞); undefined at μ_max = 0, where every rate is stable
    Source: Polyak 1964 (heavy ball); Nesterov 1983; Cohen et al. 2021 (networks train at it)
    Pitfalls: full batches, a quadratic loss and the full Θ; μ_max from few probes is biased up

    >>> round(float(max_stable_lr(3.0)), 6), round(float(max_stable_lr(1.0, momentum=0.9)), 6)
    (0.666667, 3.8)
    >>> round(float(max_stable_lr(1.0, momentum=0.9, nesterov=True)), 6)
    1.357143
    """
    mu, edge = _curvature(mu_max), _edge(momentum, nesterov, dampening)
    if mu == 0:
        raise Undefined("the curvature is zero: every learning rate is stable")
    return edge / mu


@metric()
def stability_ratio(
    mu_max: float | Tensor, lr: float, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0
) -> Tensor:
    """The learning rate as a share of the largest stable one.

    Formula: η·μ_max/2; heavy ball η·μ_max/(2(1 + β)); Nesterov η·μ_max(1 + 2β)/(2(1 + β)); dampening τ: η(1 − τ)
    Shape: mu_max a number or [] -> []
    Range: [0, ∞), unstable above 1
    Source: Cohen et al. 2021; Polyak 1964; Nesterov 1983
    Pitfalls: a network trained at the edge hovers about 1 without diverging

    >>> round(float(stability_ratio(2.0, lr=0.5)), 6), round(float(stability_ratio(2.0, lr=0.5, momentum=0.9)), 6)
    (0.5, 0.263158)
    """
    return lr * _curvature(mu_max) / _edge(momentum, nesterov, dampening)


@metric()
def adam_stability_ratio(mu_max: float | Tensor, lr: float, beta1: float = 0.9, step: int | None = None) -> Tensor:
    """Adam's learning rate as a share of the largest stable one.

    Formula: η·μ_max(1 − β1)/(2(1 + β1)), μ_max of H^½JD⁻¹JᵀH^½, D = diag(√v̂ + ε), at an early step t times 1 − β1^t
    Shape: mu_max a number or [], of the preconditioned curvature -> []
    Range: [0, ∞), unstable above 1
    Source: Cohen et al. 2022
    Pitfalls: takes the preconditioner as frozen; μ_max of the plain kernel is the wrong one; step= is for a μ_max
        without the factor 1 − β1^t

    >>> round(float(adam_stability_ratio(38.0, lr=1.0)), 12)
    1.0
    """
    beta = _share("beta1", beta1)
    warm = 1.0 if step is None else 1 - beta**step  # of the preconditioner: m̂ = m/(1 − β1^t) makes early steps longer
    return lr * _curvature(mu_max) * (1 - beta) / (2 * (1 + beta) * warm)


@metric(lambda mu, *_, **__: torch.full_like(torch.as_tensor(mu, dtype=torch.float64), torch.nan))
def time_constants(mu: float | Tensor, lr: float, momentum: float = 0.0) -> Tensor:
    """Steps in which each direction's error falls by e, in the limit of small learning rates.

    Formula: (1 − β)/(η·μ_i)
    Shape: a number or any shape -> the same
    Range: (0, ∞], ∞ where μ = 0 (a fitted cross-entropy)
    Source: Jacot et al. 2018; the heavy-ball speed-up of Polyak 1964
    Pitfalls: off once η·μ is not small: see discrete_time_constants

    >>> round(float(time_constants(1.0, lr=0.005)), 6), round(float(time_constants(1.0, lr=0.005, momentum=0.9)), 6)
    (200.0, 20.0)
    """
    return (1 - _share("momentum", momentum)) / (lr * _curvature(mu))


@metric(lambda mu, *_, **__: torch.full_like(torch.as_tensor(mu, dtype=torch.float64), torch.nan))
def discrete_time_constants(mu: float | Tensor, lr: float, momentum: float = 0.0, nesterov: bool = False) -> Tensor:
    """Steps in which each direction's error falls by e, at the learning rate as it is.

    Formula: −1/log|z|, z the larger root of z² − (1 + β − η·μ)z + β (heavy ball) or
        z² − (1 + β)(1 − η·μ)z + β(1 − η·μ) (Nesterov); without momentum −1/log|1 − η·μ|
    Shape: a number or any shape -> the same
    Range: (0, ∞] where stable, ∞ where μ = 0; negative where unstable: the steps in which the error grows by e
    Source: Polyak 1964; Nesterov 1983
    Pitfalls: complex roots ring: the envelope falls so, not the error itself

    >>> round(float(discrete_time_constants(1.0, lr=0.5)), 6)
    1.442695
    >>> round(float(discrete_time_constants(1.0, lr=0.005, momentum=0.9)), 6)
    18.982443
    """
    beta, x = _share("momentum", momentum), lr * _curvature(mu)
    # In w = 1 − z the equation is w² − p·w + x = 0 for both methods: small rates lose no digits there.
    p = 1 - beta + x * (1 + beta if nesterov else 1)
    root = (p**2 - 4 * x).to(torch.complex128).sqrt()
    w = torch.stack([(p + root) / 2, 2 * x / (p + root)])
    rate = -torch.log1p(w.abs().square() - 2 * w.real).amax(0) / 2
    return torch.where(x == 0, torch.inf, 1 / rate)


@metric(lambda theta, *_, **__: nan(theta).repeat(theta.shape[0] * theta.shape[1]))
def gauss_newton_spectrum(theta: Tensor, hess: Tensor, floor: float | None = None) -> Tensor:
    """Curvatures of the loss along the directions the network can move in.

    Formula: eigenvalues of H^½ΘH^½ = the nonzero ones of JᵀHJ, H = ∂²𝓛/∂f² block by block (1/n included)
    Shape: theta [n, C, n, C], hess [n, C, C] in float64 from float64 outputs, floor that of theta -> [nC], descending
    Range: [0, ∞), for mean cross-entropy at most λ_max(Θ)/(2n); undefined where H is indefinite or anything not finite
    Source: Schraudolph 2002 (Gauss-Newton); Jacot et al. 2018
    Pitfalls: leaves out the loss's own bend, Σ ∂𝓛/∂f·∇²f; from few probes μ_max is biased up (6.2 at 8, 4.97 at 1,000)

    >>> theta, hess = torch.eye(2).reshape(2, 1, 2, 1), torch.full((2, 1, 1), 0.5)
    >>> gauss_newton_spectrum(theta, hess)
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    kernel, curvature = real(theta, "theta"), real(hess, "hess")
    n, c = (*hess.shape, 0)[:2]
    if tuple(theta.shape) != (n, c, n, c) or tuple(hess.shape) != (n, c, c):
        got = f"{tuple(theta.shape)} and {tuple(hess.shape)}"
        raise ValueError(f"theta and hess must be [n, C, n, C] and [n, C, C]; got {got}; use reduction='full'")
    values, vectors = torch.linalg.eigh(finite(curvature, "the loss's Hessian"))
    bend = float(values.abs().max())
    if values.min() < -c * torch.finfo(hess.dtype).eps * bend:
        raise Undefined("the loss's Hessian in the outputs is indefinite")
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    noise = floored(theta, floor)[1] * bend  # of Θ, not of the product: H may cancel the largest part of Θ
    return floored(torch.einsum("nab,nbmc,mcd->namd", root, kernel, root), noise)[0]


def _modes(k: Tensor, f0: Tensor, y: Tensor, floor: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors, targets and the error's coordinates Vᵀ(f0 − y) [n, C]."""
    spectrum, vectors, _ = eigensystem(k, floor)
    target = columns(y, len(k))
    start = columns(f0, len(k), "f0")
    if start.shape != target.shape:
        raise ValueError(f"f0 and y must have one shape; got {tuple(f0.shape)} and {tuple(y.shape)}; match the columns")
    return spectrum, vectors, target, vectors.mT @ (start - target)


@metric(lambda k, f0, *_, **__: nan(k).repeat(f0.shape))
def gradient_flow(k: Tensor, f0: Tensor, y: Tensor, t: float, lr: float = 1.0, *, floor: float | None = None) -> Tensor:
    """Outputs on the probes at time t if the kernel stayed as it is.

    Formula: y + e^(−lr·K·t)(f0 − y), for 𝓛 = ½‖f − y‖²; nn.MSELoss passes lr·2/(nC)
    Shape: k [n, n] (taken as Θ = K ⊗ I for C > 1), f0 and y [n, C] -> [n, C]
    Range: from f0 at t = 0 to y on the kernel's range; undefined where anything is not finite
    Source: Jacot et al. 2018; Lee et al. 2019
    Pitfalls: of the training probes only; the trace kernel stands for Θ here, exact for C = 1

    >>> k, y = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), torch.tensor([[1.0], [0.0]]).double()
    >>> gradient_flow(k, torch.zeros(2, 1), y, t=0.5).flatten()
    tensor([0.5852, 0.1917], dtype=torch.float64)
    """
    if not (t >= 0 and math.isfinite(t)):
        raise ValueError(f"t must be finite and ≥ 0; got {t}; pass steps, or time with lr=1")
    spectrum, vectors, target, error = _modes(k, f0, y, floor)
    return target + vectors @ (torch.exp(-lr * t * spectrum)[:, None] * error)


@metric(lambda k, f0, *_, **__: nan(k).repeat(f0.shape))
def gradient_descent(
    k: Tensor, f0: Tensor, y: Tensor, steps: int, lr: float = 1.0, *, floor: float | None = None
) -> Tensor:
    """Outputs on the probes after some steps of gradient descent if the kernel stayed as it is.

    Formula: y + (I − lr·K)^steps (f0 − y), for 𝓛 = ½‖f − y‖²; nn.MSELoss passes lr·2/(nC)
    Shape: k [n, n] (taken as Θ = K ⊗ I for C > 1), f0 and y [n, C] -> [n, C]
    Range: grows without bound above lr = 2/λ_max; undefined where anything is not finite
    Source: Lee et al. 2019
    Pitfalls: no momentum: under heavy ball it is far too slow

    >>> k, y = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), torch.tensor([[1.0], [0.0]]).double()
    >>> gradient_descent(k, torch.zeros(2, 1), y, steps=4, lr=0.5).flatten().round(decimals=12).abs()
    tensor([0.9375, 0.0000], dtype=torch.float64)
    """
    if steps < 0 or steps != int(steps):
        raise ValueError(f"steps must be a whole number ≥ 0; got {steps}; use gradient_flow for times in between")
    spectrum, vectors, target, error = _modes(k, f0, y, floor)
    return target + vectors @ ((1 - lr * spectrum).pow(int(steps))[:, None] * error)
