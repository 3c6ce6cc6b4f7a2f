"""What passes between the layers of a spec: covariances over positions and probes, with the positions in front.

``S`` stands for the position axes (none for vectors, T for tokens, H, W for images). Each holds the covariance of a
position with itself, ``[*S, ...]``, or of all pairs of positions, ``[*S, *S', ...]`` (``pairs``), never more than the
later layers need. Probes come last, so that shifts over positions run over contiguous memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ntkwatch.infinite.latent_channels import LatentChannel

Features = Any  # nested tuples of None and tensors whose last dimension is the probes


@dataclass(frozen=True)
class Draws:
    """Which random numbers a layer takes: `seed` of the replicate, `depth` counts the attention layers before it.

    count: draws of the logits, half of them with the signs of the other half turned.
    """

    seed: int
    count: int
    depth: int = 0

    def normal(self, rows: int, columns: int | None) -> list[Tensor]:
        """Normals for queries and keys, two [count/2, rows, columns]; for logits one, [count/2, rows, rows]."""
        return _normal(self.seed + 7919 * self.depth, (self.count + 1) // 2, rows, columns)


@lru_cache(maxsize=4)
def _normal(seed: int, count: int, rows: int, columns: int | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed % 2**63)
    shape = (1, count, rows, rows) if columns is None else (2, count, rows, columns)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device))


def combined_draws(a: Draws | None, b: Draws | None, by: int = 0) -> Draws | None:
    """The draws after both, `by` layers on."""
    if a is None or b is None:
        return None
    return replace(a, depth=max(a.depth, b.depth) + by)


@dataclass(frozen=True)
class SelfCovariance:
    """Covariance of every input with itself: what nonlinearities need before two inputs can be compared.

    cov: [*S, n] or, with pairs, [*S, *S', n], the mean over channels of h(s)·h(s').
    mean: [*S, n], the mean over channels of h (only LayerNorm and sums of branches look at it), or None where it is 0.
    latent: how a channel is computed from Gaussians, where it is no longer Gaussian itself; else None.
    samples: of the quasi-Monte Carlo for those, 0 where there are none.
    draws: the random numbers of softmax attention, None where nobody asked for an estimate.
    """

    cov: Tensor
    mean: Tensor | None
    spatial: int
    pairs: bool
    latent: LatentChannel | None = None
    samples: int = 0
    draws: Draws | None = None

    @property
    def variance(self) -> Tensor:
        """[*S, n]."""
        return diagonal(self.cov, self.spatial) if self.pairs else self.cov

    def diagonal(self) -> SelfCovariance:
        """The same without pairs of positions: cov [*S, *S', n] becomes [*S, n]."""
        latent = None if self.latent is None else self.latent.map(lambda t: diagonal(t, self.spatial))
        return replace(self, cov=self.variance, pairs=False, latent=latent)

    def left(self, saved: Features) -> Features:
        """Features [*S, n] shaped to broadcast as the first argument against `cov`."""
        return sides(saved, self.spatial if self.pairs else 0, left=True, cross=False)

    def right(self, saved: Features) -> Features:
        """Features [*S, n] shaped to broadcast as the second argument against `cov`."""
        return sides(saved, self.spatial if self.pairs else 0, left=False, cross=False)


@dataclass(frozen=True)
class CrossKernels:
    """Kernels between two sets of inputs: nngp and ntk [*S, n1, n2] or [*S, *S', n1, n2].

    The ntk is None before the first layer with parameters. Layers may write into both tensors.
    """

    nngp: Tensor
    ntk: Tensor | None
    spatial: int
    pairs: bool
    latent: LatentChannel | None = None
    samples: int = 0
    draws: Draws | None = None

    def map(self, function: Any) -> CrossKernels:
        """The same linear map over positions of both kernels."""
        return replace(self, nngp=function(self.nngp), ntk=None if self.ntk is None else function(self.ntk))

    def diagonal(self) -> CrossKernels:
        """The same without pairs of positions: [*S, *S', n1, n2] becomes [*S, n1, n2]."""
        latent = None if self.latent is None else self.latent.map(lambda t: diagonal(t, self.spatial))
        return replace(self.map(lambda t: diagonal(t, self.spatial)), pairs=False, latent=latent)

    def clone(self) -> CrossKernels:
        """A copy whose kernels may be overwritten."""
        return self.map(torch.clone)

    def left(self, saved: Features) -> Features:
        """Features [*S, n1] of the first inputs, shaped to broadcast against the kernels."""
        return sides(saved, self.spatial if self.pairs else 0, left=True, cross=True)

    def right(self, saved: Features) -> Features:
        """Features [*S, n2] of the second inputs, shaped to broadcast against the kernels."""
        return sides(saved, self.spatial if self.pairs else 0, left=False, cross=True)


def sides(saved: Features, gap: int, *, left: bool, cross: bool) -> Features:
    """Features [*S, m] of one side, shaped to broadcast against a covariance.

    gap: the number of position axes of the other side, 0 where the two sides share theirs.
    """
    if saved is None:
        return None
    if isinstance(saved, tuple):
        return tuple(sides(s, gap, left=left, cross=cross) for s in saved)
    *positions, m = saved.shape
    hole = [1] * gap
    probes = ([m, 1] if left else [1, m]) if cross else [m]
    return saved.reshape(*positions, *hole, *probes) if left else saved.reshape(*hole, *positions, *probes)


def take(saved: Features, rows: slice) -> Features:
    """The features of some probes."""
    if isinstance(saved, tuple):
        return tuple(take(s, rows) for s in saved)
    return None if saved is None else saved[..., rows]


def join(parts: list[Features]) -> Features:
    """The features of several sets of probes as one; undoes `take`."""
    if isinstance(parts[0], tuple):
        parts = _same_length(parts)
        return tuple(join([p[i] for p in parts]) for i in range(len(parts[0])))
    if all(p is None for p in parts):
        return None
    return torch.cat(parts, dim=-1)


def _same_length(parts: list[Features]) -> list[Features]:
    """A series that was cut earlier for some probes goes on with zeros."""
    longest = max(len(p) for p in parts)
    return [p if len(p) == longest else (*p, *[torch.zeros_like(p[0])] * (longest - len(p))) for p in parts]


def diagonal(t: Tensor, spatial: int) -> Tensor:
    """[*S, *S', ...] -> [*S, ...]: each position with itself."""
    for i in range(spatial):
        t = t.diagonal(dim1=0, dim2=spatial - i)
    rest = t.ndim - spatial
    return t.movedim(tuple(range(rest, t.ndim)), tuple(range(spatial))).contiguous()


def window_mean(t: Tensor, dims: tuple[int, ...], size: int, stride: int, pads: tuple[int, int], wrap: bool) -> Tensor:
    """Mean over a window that slides along `dims` at once (a position and its partner move together).

    Padding is by zeros, which count in the mean, or by wrapping around.
    """
    length, (low, high) = t.shape[dims[0]], pads
    if wrap:
        index = torch.arange(-low, length + high, device=t.device) % length
        for d in dims:
            t = t.index_select(d, index)
        return window_mean(t, dims, size, stride, (0, 0), False)
    out_length = (length + low + high - size) // stride + 1
    out = t.new_zeros([out_length if i in dims else s for i, s in enumerate(t.shape)])
    for offset in range(size):
        first = max(0, math.ceil((low - offset) / stride))
        last = min(out_length - 1, (length - 1 + low - offset) // stride)
        if last >= first:
            start = first * stride + offset - low
            source, target = [slice(None)] * t.ndim, [slice(None)] * t.ndim
            for d in dims:
                source[d] = slice(start, start + (last - first) * stride + 1, stride)
                target[d] = slice(first, last + 1)
            out[tuple(target)] += t[tuple(source)]
    return out.div_(size)
