"""Layers that tell tokens apart: learned position embeddings, and a readout from one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntkwatch.infinite.covariances import CrossKernels, Features, SelfCovariance
from ntkwatch.infinite.layers import Layer, Positions, State, linear_state
from ntkwatch.infinite.windows import need_positions


@dataclass(frozen=True)
class Position(Layer):
    """h + p, one learned vector p for each of `tokens` positions, drawn entry by entry with standard deviation std.

    grad: what each entry's gradient adds to the kernel of a position with itself, 1 where p is trained.
    """

    tokens: int
    std: float = 0.02
    grad: float = 1.0

    def positions(self, shape: Positions) -> Positions:
        """The same tokens; raises ValueError where their number is not `tokens`."""
        if shape != (self.tokens,):
            raise ValueError(f"{self} needs {self.tokens} tokens, got positions {list(shape)}.")
        return shape

    def state(self, before: State, notes: set[str]) -> State:
        """A map that treats positions differently: only GAUSSIAN channels stay what they are."""
        return linear_state(before)

    def frozen(self) -> Position:
        """The same embedding without its gradient."""
        return replace(self, grad=0.0)

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Σ + std² where a position meets itself; no features."""
        return replace(f, cov=f.cov + self._same(f.cov, f.pairs) * self.std**2, latent=None), ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """Σ + std² and Θ + grad where a position meets itself."""
        same = self._same(f.nngp, f.pairs)
        ntk = same * self.grad + (torch.zeros_like(f.nngp) if f.ntk is None else f.ntk)
        return replace(f, nngp=f.nngp + same * self.std**2, ntk=ntk, latent=None)

    def _same(self, like: Tensor, pairs: bool) -> Tensor:
        """1 where a position meets itself."""
        same = torch.eye(self.tokens).to(like) if pairs else torch.ones(self.tokens).to(like)
        return same.reshape(*same.shape, *[1] * (like.ndim - same.ndim))


@dataclass(frozen=True)
class Token(Layer):
    """One token alone: x[:, index] of [n, T, d]."""

    index: int = 0

    def positions(self, shape: Positions) -> Positions:
        """No positions; raises ValueError where the input has no token at `index`."""
        need_positions(self, shape)
        if len(shape) != 1 or not -shape[0] <= self.index < shape[0]:
            raise ValueError(f"{self} needs tokens that include it, got positions {list(shape)}.")
        return ()

    def pairs_in(self, pairs: bool) -> bool:
        """False: one token meets only itself."""
        return False

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance [n] of the token; no features."""
        mean = None if f.mean is None else f.mean[self.index]
        latent = None if f.latent is None else f.latent.map(lambda t: t[self.index])
        return replace(f, cov=f.cov[self.index], mean=mean, spatial=0, latent=latent), ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP and NTK [n1, n2] of the token."""
        latent = None if f.latent is None else f.latent.map(lambda t: t[self.index])
        return replace(f.map(lambda t: t[self.index].contiguous()), spatial=0, latent=latent)
