"""Activations of channels that are not Gaussian: a residual network that adds before it activates.

In relu(g + relu(h)), g fresh and Gaussian, one channel is a function of several independent Gaussians, whose
covariances between two inputs are all known. No closed form is left, but every entry of the kernel is an expectation
over two Gaussians for each of them: quasi-Monte Carlo, the same points for all entries, in pairs of opposite signs so
that the kernel is symmetric and odd moments vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


class Pointwise(Protocol):
    """An activation that a latent channel passes through."""

    def apply(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """φ(u) and φ'(u), both of the shape of u."""


@dataclass(frozen=True)
class Act:
    """u -> φ(u)."""

    function: Pointwise


@dataclass(frozen=True)
class Add:
    """u -> u + the latent Gaussian of this number; the first one starts the latent."""

    index: int


@dataclass(frozen=True)
class Scale:
    """u -> scale·u with a trained scale and shift (see `Affine`)."""

    scale: float
    w_grad: float
    b_grad: float


@dataclass(frozen=True)
class LatentChannel:
    """covs, ntks: of each latent Gaussian, shaped like the kernels. steps: how a channel comes from them."""

    covs: tuple[Tensor, ...]
    ntks: tuple[Tensor | None, ...]
    steps: tuple[Act | Add | Scale, ...]

    @staticmethod
    def start(cov: Tensor, ntk: Tensor | None) -> LatentChannel:
        """A channel that is one latent Gaussian with this covariance and tangent kernel (copied)."""
        return LatentChannel((cov.clone(),), (None if ntk is None else ntk.clone(),), (Add(0),))

    def then(self, step: Act | Scale) -> LatentChannel:
        """The channel after one more step."""
        return replace(self, steps=(*self.steps, step))

    def plus(self, cov: Tensor, ntk: Tensor | None) -> LatentChannel:
        """The channel plus a further, independent latent Gaussian (copied)."""
        copy = None if ntk is None else ntk.clone()
        return LatentChannel((*self.covs, cov.clone()), (*self.ntks, copy), (*self.steps, Add(len(self.covs))))

    def map(self, function: Callable[[Tensor], Tensor]) -> LatentChannel:
        """`function` applied to the covariances and tangent kernels of all latent Gaussians."""
        ntks = tuple(None if t is None else function(t) for t in self.ntks)
        return replace(self, covs=tuple(function(c) for c in self.covs), ntks=ntks)


@dataclass(frozen=True)
class Moments:
    """E[uu'], the tangent kernel, E[u]; of the kernels' shape."""

    cov: Tensor
    ntk: Tensor
    mean: Tensor


def expectation(latent: LatentChannel, a: tuple[Tensor, ...], b: tuple[Tensor, ...], samples: int) -> Moments:
    """Moments of a channel for inputs whose latents have standard deviations a and b (they broadcast)."""
    mixing = [_mixing(c, sa, sb) for c, sa, sb in zip(latent.covs, a, b, strict=True)]
    total = [torch.zeros_like(latent.covs[0]) for _ in range(3)]
    count = 0
    for z in _points(len(latent.covs), samples):
        u, v, tangent = _walk(latent, mixing, a, b, z)
        total[0].addcmul_(u, v)
        total[1].add_(tangent)
        total[2].add_(u)
        count += 1
    return Moments(*[t.div_(count) for t in total])


def _mixing(cov: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """√((1+c)/2), √((1-c)/2): u = a(αz + βw) and u' = b(αz - βw) have correlation c, symmetrically."""
    scale = a * b
    c = torch.where(scale > 0, cov / scale, torch.zeros_like(scale)).clamp_(-1, 1)
    return ((1 + c) / 2).sqrt_(), ((1 - c) / 2).sqrt_()


def _walk(
    latent: LatentChannel,
    mixing: list[tuple[Tensor, Tensor]],
    a: tuple[Tensor, ...],
    b: tuple[Tensor, ...],
    z: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """One channel of both inputs and its tangent kernel, at one point."""
    u = v = tangent = torch.zeros_like(latent.covs[0])
    for step in latent.steps:
        if isinstance(step, Add):
            i = step.index
            alpha, beta = mixing[i]
            x, y, ntk = alpha * z[2 * i], beta * z[2 * i + 1], latent.ntks[i]
            u, v = u + (x + y) * a[i], v + (x - y) * b[i]
            tangent = tangent if ntk is None else tangent + ntk
        elif isinstance(step, Scale):
            tangent = tangent * step.scale**2 + (u * v * step.w_grad + step.b_grad)
            u, v = u * step.scale, v * step.scale
        else:
            (u, du), (v, dv) = step.function.apply(u), step.function.apply(v)
            tangent = tangent * du * dv
    return u, v, tangent


def _points(latents: int, samples: int) -> Iterator[list[float]]:
    """Sobol points of 2 coordinates a latent, each with all w reversed and with everything reversed."""
    for z in _sobol(2 * latents, max(4 * latents, samples // 4)).tolist():
        flipped = [-v if i % 2 else v for i, v in enumerate(z)]
        yield from (z, flipped, [-v for v in z], [-v for v in flipped])


@lru_cache(maxsize=8)
def _sobol(dimensions: int, count: int) -> Tensor:
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(count, dtype=torch.float64)
    z = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    for side in (slice(0, None, 2), slice(1, None, 2)):
        factor = torch.linalg.cholesky(z[:, side].T @ z[:, side] / count)
        z[:, side] = torch.linalg.solve_triangular(factor, z[:, side].T, upper=False).T  # second moments exact
    return z
