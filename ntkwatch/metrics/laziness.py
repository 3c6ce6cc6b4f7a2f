"""Lazy or rich, without a kernel in time: non-linearity of the motion, and motion of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import alike, finite, real
from ntkwatch.metrics.undefined import Undefined, metric, nan


def _motion(df: Tensor, jdtheta: Tensor, f: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """‖Δf − J_0Δθ‖, ‖Δf‖, ‖J_0Δθ‖; undefined at no motion, and below rounding."""
    df, jdtheta = alike(df, jdtheta, ("df", "jdtheta"))
    moved, linear = finite(df, "df").norm(), finite(jdtheta, "jdtheta").norm()
    noise = 0.0 if f is None else 100 * torch.finfo(f.dtype).eps * float(real(f, "f").norm())
    if moved == 0:
        raise Undefined("the outputs have not moved yet")
    if moved <= noise:
        raise Undefined(f"the motion is below rounding: the outputs moved by {moved:.1e}, no more than 100·eps·‖f‖")
    return (df - jdtheta).norm(), moved, linear


@metric()
def taylor_ratio(df: Tensor, jdtheta: Tensor, f: Tensor | None = None) -> Tensor:
    """Non-linearity of the motion since the baseline: 0 for a lazy network, near 1 for a rich one.

    Formula: ρ = ‖Δf − J_0Δθ‖/(‖Δf‖ + ‖J_0Δθ‖), Δf = f(θ_t) − f(θ_0), Δθ = θ_t − θ_0
    Shape: df and jdtheta of one shape, [n, C]; f the outputs in the precision they were computed in -> []
    Range: [0, 1]; undefined at Δf = 0 and, with f given, where ‖Δf‖ ≤ 100·eps·‖f‖
    Source: linearisation of Lee et al. 2019 and Chizat et al. 2019; the symmetric ratio is this library's
    Pitfalls: shrinking a ReLU net moves it at angle 0: read it beside kernel_scale and kernel_angle; read it at matched
        training loss, for it grows along a run; in reduced precision (autocast, bfloat16 weights) outputs round by more
        than a lazy network moves them: what is recorded is held against that, as measured

    >>> round(float(taylor_ratio(torch.tensor([[3.0]]), torch.tensor([[1.0]]))), 12)
    0.5
    """
    error, moved, linear = _motion(df, jdtheta, f)
    return error / (moved + linear)


@metric()
def linearization_error(df: Tensor, jdtheta: Tensor, f: Tensor | None = None) -> Tensor:
    """Share of the motion that the baseline's tangent does not explain.

    Formula: R = ‖Δf − J_0Δθ‖/‖Δf‖
    Shape: df and jdtheta of one shape, [n, C]; f the outputs in the precision they were computed in -> []
    Range: [0, ∞); undefined as taylor_ratio is
    Source: Lee et al. 2019
    Pitfalls: above 1 is overshoot or near-orthogonality; instability only together with a stability ratio above 1 or
        a falling scale

    >>> round(float(linearization_error(torch.tensor([[3.0]]), torch.tensor([[1.0]]))), 6)
    0.666667
    """
    error, moved, _ = _motion(df, jdtheta, f)
    return error / moved


@metric()
def one_step_error(df: Tensor, theta: Tensor, grad: Tensor, lr: float) -> Tensor:
    """Self-test of kernel, mode and parameter set: one gradient step against what the kernel predicts for it.

    Formula: ‖Δf + ηΘ∇_f𝓛‖/‖ηΘ∇_f𝓛‖, Δf = f(θ − η∇_θ𝓛) − f(θ)
    Shape: df, grad [n, C] (grad = ∂𝓛/∂f, 1/n included), theta full [n, C, n, C] -> []
    Range: [0, ∞), proportional to η as η → 0; undefined where Θ∇_f𝓛 = 0
    Source: Jacot et al. 2018 (df/dt = −Θ∇_f𝓛)
    Pitfalls: needs the full kernel (the trace kernel stalls at 4 %) over the very batch of the step

    >>> theta = torch.eye(2).reshape(2, 1, 2, 1)
    >>> float(one_step_error(torch.tensor([[-0.5], [0.0]]), theta, torch.tensor([[1.0], [0.0]]), lr=0.5))
    0.0
    """
    df, grad = alike(df, grad, ("df", "grad"))
    theta = finite(real(theta, "theta"), "theta")
    if tuple(theta.shape) != (*df.shape, *df.shape):
        wanted = [*df.shape, *df.shape]
        raise ValueError(f"theta must be {wanted}; got shape {tuple(theta.shape)}; use reduction='full'")
    predicted = -lr * torch.tensordot(theta, finite(grad, "grad"), dims=df.ndim)
    if not bool(predicted.any()):
        raise Undefined("the kernel predicts no motion")
    return (finite(df, "df") - predicted).norm() / predicted.norm()


@metric(lambda theta, *_, **__: nan(*theta.values()))
def parameter_distance(theta: Mapping[str, Tensor], theta0: Mapping[str, Tensor]) -> Tensor:
    """How far the parameters went, against where they started.

    Formula: ‖θ − θ_0‖/‖θ_0‖ over all tensors given (those of a layer, for that layer's)
    Shape: two mappings with the same names and shapes -> []
    Range: [0, ∞); undefined where θ_0 is zero or a parameter is not finite
    Source: Chizat et al. 2019
    Pitfalls: log it, never score it: at fixed richness it falls with width in n × n layers

    >>> float(parameter_distance({"w": torch.tensor([3.0, 3.0])}, {"w": torch.tensor([3.0, 0.0])}))
    1.0
    """
    if not theta0 or set(theta) != set(theta0):
        names = sorted(set(theta) ^ set(theta0)) or "no names"
        raise ValueError(f"theta and theta0 must name the same parameters; got {names} in one alone; pass both whole")
    pairs = [alike(theta[name], theta0[name], (f"theta[{name!r}]", f"theta0[{name!r}]")) for name in theta0]
    moved, start = (torch.stack(x).norm() for x in zip(*[((a - b).norm(), b.norm()) for a, b in pairs], strict=True))
    finite(torch.stack([moved, start]), "the parameters")
    if start == 0:
        raise Undefined("the baseline parameters are zero")
    return moved / start


@metric()
def spectral_update(w: Tensor, w0: Tensor) -> Tensor:
    """Size of a weight's update in the norm that decides how far it moves the features.

    Formula: ‖W − W_0‖₂/‖W_0‖₂, largest singular values; a convolution's [out, in, …] is taken as [out, in·…]
    Shape: two weights of one shape, [out, in, …] -> []
    Range: [0, ∞); undefined where W_0 is zero or a weight not finite
    Source: Yang, Simon & Bernstein 2023
    Pitfalls: width laws (flat in muP, n^(−1/2) in NTP) hold at matched training

    >>> float(spectral_update(torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)))
    1.0
    """
    w, w0 = alike(w, w0, ("w", "w0"))
    if w.ndim < 2:
        raise ValueError(f"w must be [out, in, …]; got shape {tuple(w.shape)}; pass weights, not biases")
    w, w0 = finite(w, "the weight").flatten(1), finite(w0, "the baseline weight").flatten(1)
    start = _spectral_norm(w0)
    if start == 0:
        raise Undefined("the baseline weight is zero")
    return _spectral_norm(w - w0) / start


def _spectral_norm(w: Tensor) -> Tensor:
    """By the smaller Gram matrix: it keeps the digits of the largest singular value and costs a sixth of them all."""
    size = w.abs().max()
    if size == 0:
        return size
    w = w / size  # squares neither overflow nor vanish
    gram = w @ w.mT if len(w) <= w.shape[1] else w.mT @ w
    return size * torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()


@metric()
def neural_feature_correlation(w: Tensor, gradients: Tensor, w0: Tensor | None = None) -> Tensor:
    """Whether a layer's weights point where the function's gradients do.

    Formula: cos(WᵀW, (1/N) Σ_n G_nᵀG_n), G_n = ∂f(x_n)/∂(input of the layer); with w0 given, W − W_0 in W's place
    Shape: w, w0 [out, in], gradients [N, C, in] -> []
    Range: [0, 1]; undefined where a factor is zero or not finite
    Source: Radhakrishnan et al. 2024; Beaglehole et al. 2024 (the form with W − W_0)
    Pitfalls: counterexamples are known: a correlation, not a law

    >>> w = torch.tensor([[1.0, 0.0]])
    >>> float(neural_feature_correlation(w, torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]]])))
    1.0
    """
    w, gradients = real(w, "w"), real(gradients, "gradients")
    if w0 is not None:
        w = w - alike(w, w0, ("w", "w0"))[1]
    if w.ndim != 2 or gradients.ndim != 3 or gradients.shape[-1] != w.shape[-1]:
        got = f"{tuple(w.shape)} and {tuple(gradients.shape)}"
        raise ValueError(f"w and gradients must be [out, in] and [N, C, in]; got {got}; use the layer's own input")
    weight = finite(w, "the weight").mT @ w
    outer = torch.einsum("nci,ncj->ij", finite(gradients, "the gradients"), gradients)
    norms = weight.norm() * outer.norm()
    if norms == 0:
        raise Undefined("the weight or the gradients are zero")
    return (weight * outer).sum() / norms
