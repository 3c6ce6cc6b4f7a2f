"""Truncated powers (z − s)₊ⁿ/n! of Gaussian variables: what carries a kink, and nothing else.

With a jump of its n-th derivative at s a function is a multiple of such a power and a rest that does not jump. Their
Hermite coefficients have a closed form; their expectation over two Gaussians is, by Price's theorem, an integral over
the correlation of a density.

Where s < 0, the power is the one of the other side, −(−1)ⁿ(s − z)₊ⁿ/n!: it jumps alike, and is zero around 0, so that a
kink that is far out in the tail does not cost digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ntkwatch.infinite.kinks import ORDERS

MAX_KINK_POSITION = 38.0  # standard deviations: the density is 0 there
KINK_RANGE = 9.0  # here it is 1e-18
_NODES = 48
_ENTRIES = 2**15  # pairs that are integrated at a time


def power(z: Tensor, s: Tensor, n: int) -> Tensor:
    """(z − s)₊ⁿ/n!, of the other side where s < 0; they broadcast."""
    right = s >= 0
    beyond = torch.where(right, z - s, s - z)
    rise = beyond.clamp_min(0) ** n / math.factorial(n) if n else (beyond > 0).to(z)
    return torch.where(right, rise, -((-1.0) ** n) * rise)


def coefficients(s: Tensor, degree: int) -> list[Tensor]:
    """Of each order n, [degree + 1, *s.shape]: the orthonormal Hermite coefficients a_j of `power`."""
    side = torch.where(s >= 0, 1.0, -1.0).to(s)
    s = s.abs()
    waves, moments = _weighted_hermite(s, degree), _moments(s)
    j = torch.arange(degree + 1, dtype=s.dtype, device=s.device)
    odd = torch.stack([torch.ones_like(s), side])[torch.arange(degree + 1, device=s.device) % 2]
    found = []
    for n in range(ORDERS):
        falling = torch.stack([j - i for i in range(n + 1)]).prod(0).clamp_min(1).sqrt()
        a = torch.zeros_like(waves)
        a[n + 1 :] = waves[: degree - n] / falling[n + 1 :].reshape(-1, *[1] * s.ndim)
        for i in range(min(n, degree) + 1):
            a[i] = moments[n - i] / math.sqrt(math.factorial(i))
        found.append(a * odd * torch.where(side > 0, 1.0, -((-1.0) ** n)))
    return found


def pairs(c: Tensor, s: Sequence[Tensor], a: Sequence[Tensor], t: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """E of the product of two sums of powers, of variables with the correlation c [m].

    s, t: the places, one [m] for each kink. a, b: the weights, of each kink those of the orders 0, 1, 2.
    """
    total = torch.zeros_like(c)
    left, right = _weighted(s, a), _weighted(t, b)
    if not left or not right:
        return total
    (places, weights), (others, other_weights) = (map(torch.stack, zip(*x, strict=True)) for x in (left, right))
    both = torch.cartesian_prod(torch.arange(len(places)), torch.arange(len(others))).reshape(-1, 2)
    for start in range(0, len(c), _ENTRIES):
        some = slice(start, start + _ENTRIES)
        for k, m in (x.T for x in both.split(max(1, _ENTRIES // len(c[some])))):
            at = places[k, some], others[m, some], weights[k, :, some], other_weights[m, :, some]
            total[some] += _sum(c[some], *at).sum(0)
    return total


def _weighted(s: Sequence[Tensor], a: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(places [m], weights [3, m]) of the kinks that count for some variable."""
    found = [(place, torch.stack(list(a[ORDERS * k : ORDERS * (k + 1)]))) for k, place in enumerate(s)]
    return [(place, weights) for place, weights in found if bool((weights.any(0) & (place.abs() < KINK_RANGE)).any())]


def _sum(c: Tensor, s: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ a_i b_j E[power_i(u; s) power_j(v; t)] over orders i, j of pairs of kinks; s [pairs, m], a [pairs, 3, m]."""
    left, right = _side(s), _side(t)
    inside = _Between(c * left * right, s.abs(), t.abs())
    total = torch.zeros_like(s)
    orders = [[n for n in range(ORDERS) if bool(x[:, n].any())] for x in (a, b)]
    for i in orders[0]:
        for j in orders[1]:
            signs = torch.where(left > 0, 1.0, -((-1.0) ** i)) * torch.where(right > 0, 1.0, -((-1.0) ** j))
            total += signs * a[:, i] * b[:, j] * inside.expectation(i, j)
    return total


def _side(s: Tensor) -> Tensor:
    return torch.where(s >= 0, 1.0, -1.0).to(s)


class _Between:
    """E[(u − s)₊ⁱ/i! (v − t)₊ʲ/j!] for s, t ≥ 0, by integrals over the correlation r from 0 to c.

    The derivative by c lowers both orders by one (Price 1958); order −1 is a point mass, which leaves a density. With
    r = ±cos x, x = w³, what the density does where r is near ±1 and s near ±t is smooth in w.
    """

    def __init__(self, c: Tensor, s: Tensor, t: Tensor) -> None:
        self.c, self.s, self.t = c, s, t
        self.moments = _moments(s), _moments(t)
        self.sign = torch.where(c >= 0, 1.0, -1.0).to(c)
        end = torch.acos(c.abs().clamp_max(1))
        points, weights = (x.to(c).reshape(-1, *[1] * c.ndim) for x in _legendre())
        lo, hi = end ** (1 / 3), (math.pi / 2) ** (1 / 3)
        w = lo + (hi - lo) * points
        x = w**3
        self.tau, self.rho = torch.sin(x), torch.cos(x)
        self.short = 2 * torch.sin(x / 2) ** 2  # 1 - ρ
        self.weights = weights * (hi - lo) * 3 * w**2
        self.left = 2 * torch.sin((x + end) / 2) * torch.sin((x - end) / 2)  # |c| - ρ
        self.apart = s - self.sign * t

    def expectation(self, i: int, j: int) -> Tensor:
        """Taylor's formula in c: the terms at 0, where u and v are independent, and the rest as an integral."""
        if i > j:
            return self._swapped().expectation(j, i)
        m, n = self.moments
        terms = [self.c**p / math.factorial(p) * m[i - p] * n[j - p] for p in range(i + 1)]
        rest = (self.weights * self.left**i * self._density(j - i - 1)).sum(0) / math.factorial(i)
        return torch.stack(terms).sum(0) + self.sign ** (i + 1) * rest

    def _swapped(self) -> _Between:
        other = object.__new__(_Between)
        other.__dict__.update(self.__dict__)
        other.s, other.t, other.moments = self.t, self.s, self.moments[::-1]
        other.apart = self.t - self.sign * self.s
        return other

    def _density(self, order: int) -> Tensor:
        """τ·E[δ(u − s)·(v − t)₊ᵐ/m!] at r, m the order; −1 is δ(v − t)."""
        if order == -1:
            flat = self.sign * self.s * self.t / (1 + self.rho)
            return torch.exp(-(self.apart**2) / (2 * self.tau**2) - flat) / (2 * math.pi)
        x = self.sign * (self.apart - self.s * self.short) / self.tau
        here = torch.exp(-self.s.square() / 2) / math.sqrt(2 * math.pi) * self.tau
        if order == 0:
            return here * torch.special.ndtr(x)
        return here * self.tau * (x * torch.special.ndtr(x) + torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi))


def _moments(s: Tensor) -> list[Tensor]:
    """E[(z − s)₊ⁿ/n!] for n = 0, 1, 2 and s ≥ 0."""
    above = torch.special.ndtr(-s)
    density = torch.exp(-s.square() / 2) / math.sqrt(2 * math.pi)
    return [above, density - s * above, ((1 + s.square()) * above - s * density) / 2]


def _weighted_hermite(s: Tensor, degree: int) -> Tensor:
    """[degree + 1, *s.shape]: h_j(s)·n(s), h_j orthonormal; recursed as h_j·√n, which neither over- nor underflows."""
    root = torch.exp(-s.square() / 4) / (2 * math.pi) ** 0.25
    waves = [root, s * root]
    for j in range(2, degree + 1):
        waves.append((s * waves[-1] - math.sqrt(j - 1) * waves[-2]) / math.sqrt(j))
    return torch.stack(waves[: degree + 1]) * root


@lru_cache(maxsize=1)
def _legendre() -> tuple[Tensor, Tensor]:
    """Gauss's rule on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
