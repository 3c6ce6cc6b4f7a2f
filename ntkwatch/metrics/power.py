"""Where in the kernel's spectrum the targets lie: cumulative power, its area, its null."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch.metrics.alignment import centred_targets
from ntkwatch.metrics.arguments import finite, real
from ntkwatch.metrics.spectrum import eigensystem
from ntkwatch.metrics.undefined import Undefined, metric, nan


def _spread_over_eigenspaces(power: Tensor, spectrum: Tensor, floor: float) -> Tensor:
    """Each mode's power [n] replaced by the mean over its eigenspace: the basis inside one is arbitrary.

    Neighbouring eigenvalues are tied where they differ by at most the floor.
    """
    space = torch.cat([power.new_zeros(1), (spectrum[:-1] - spectrum[1:] > floor).cumsum(0)]).long()
    size = torch.bincount(space).to(power.dtype)
    return (torch.zeros_like(size).index_add(0, space, power) / size)[space]


@metric(lambda k, *_, **__: nan(k).repeat(len(k)))
def cumulative_power(k: Tensor, y: Tensor, floor: float | None = None) -> Tensor:
    """Share of the targets in the kernel's top k directions, for each k.

    Formula: C(k) = Σ_{i≤k} ‖v_iᵀỸ‖²/‖Ỹ‖², v_i eigenvectors of K by falling eigenvalue, Ỹ = C Y; the power of tied
        eigenvalues (closer than the floor) is spread evenly over their eigenspace
    Shape: k [n, n], y [n, C] as given -> [n]
    Range: [0, 1], rising to 1; undefined at constant targets and where K is zero or not finite
    Source: Canatar et al. 2021
    Pitfalls: read it against cumulative_power_null; more sensitive than centered_alignment

    >>> y = torch.tensor([1.0, -1.0, 0.0])[:, None]
    >>> cumulative_power(torch.eye(3) + y @ y.T, y).round(decimals=9)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    targets = centred_targets(y, len(k))
    spectrum, vectors, floor = _directions(k, floor)
    power = (vectors.mT @ targets).square().sum(1)
    return _spread_over_eigenspaces(power, spectrum, floor).cumsum(0).clamp(max=1)


def _directions(k: Tensor, floor: float | None) -> tuple[Tensor, Tensor, float]:
    spectrum, vectors, floor = eigensystem(k, floor)
    if spectrum[0] <= floor:
        raise Undefined("the kernel is zero" if spectrum[0] == 0 else "the kernel is below its noise floor")
    return spectrum, vectors, floor


@metric(lambda k, *_, **__: nan(k).repeat(len(k)))
def cumulative_power_null(k: Tensor, floor: float | None = None) -> Tensor:
    """What cumulative_power is on average when the labels are shuffled over the probes.

    Formula: Σ_{i≤k} (1 − (v_iᵀ1)²/n)/(n − 1), the mean over all n! permutations, tied eigenvalues spread evenly
    Shape: k [n, n] -> [n]
    Range: [0, 1], rising to 1; undefined below 2 probes and where K is zero or not finite
    Source: the permutation mean of Canatar et al. 2021's cumulative power
    Pitfalls: not k/n: the kernel's constant direction takes no part

    >>> cumulative_power_null(torch.eye(4)).round(decimals=9)
    tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    spectrum, vectors, floor = _directions(k, floor)
    n = len(spectrum)
    if n < 2:
        raise Undefined("a null over permutations needs at least 2 probes")
    power = (1 - vectors.sum(0).square() / n) / (n - 1)
    return _spread_over_eigenspaces(power, spectrum, floor).cumsum(0).clamp(0, 1)


def _curve(power: Tensor) -> Tensor:
    power = real(power, "power")
    if power.ndim != 1:
        raise ValueError(f"power must be [n]; got shape {tuple(power.shape)}; pass what cumulative_power returns")
    return finite(power, "the curve")


@metric()
def power_auc(power: Tensor) -> Tensor:
    """Area under a cumulative-power curve.

    Formula: (1/n) Σ_k C(k)
    Shape: [n], from cumulative_power or cumulative_power_null -> []
    Range: [1/n, 1], 1 with all power in the top mode, about ½ on random labels; undefined where the curve is
    Source: after Canatar et al. 2021
    Pitfalls: read it minus the null's

    >>> float(power_auc(torch.tensor([0.5, 1.0])))
    0.75
    """
    return _curve(power).mean()


@metric()
def power_k90(power: Tensor, fraction: float = 0.9) -> Tensor:
    """Number of top directions that hold nine tenths of the targets.

    Formula: min{k : C(k) ≥ fraction}
    Shape: [n], from cumulative_power or cumulative_power_null -> []
    Range: 1 … n; undefined where the curve is
    Source: after Canatar et al. 2021
    Pitfalls: grows with n: compare at one number of probes

    >>> float(power_k90(torch.tensor([0.5, 0.85, 0.95, 1.0])))
    3.0
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1]; got {fraction}; pass a share such as 0.9")
    curve = _curve(power)
    slack = len(curve) * torch.finfo(power.dtype).eps
    return (curve < fraction - slack).sum().to(curve.dtype) + 1
