"""Layers that tell tokens apart: learned position embeddings, and a readout from one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntkwatch.infinite.field import Cross, Own, Saved
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
        if shape != (self.tokens,):
            raise ValueError(f"{self} needs {self.tokens} tokens, got positions {list(shape)}.")
        return shape

    def state(self, before: State, notes: set[str]) -> State:
        return linear_state(before)

    def frozen(self) -> Position:
        return replace(self, grad=0.0)

    def own(self, f: Own, pairs: bool) -> tuple[Own, Saved]:
        return replace(f, cov=f.cov + self._same(f.cov, f.pairs) * self.std**2, stream=None), ()

    def cross(self, f: Cross, a: Saved, b: Saved, pairs: bool) -> Cross:
        same = self._same(f.nngp, f.pairs)
        ntk = same * self.grad + (torch.zeros_like(f.nngp) if f.ntk is None else f.ntk)
        return replace(f, nngp=f.nngp + same * self.std**2, ntk=ntk, stream=None)

    def _same(self, like: Tensor, pairs: bool) -> Tensor:
        """1 where a position meets itself."""
        same = torch.eye(self.tokens).to(like) if pairs else torch.ones(self.tokens).to(like)
        return same.reshape(*same.shape, *[1] * (like.ndim - same.ndim))


@dataclass(frozen=True)
class Token(Layer):
    """One token alone: x[:, index] of [n, T, d]."""

    index: int = 0

    def positions(self, shape: Positions) -> Positions:
        need_positions(self, shape)
        if len(shape) != 1 or not -shape[0] <= self.index < shape[0]:
            raise ValueError(f"{self} needs tokens that include it, got positions {list(shape)}.")
        return ()

    def pairs_in(self, pairs: bool) -> bool:
        return False

    def own(self, f: Own, pairs: bool) -> tuple[Own, Saved]:
        mean = None if f.mean is None else f.mean[self.index]
        stream = None if f.stream is None else f.stream.map(lambda t: t[self.index])
        return replace(f, cov=f.cov[self.index], mean=mean, spatial=0, stream=stream), ()

    def cross(self, f: Cross, a: Saved, b: Saved, pairs: bool) -> Cross:
        stream = None if f.stream is None else f.stream.map(lambda t: t[self.index])
        return replace(f.map(lambda t: t[self.index].contiguous()), spatial=0, stream=stream)
