"""Attention over positions in the limit of many heads (Hron, Bahri, Sohl-Dickstein & Novak 2020).

Two variants have a closed form. "softmax" scales the logits by 1/d instead of 1/√d and ties the key and query weights:
the weights then converge to the deterministic softmax(w_query·w_key·Σ(x, x)), and keys and queries get no gradient.
"linear" keeps 1/√d and independent keys and queries but leaves out the softmax. Softmax at 1/√d, torch's own, has no
closed form: `SoftmaxAttention` estimates it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntkwatch.infinite.covariances import CrossKernels, Features, SelfCovariance
from ntkwatch.infinite.layers import State
from ntkwatch.infinite.windows import OverPositions


@dataclass(frozen=True)
class Attention(OverPositions):
    """Multi-head self-attention with an output projection, in NTK parametrization: each weight's w_grad is its w_std².

    variant: "softmax" (1/d-scaled, tied keys and queries) or "linear" (1/√d-scaled, no softmax). b_std: of the output's
    biases. trained: whether its weights have gradients. For softmax at 1/√d, see `SoftmaxAttention`.
    """

    variant: str = "softmax"
    w_query: float = 1.0
    w_key: float = 1.0
    w_value: float = 1.0
    w_out: float = 1.0
    b_std: float = 0.0
    trained: bool = True

    def __post_init__(self) -> None:
        if self.variant not in ("softmax", "linear"):
            raise ValueError(
                'Attention knows variant "softmax" (logits scaled by 1/d, keys tied to queries) and "linear" (scaled '
                f"by 1/√d, without softmax), got {self.variant!r}; softmax of 1/√d-scaled logits has no closed form: "
                "SoftmaxAttention estimates it."
            )
        for name in ("w_query", "w_key", "w_value", "w_out", "b_std"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"Attention needs a finite {name} >= 0, got {getattr(self, name)}.")

    def state(self, before: State, notes: set[str]) -> State:
        """GAUSSIAN: the output weights are fresh."""
        return State.GAUSSIAN

    def frozen(self) -> Attention:
        """The same attention without gradients of its weights."""
        return replace(self, trained=False)

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance of the output [*S, *S', n]; for "softmax" also the attention weights [T, T, n]."""
        k, saved = _flat(f.cov, f.spatial), ()  # type: tuple[Tensor, Features]
        if self.variant == "linear":
            out = k * k.square().sum(dim=(0, 1)) * (self.w_query * self.w_key) ** 2
        else:
            weights = torch.softmax(k * (self.w_query * self.w_key), dim=1)
            out, saved = torch.einsum("stn,tun,vun->svn", weights, k, weights), (weights,)
        cov = out.mul_((self.w_value * self.w_out) ** 2).add_(self.b_std**2).reshape(f.cov.shape)
        return replace(f, cov=cov, mean=None, latent=None), saved

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP and NTK of the output, both [*S, *S', n1, n2] (Hron et al. 2020, theorems 3 and 4)."""
        k = _flat(f.nngp, f.spatial)
        theta = None if f.ntk is None else _flat(f.ntk, f.spatial)
        nngp, ntk = self._linear(k, theta) if self.variant == "linear" else self._softmax(k, theta, a[0], b[0])
        gain, bias = (self.w_value * self.w_out) ** 2, self.b_std**2
        shape, trained = f.nngp.shape, float(self.trained)
        ntk = (ntk * gain + bias * trained).reshape(shape)
        return replace(f, nngp=(nngp * gain + bias).reshape(shape), ntk=ntk, latent=None)

    def _softmax(self, k: Tensor, theta: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        nngp = _mix(a, k, b)
        own = nngp * (2.0 * self.trained)  # values and output weights
        return nngp, own if theta is None else own.add_(_mix(a, theta, b))

    def _linear(self, k: Tensor, theta: Tensor | None) -> tuple[Tensor, Tensor]:
        gain = (self.w_query * self.w_key) ** 2
        square = k.square().sum(dim=(0, 1)) * gain
        nngp = k * square
        own = nngp * (4.0 * self.trained)  # queries, keys, values and output weights
        if theta is None:
            return nngp, own
        return nngp, own + theta * square + k * ((k * theta).sum(dim=(0, 1)) * (2 * gain))


def _flat(t: Tensor, spatial: int) -> Tensor:
    """[*S, *S', ...] -> [T, T, ...]."""
    return t.flatten(0, spatial - 1).flatten(1, spatial)


def _mix(a: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Σ_tu a[s, t, i] k[t, u, i, j] b[v, u, j] -> [s, v, i, j]."""
    return torch.einsum("suij,vuj->svij", torch.einsum("sti,tuij->suij", a, k), b)
