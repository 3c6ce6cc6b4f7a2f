"""How far the kernel moved, apart from how much it grew: distances, the angle, the scale, a path of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import alike, finite, matrices, probe_kernel, subject
from ntkwatch.metrics.undefined import Undefined, metric, nan


def unit(k: Tensor, name: str = "k") -> Tensor:
    """K/‖K‖ in the Frobenius norm, free of overflow and underflow."""
    top = finite(k, name).abs().max()
    if top == 0:
        raise Undefined(f"{subject(name)} is zero")
    k = k / top
    return k / k.norm()


def _chord(k: Tensor, k0: Tensor) -> Tensor:
    k, k0 = alike(k, k0, ("k", "k0"))
    return (unit(k) - unit(k0, "k0")).norm()


def _angle(k: Tensor, k0: Tensor) -> Tensor:
    return 2 * torch.asin((_chord(k, k0) / 2).clamp(max=1))


@metric()
def kernel_distance(k: Tensor, k0: Tensor) -> Tensor:
    """Rotation of the kernel since the baseline, quadratic in the change.

    Formula: 1 − cos(K, K₀), computed as ‖K̂ − K̂₀‖²/2 with K̂ = K/‖K‖ (Frobenius), exact near 0
    Shape: k and k0 of one shape, any -> []
    Range: [0, 1] for positive semi-definite kernels; undefined where a kernel is zero or not finite
    Source: Fort et al. 2020
    Pitfalls: quadratic, so slopes against width come out doubled: use kernel_angle for slopes; the trace kernel
        under-reports the full one

    >>> round(float(kernel_distance(torch.eye(6), torch.eye(6) + 1)), 12)
    0.333333333333
    """
    return _chord(k, k0) ** 2 / 2


@metric()
def kernel_angle(k: Tensor, k0: Tensor) -> Tensor:
    """Rotation of the kernel since the baseline, linear in the change.

    Formula: 2·arcsin(‖K̂ − K̂₀‖/2) = arccos cos(K, K₀), with K̂ = K/‖K‖ (Frobenius)
    Shape: k and k0 of one shape, any -> []
    Range: [0, π/2] radians for positive semi-definite kernels; undefined where a kernel is zero or not finite
    Source: the arccos of the similarity of Fort et al. 2020
    Pitfalls: too small with few probes (.132 at 8, .202 at 64, .204 at 128 in one run): compare runs on the same
        probes; the trace kernel under-reports the full one by a quarter or more

    >>> round(float(kernel_angle(torch.eye(2), torch.ones(2, 2))), 6)
    0.785398
    """
    return _angle(k, k0)


@metric()
def kernel_scale(k: Tensor, k0: Tensor) -> Tensor:
    """Growth of the kernel since the baseline, apart from its rotation.

    Formula: log(tr K/tr K₀), natural logarithm
    Shape: [n, n], blocks [C, n, n] or full [n, C, n, C], both alike -> []
    Range: (−∞, ∞), 0 at the baseline; undefined where a trace is not positive
    Source: Atanasov et al. 2022
    Pitfalls: report it, never score it: shrinking a ReLU net moves it at angle 0

    >>> round(float(kernel_scale(torch.eye(3) * 2, torch.eye(3))), 6)
    0.693147
    """
    alike(k, k0, ("k", "k0"))
    return torch.log(_trace(k, "k")) - torch.log(_trace(k0, "k0"))


def _trace(k: Tensor, name: str) -> Tensor:
    trace = finite(matrices(k, name), name).diagonal(dim1=-2, dim2=-1).sum()
    if trace <= 0:
        raise Undefined(f"the trace of {subject(name)} is not positive")
    return trace


@metric()
def kernel_share(k_layer: Tensor, k: Tensor) -> Tensor:
    """Share of a layer in the kernel.

    Formula: tr K_l/tr K
    Shape: [n, n], blocks [C, n, n] or full [n, C, n, C], both alike -> []
    Range: [0, 1] when K is the sum of the layers' kernels; undefined where tr K is not positive
    Source: Baratin et al. 2021 (the layers' kernels)
    Pitfalls: depends on the parametrisation: rescaling two layers against each other moves it at the same function

    >>> float(kernel_share(torch.eye(3), 4 * torch.eye(3)))
    0.25
    """
    alike(k_layer, k, ("k_layer", "k"))
    return finite(matrices(k_layer), "k_layer").diagonal(dim1=-2, dim2=-1).sum() / _trace(k, "k")


@metric()
def relative_change(k: Tensor, k0: Tensor) -> Tensor:
    """Change of the kernel, rotation and growth together, as the theory papers measure it.

    Formula: ‖K − K₀‖/‖K₀‖ = √((r−1)² + 4r·sin²(angle/2)), r = ‖K‖/‖K₀‖
    Shape: k and k0 of one shape, any -> []
    Range: [0, ∞); undefined where the baseline is zero or a kernel is not finite
    Source: Lee et al. 2019; Geiger et al. 2020
    Pitfalls: mixes scale and angle (16 was seen): read those two instead of a threshold on this

    >>> float(relative_change(3 * torch.eye(2), torch.eye(2)))
    2.0
    """
    k, k0 = alike(k, k0, ("k", "k0"))
    top = finite(k0, "k0").abs().max()
    if top == 0:
        raise Undefined("the baseline kernel is zero")
    return ((finite(k, "k") - k0) / top).norm() / (k0 / top).norm()


@metric(lambda k: nan(k).repeat(k.shape))
def center(k: Tensor) -> Tensor:
    """The kernel with its constant function taken out.

    Formula: K̃ = C K C, C = I − 11ᵀ/n; exactly 0 where ‖K̃‖ ≤ n·eps·‖K‖, eps that of k's dtype
    Shape: [n, n] -> [n, n]
    Range: positive semi-definite if K is; undefined where K is not finite
    Source: Cortes et al. 2012
    Pitfalls: a kernel dominated by its mean loses as many digits as ‖K‖/‖K̃‖ has

    >>> center(torch.ones(3, 3)).abs().max()
    tensor(0., dtype=torch.float64)
    """
    return _centred(k, "k")


def _centred(k: Tensor, name: str) -> Tensor:
    x = probe_kernel(k, name)
    centred = x - x.mean(0) - (x - x.mean(0)).mean(1, keepdim=True)
    noise = len(x) * torch.finfo(k.dtype).eps * x.norm()
    return centred if centred.norm() > noise else torch.zeros_like(x)


def centred_unit(k: Tensor, name: str = "k") -> Tensor:
    """K̃/‖K̃‖, undefined below three probes (every centred pair is parallel there) and at K̃ = 0."""
    centred = _centred(k, name)
    if len(k) < 3:
        raise Undefined(f"a centred quantity needs at least 3 probes and has {len(k)}")
    if not bool(centred.any()):
        raise Undefined(f"{subject(name)} is zero once centred")
    return unit(centred, name)


@metric()
def cka(k: Tensor, k0: Tensor) -> Tensor:
    """Centred kernel alignment: the cosine of two kernels without their constant function.

    Formula: cos(K̃, K̃₀), K̃ = C K C, C = I − 11ᵀ/n
    Shape: [n, n], [n, n] -> []
    Range: [0, 1] for positive semi-definite kernels; undefined below 3 probes and where a centred kernel is zero
    Source: Cortes et al. 2012; Kornblith et al. 2019
    Pitfalls: never bootstrap the rows: a repeated probe puts diagonal entries off the diagonal (.153 became .244);
        jackknife instead

    >>> round(float(cka(torch.eye(4), torch.eye(4) + 5)), 12)
    1.0
    """
    alike(k, k0, ("k", "k0"))
    return 1 - _chord(centred_unit(k), centred_unit(k0, "k0")) ** 2 / 2


@metric()
def centered_distance(k: Tensor, k0: Tensor) -> Tensor:
    """Rotation of the kernel since the baseline, without the constant function.

    Formula: 1 − CKA(K, K₀), computed as ‖K̂ − K̂₀‖²/2 of the centred kernels
    Shape: [n, n], [n, n] -> []
    Range: [0, 1] for positive semi-definite kernels; undefined below 3 probes and where a centred kernel is zero
    Source: Cortes et al. 2012; Kornblith et al. 2019
    Pitfalls: quadratic in the change, as kernel_distance is

    >>> round(float(centered_distance(torch.eye(4), torch.eye(4) + 5)), 12)
    0.0
    """
    alike(k, k0, ("k", "k0"))
    return _chord(centred_unit(k), centred_unit(k0, "k0")) ** 2 / 2


@metric()
def kernel_velocity(k: Tensor, k_previous: Tensor, steps: float) -> Tensor:
    """Rotation of the kernel per step between two probes.

    Formula: angle(K_t, K_{t+δ})/δ
    Shape: k and k_previous of one shape, any; steps is δ > 0 -> []
    Range: [0, π/(2δ)] radians a step; undefined where a kernel is zero or not finite
    Source: after Fort et al. 2020, who use 1 − cos
    Pitfalls: depends on δ: a path that wiggles looks slower over a longer δ; only on the same probes

    >>> round(float(kernel_velocity(torch.eye(2), torch.ones(2, 2), 10)), 6)
    0.07854
    """
    if not steps > 0:
        raise ValueError(f"steps must be positive; got {steps}; pass the number of steps between the two kernels")
    return _angle(k, k_previous) / steps


def _path(kernels: Sequence[Tensor]) -> Tensor:
    if len(kernels) < 2:
        raise ValueError(f"kernels must hold at least 2; got {len(kernels)}; pass the kernels in order of time")
    return torch.stack([_angle(b, a) for a, b in itertools.pairwise(kernels)]).sum()


@metric(lambda kernels: nan(*kernels))
def path_length(kernels: Sequence[Tensor]) -> Tensor:
    """Length of the way the kernel turned, probe by probe.

    Formula: Σ_t angle(K_t, K_{t+1})
    Shape: at least 2 kernels of one shape, in order of time -> []
    Range: [angle(first, last), ∞) radians; undefined where a kernel is zero or not finite
    Source: after Fort et al. 2020
    Pitfalls: grows with the number of probes when the path is noisy: compare on one schedule

    >>> round(float(path_length([torch.eye(2), torch.ones(2, 2), torch.eye(2)])), 6)
    1.570796
    """
    return _path(kernels)


@metric(lambda kernels: nan(*kernels))
def directness(kernels: Sequence[Tensor]) -> Tensor:
    """How straight the kernel turned.

    Formula: angle(first, last)/path length
    Shape: at least 2 kernels of one shape, in order of time -> []
    Range: [0, 1], 1 on a geodesic; undefined where the kernel never turned, is zero or not finite
    Source: after Fort et al. 2020
    Pitfalls: falls with the number of probes when the path is noisy: compare on one schedule

    >>> float(directness([torch.eye(2), torch.ones(2, 2), torch.eye(2)]))
    0.0
    """
    length = _path(kernels)
    if length <= 8 * len(kernels) * torch.finfo(length.dtype).eps:  # the rounding of as many angles
        raise Undefined("the kernel has not turned")
    return (_angle(kernels[-1], kernels[0]) / length).clamp(max=1)


@metric()
def asymmetry(k: Tensor) -> Tensor:
    """How far a kernel is from its transpose, as that of an optimizer's step may be.

    Formula: ‖K − Kᵀ‖/‖K‖ (Frobenius)
    Shape: [n, n], blocks [C, n, n] or full [n, C, n, C] -> []
    Range: [0, 2], 0 if symmetric, √2 if K and Kᵀ are orthogonal, 2 if K = −Kᵀ; undefined where K is zero or not finite
    Source: Malladi et al. 2023 (the kernel of sign descent is asymmetric)
    Pitfalls: above rounding, K has no real spectrum to speak of, and CKA only of its symmetric part

    >>> round(float(asymmetry(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))), 6)
    1.414214
    """
    k = unit(matrices(k))
    return (k - k.mT).norm()


@metric(lambda k, *_, **__: nan(k).repeat(len(k)))
def per_example_motion(k: Tensor, k0: Tensor) -> Tensor:
    """Which probes the rotation of the kernel is about.

    Formula: ‖K̂[i,:] − K̂₀[i,:]‖/‖K̂₀[i,:]‖, K̂ = K/‖K‖ (Frobenius), so that growth alone is no motion
    Shape: k and k0 of one shape, probes first ([n, n] or [n, C, n, C]) -> [n]
    Range: [0, ∞); undefined where a kernel, or in one entry where a baseline row, is zero
    Source: the row by row form of relative_change
    Pitfalls: large for probes whose baseline row is small: read it beside the diagonal of K₀

    >>> per_example_motion(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)).round(decimals=4)
    tensor([0.4142, 1.0000], dtype=torch.float64)
    """
    k, k0 = alike(k, k0, ("k", "k0"))
    a, b = unit(k).flatten(1), unit(k0, "k0").flatten(1)
    motion = (a - b).norm(dim=1) / b.norm(dim=1)
    empty = (b == 0).all(1)
    if bool(empty.any()):
        raise Undefined(
            f"the baseline kernel is zero at {int(empty.sum())} of {len(b)} probes",
            motion.masked_fill(empty, torch.nan),
        )
    return motion
