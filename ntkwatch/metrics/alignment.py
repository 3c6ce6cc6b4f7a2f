"""Is the kernel turning towards the targets? Alignment with them, its null, and the classes' blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import columns, probe_kernel, real
from ntkwatch.metrics.distance import center, centred_unit, unit
from ntkwatch.metrics.undefined import Undefined, metric, nan


def centred_targets(y: Tensor, n: int) -> Tensor:
    """Ỹ/‖Ỹ‖, Ỹ = C Y; undefined where the targets are constant up to the rounding of their dtype."""
    targets = columns(y, n)
    centred = targets - targets.mean(0)
    if centred.norm() <= n * torch.finfo(y.dtype).eps * targets.norm():
        raise Undefined("the targets are constant over the probes")
    return unit(centred)


@metric()
def target_alignment(k: Tensor, y: Tensor) -> Tensor:
    """Kernel target alignment, without centring.

    Formula: KTA = cos(K, YYᵀ)
    Shape: k [n, n], y [n, C] as given -> []
    Range: [0, 1] for a positive semi-definite kernel; undefined where K or Y is zero or not finite
    Source: Cristianini et al. 2001
    Pitfalls: sees the class balance: the constant kernel 11ᵀ scores .444 on ±1 targets at 5:1 and .850 on one-hot ones;
        use centered_alignment

    >>> y = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[:, None]
    >>> round(float(target_alignment(torch.eye(6), y)), 6)
    0.408248
    """
    k = unit(probe_kernel(k))
    y = columns(y, len(k))
    if not bool(y.any()):
        raise Undefined("the targets are zero")
    return _cosine(k, unit(y))


def _cosine(unit_kernel: Tensor, y: Tensor) -> Tensor:
    """cos(K, YYᵀ) of a kernel and targets [..., n, C], both of norm 1."""
    return (y * (unit_kernel @ y)).sum((-2, -1)) / torch.linalg.matrix_norm(y.mT @ y)


@metric()
def centered_alignment(k: Tensor, y: Tensor) -> Tensor:
    """Centred alignment of the kernel with the targets: the CKA with YYᵀ.

    Formula: cos(K̃, ỸỸᵀ), K̃ = C K C, Ỹ = C Y, C = I − 11ᵀ/n
    Shape: k [n, n], y [n, C] as given -> []
    Range: [0, 1] for a positive semi-definite kernel; undefined below 3 probes, at K̃ = 0, at constant targets
    Source: Cortes et al. 2012
    Pitfalls: no absolute threshold (a feature-learning parity net ended at .119, a lazy digits net sat at .24): read
        its change, and alignment_z; held-out and training probes answer different questions

    >>> y = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[:, None]
    >>> round(float(centered_alignment(torch.eye(6), y)), 6)
    0.447214
    """
    return _cosine(centred_unit(k), centred_targets(y, len(k)))


@metric()
def alignment_null_mean(k: Tensor, y: Tensor) -> Tensor:
    """What centered_alignment is on average when the labels are shuffled over the probes.

    Formula: tr K̃ · tr ỸỸᵀ/((n − 1)·‖K̃‖·‖ỸỸᵀ‖), the mean over all n! permutations
    Shape: k [n, n], y [n, C] as given -> []
    Range: [0, 1]; undefined as centered_alignment is
    Source: the permutation mean of a bilinear statistic (Mantel 1967)
    Pitfalls: grows as the spectrum flattens: an alignment below it says nothing

    >>> y = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[:, None]
    >>> round(float(alignment_null_mean(torch.eye(6), y)), 6)
    0.447214
    """
    return _null_mean(centred_unit(k), centred_targets(y, len(k)))


def _null_mean(k: Tensor, y: Tensor) -> Tensor:
    return k.trace() / ((len(k) - 1) * (y.mT @ y).norm())


@metric()
def alignment_z(k: Tensor, y: Tensor, generator: torch.Generator, permutations: int = 200) -> Tensor:
    """How far centered_alignment stands above shuffled labels, in their standard deviations.

    Formula: (CKA − μ)/s, μ = alignment_null_mean, s² = mean_π (CKA_π − μ)² over seeded permutations π of the labels
    Shape: k [n, n], y [n, C] as given, a torch.Generator -> []
    Range: (−∞, ∞); undefined as centered_alignment is, and where every permutation gives one value (K̃ ∝ C)
    Source: the permutation test of Mantel 1967
    Pitfalls: the null is skewed: z is a size, not a p-value; known to 1/√(2·permutations), 5 % at 200

    >>> y = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[:, None]
    >>> float(alignment_z(torch.eye(6) + y @ y.T, y, torch.Generator().manual_seed(0))) > 2
    True
    """
    if permutations < 2:
        raise ValueError(f"permutations must be at least 2; got {permutations}; pass 200 or leave it out")
    centred, targets, n = centred_unit(k), centred_targets(y, len(k)), len(k)
    shuffles = [torch.randperm(n, generator=generator, device=generator.device) for _ in range(permutations)]
    null = _cosine(centred, targets[torch.stack(shuffles).to(targets.device)])
    mean = _null_mean(centred, targets)
    spread = (null - mean).square().mean().sqrt()
    rounding = n * torch.finfo(k.dtype).eps / center(unit(real(k, "k"))).norm()  # centring magnifies it by ‖K‖/‖K̃‖
    if spread <= rounding:
        raise Undefined("every permutation of the targets aligns alike")
    return (_cosine(centred, targets) - mean) / spread


@metric(lambda blocks, *_, **__: nan(blocks).repeat(len(blocks), len(blocks)))
def class_specialization(blocks: Tensor, y: Tensor) -> Tensor:
    """Whether each output's kernel aligns with its own class more than the other outputs' kernels do.

    Formula: KSM_cd = A_cd/mean_c' A_c'd, A_cd = CKA(K_c, y_d y_dᵀ); row c the output, column d the class
    Shape: blocks [C, n, n], y [n, C] -> [C, C]
    Range: [0, C], columns average 1, a diagonal above 1 is specialisation; undefined below 3 probes, where a block is
        zero once centred, and in the columns of classes that are constant over the probes
    Source: Shan & Bordelon 2021; Loo et al. 2022
    Pitfalls: the trace and sum kernels cannot show it; few probes a class make it noise

    >>> y = torch.eye(2).repeat(3, 1)
    >>> class_specialization(torch.stack([torch.eye(6) + torch.outer(c, c) for c in y.T]), y).diagonal() >= 1
    tensor([True, True])
    """
    if not isinstance(blocks, Tensor) or blocks.ndim != 3:
        got = tuple(blocks.shape) if isinstance(blocks, Tensor) else type(blocks).__name__
        raise ValueError(f"blocks must be [C, n, n]; got {got}; use reduction='blocks'")
    targets = columns(y, blocks.shape[1])
    if y.shape[1] != len(blocks):
        raise ValueError(f"y must have {len(blocks)} columns, one a block; got {y.shape[1]}; pass one-hot targets")
    aligned = torch.stack([centred_unit(block, f"block {c}") for c, block in enumerate(blocks)])
    centred = targets - targets.mean(0)
    absent = centred.norm(dim=0) <= len(y) * torch.finfo(y.dtype).eps * targets.norm(dim=0)
    alignment = torch.einsum("nd,cnm,md->cd", centred, aligned, centred)
    specialisation = alignment / alignment.mean(0)
    if bool(absent.any()):
        which = absent.nonzero().flatten().tolist()
        raise Undefined(f"the targets of classes {which} are constant", specialisation.masked_fill(absent, torch.nan))
    return specialisation


@dataclass(frozen=True)
class ClassBlocks:
    """Mean entries of a kernel by relation of the two probes, and how much of the kernel they explain; 0-d float64."""

    same_example: Tensor
    same_class: Tensor
    different_class: Tensor
    r2: Tensor


@metric(lambda k, *_, **__: ClassBlocks(nan(k), nan(k), nan(k), nan(k)))
def class_block_fit(k: Tensor, y: Tensor) -> ClassBlocks:
    """How much of the kernel is three numbers: same example, same class, different class.

    Formula: the mean of K over each of the three kinds of pairs; R² = 1 − Σ(K − mean of its kind)²/Σ(K − mean)²
    Shape: k [n, n], y [n, C], equal rows of which are one class -> ClassBlocks of 0-d tensors
    Range: R² in [0, 1]; undefined where K is not finite or constant, and in the kinds no pair of probes has
    Source: Seleznova et al. 2023
    Pitfalls: the diagonal alone can make R² high in a wide net: compare same_class with different_class

    >>> y = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    >>> fit = class_block_fit(torch.eye(4) + 0.5 * y @ y.T, y)
    >>> float(fit.same_example), float(fit.same_class), float(fit.different_class), round(float(fit.r2), 12)
    (1.5, 0.5, -0.5, 1.0)
    """
    k = probe_kernel(k)
    label = columns(y, len(k)).unique(dim=0, return_inverse=True)[1]
    kind = (label[:, None] != label).long() + 1
    kind.fill_diagonal_(0)
    same_example, same_class, different_class = (k[kind == i].mean() for i in range(3))
    means = torch.stack([same_example, same_class, different_class])
    total = (k - k.mean()).square().sum()
    if total <= (len(k) * torch.finfo(k.dtype).eps) ** 2 * k.square().sum():
        raise Undefined("the kernel is constant", ClassBlocks(same_example, same_class, different_class, nan(k)))
    r2 = 1 - (k - means[kind]).square().sum() / total
    fit = ClassBlocks(same_example, same_class, different_class, r2)
    if bool(means.isnan().any()):
        missing = "two probes of one class" if means[1].isnan() else "two probes of different classes"
        raise Undefined(f"there are no {missing}", fit)
    return fit
