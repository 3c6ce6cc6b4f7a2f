"""Softmax attention as torch computes it, with logits scaled by 1/√d: no closed form, a Monte Carlo over the logits.

With many heads the logits of one head are a draw of q·k/√d, where queries and keys are Gaussian with known covariances
over positions, and every entry of the kernel is an expectation over that draw (Hron, Bahri, Sohl-Dickstein & Novak
2020; for heads of d units the draw is of d queries and keys, for d → ∞ of Gaussian logits). The
first input of a pair gets the same draws in every pair, so that an input meets itself without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ntkwatch.infinite.covariances import CrossKernels, Draws, Features, SelfCovariance, combined_draws
from ntkwatch.infinite.layers import Dense, State
from ntkwatch.infinite.windows import OverPositions

MONTE_CARLO = "monte carlo"  # what `state` notes
RELATIVE_JITTER = 4096  # of eps: lets Cholesky's factor exist where positions repeat
MAX_CHUNK_ENTRIES = 2**21  # numbers of one temporary


@dataclass(frozen=True)
class SoftmaxAttention(OverPositions):
    """Multi-head self-attention, softmax(q·k/√head_size), many heads. Estimated: `kernel` needs a `generator` for it.

    query, key, value, out: the four projections. head_size: units of a head, None in the limit of many. causal: a
    position looks at itself and what is before it.
    """

    query: Dense = field(default_factory=Dense)
    key: Dense = field(default_factory=Dense)
    value: Dense = field(default_factory=Dense)
    out: Dense = field(default_factory=Dense)
    head_size: int | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        if self.head_size is not None and self.head_size < 1:
            raise ValueError(f"SoftmaxAttention needs head_size >= 1 or None, got {self.head_size}.")

    def state(self, before: State, notes: set[str]) -> State:
        """GAUSSIAN; notes that the kernel needs a Monte Carlo estimate."""
        notes.add(MONTE_CARLO)
        return State.GAUSSIAN

    def frozen(self) -> SoftmaxAttention:
        """The same attention with frozen projections."""
        parts = {name: getattr(self, name).frozen() for name in ("query", "key", "value", "out")}
        return replace(self, **parts)

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Estimated self-covariance [*S, *S', n], and Cholesky factors [T, T, n] of queries and keys."""
        k = _probes_first(f.cov, f.spatial, 1)
        factors = [_root(covariance(d, k)) for d in (self.query, self.key)]
        v = covariance(self.value, k)
        total = torch.zeros_like(k)
        for draw in self._draws(f.draws, [factors], v):
            (a,) = draw.attention
            total += (a @ v[:, None] @ a.mT).sum(dim=1) / draw.share
        cov = _positions_first(covariance(self.out, total), f.cov.shape)
        saved = tuple(t.permute(1, 2, 0) for t in factors)
        return replace(f, cov=cov, mean=None, latent=None, draws=combined_draws(f.draws, f.draws, 1)), saved

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """Estimated NNGP and NTK, both [*S, *S', n1, n2]."""
        shape = f.nngp.shape
        k, theta = (None if t is None else _probes_first(t, f.spatial, 2) for t in (f.nngp, f.ntk))
        assert k is not None
        n1, n2 = shape[-2:]
        first = [_expand(t, n1, n2, left=True) for t in a]
        both = [[first[0], first[1]], [_conditioned(first[i], covariance(d, k), _expand(b[i], n1, n2, left=False))
                for i, d in enumerate((self.query, self.key))]]  # fmt: skip
        nngp, ntk = self._expectation(k, theta, both, f.draws)
        nngp, ntk = covariance(self.out, nngp), tangent(self.out, nngp, ntk)
        nngp, ntk = (_positions_first(t, shape) for t in (nngp, ntk))
        return replace(f, nngp=nngp, ntk=ntk, latent=None, draws=combined_draws(f.draws, f.draws, 1))

    def _expectation(
        self, k: Tensor, theta: Tensor | None, both: list[list[Tensor]], draws: Draws | None
    ) -> tuple[Tensor, Tensor]:
        """NNGP and NTK [p, T, T'] of one unit of a head."""
        v, query, key, value = covariance(self.value, k), *(tangent(d, k, theta) for d in self._inward)
        total = [torch.zeros_like(k) for _ in range(2)]
        for draw in self._draws(draws, both, v):
            a, b = draw.attention
            by_query = query[:, None] * _logits(a, b, v[:, None], draw.keys(covariance(self.key, k)))
            by_key = draw.queries(covariance(self.query, k)) * _logits(a, b, v[:, None], key[:, None])
            total[0] += (a @ v[:, None] @ b.mT).sum(dim=1) / draw.share
            total[1] += (a @ value[:, None] @ b.mT + by_query + by_key).sum(dim=1) / draw.share
        return total[0], total[1]

    @property
    def _inward(self) -> tuple[Dense, Dense, Dense]:
        return self.query, self.key, self.value

    def _draws(self, draws: Draws | None, factors: list[list[Tensor]], like: Tensor) -> Iterator[_Draw]:
        """Attention weights for chunks of the draws. factors: of queries and keys of each side."""
        if draws is None:
            raise ValueError(
                "SoftmaxAttention (softmax of 1/√d-scaled logits) has no closed form: pass generator= to kernel() "
                "for a Monte Carlo estimate with an error bar."
            )
        t = like.shape[-1]
        normal = draws.normal(2 * t, self.head_size)
        size = max(1, MAX_CHUNK_ENTRIES // (like.numel() * max(1, (self.head_size or t) // t)))
        for part in zip(*(z.split(size) for z in normal), strict=True):
            z = [p.to(like) for p in part]
            yield _Draw([self._side(f, z) for f in factors], self.causal, 2 * len(normal[0]))

    def _side(self, factors: list[Tensor], z: list[Tensor]) -> _Side:
        query, key = factors
        if self.head_size is None:
            c = query.shape[-1]
            return _Side(query[:, None] @ z[0][:, :c, :c] @ key[:, None].mT, None, None)
        q, k = (f[:, None] @ part[:, : f.shape[-1]] / self.head_size**0.25 for f, part in zip(factors, z, strict=True))
        return _Side(q @ k.mT, q / self.head_size**0.25, k / self.head_size**0.25)


@dataclass(frozen=True)
class _Side:
    """Logits [p, r, T, T] of one input, its queries and keys over √d [p, r, T, d]; None for Gaussian logits."""

    logits: Tensor
    q: Tensor | None
    k: Tensor | None


class _Draw:
    """Some draws of the logits, and the same with the queries' signs turned."""

    def __init__(self, sides: list[_Side], causal: bool, share: int) -> None:
        self.sides, self.share = sides, share
        logits = [torch.cat([s.logits, -s.logits], dim=1) for s in sides]
        if causal:
            later = torch.ones(logits[0].shape[-2:], dtype=torch.bool, device=logits[0].device).triu(1)
            logits = [g.masked_fill(later, -math.inf) for g in logits]
        self.attention = [torch.softmax(g, dim=-1) for g in logits]

    def queries(self, limit: Tensor) -> Tensor:
        """⟨q, q'⟩/d of the draws [p, r, T, T'], or its limit for many units."""
        return self._overlap(self.sides[0].q, self.sides[1].q, limit)

    def keys(self, limit: Tensor) -> Tensor:
        return self._overlap(self.sides[0].k, self.sides[1].k, limit)

    @staticmethod
    def _overlap(a: Tensor | None, b: Tensor | None, limit: Tensor) -> Tensor:
        return limit[:, None] if a is None or b is None else (a @ b.mT).repeat(1, 2, 1, 1)


def _logits(a: Tensor, b: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Σ_ss' (∂a/∂logits)_s v (∂b/∂logits)_s' m_ss': what moving logits with overlap m does to outputs with values v."""
    av, am, vb, mb = a @ v, a @ m, v @ b.mT, m @ b.mT
    return a @ (v * m) @ b.mT - (av * am) @ b.mT - a @ (vb * mb) + (av @ b.mT) * (am @ b.mT)


def covariance(dense: Dense, k: Tensor) -> Tensor:
    """The NNGP k after a projection: w_std² k + b_std²."""
    return k * dense.w_std**2 + dense.b_std**2


def tangent(dense: Dense, k: Tensor, theta: Tensor | None) -> Tensor:
    """The NTK after a projection, from the NNGP k and the NTK theta (None: 0) before it."""
    w_grad = dense.w_std**2 if dense.w_grad is None else dense.w_grad
    b_grad = dense.b_std**2 if dense.b_grad is None else dense.b_grad
    out = k * w_grad + b_grad
    return out if theta is None else out + theta * dense.w_std**2


def _root(k: Tensor) -> Tensor:
    """L with LLᵀ = k: lower triangular, also where positions repeat or are zero."""
    scale = k.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return torch.linalg.cholesky(
        k + eye * (RELATIVE_JITTER * torch.finfo(k.dtype).eps * scale + torch.finfo(k.dtype).tiny)
    )


def _conditioned(first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
    """[p, T, 2T]: the second input's factor on the first's draws and on fresh ones, given their covariance."""
    on_first = torch.linalg.solve_triangular(first, cross, upper=False).mT
    values, vectors = torch.linalg.eigh(second @ second.mT - on_first @ on_first.mT)
    rest = (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT
    return torch.cat([on_first, rest], dim=-1)


def _expand(t: Tensor, n1: int, n2: int, left: bool) -> Tensor:
    """Factors [T, T, n] of one side for every pair, [n1·n2, T, T]."""
    t = t.permute(2, 0, 1)
    t = t[:, None].expand(-1, n2, -1, -1) if left else t[None].expand(n1, -1, -1, -1)
    return t.flatten(0, 1)


def _probes_first(t: Tensor, spatial: int, probes: int) -> Tensor:
    """[*S, *S', *n] -> [Πn, T, T]."""
    t = t.flatten(0, spatial - 1).flatten(1, spatial)
    return t.movedim((0, 1), (-2, -1)).flatten(0, probes - 1)


def _positions_first(t: Tensor, shape: torch.Size) -> Tensor:
    return t.movedim(0, -1).reshape(shape)
