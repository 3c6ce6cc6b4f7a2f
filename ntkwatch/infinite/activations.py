"""Dual activations: for (u, v) ~ N(0, [[q, k], [k, q']]) the pair E[φ(u)φ(v)] and E[φ'(u)φ'(v)].

Each activation first turns a variance q into the features it needs (`prepare`, once per input), and then meets two
inputs (`dual`, once per pair). Cosines are clamped and inflated by a few eps, so that equal inputs have exactly 1: acos
amplifies an error of eps to 1.5e-8, and the diagonal must not come out below its neighbours.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntkwatch.infinite.covariances import CrossKernels, Features, SelfCovariance, diagonal
from ntkwatch.infinite.latent_channels import Act, LatentChannel, expectation
from ntkwatch.infinite.layers import Layer, State


class Elementwise(Layer):
    """A function φ of each channel at each position (Cho & Saul 2009: dual activations)."""

    @abstractmethod
    def prepare(self, q: Tensor) -> Features:
        """Features of the variances q [..., n] ≥ 0, computed once per input."""

    @abstractmethod
    def dual(self, k: Tensor, a: Features, b: Features, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """E[φ(u)φ(v)] and, if `slope`, E[φ'(u)φ'(v)], both of the shape of k; the call may overwrite k.

        k: covariances of u and v. a, b: features of their variances from `prepare`, shaped to broadcast against k.
        """

    def first(self, q: Tensor) -> Tensor | None:
        """E[φ(u)] for u ~ N(0, q), of the shape of q; None where φ is odd, so that it is 0."""
        return None

    @abstractmethod
    def apply(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """φ(u) and φ'(u), both of the shape of u."""

    def state(self, before: State, notes: set[str]) -> State:
        """GAUSSIAN inputs give a LATENT channel, which a later sum may have to sample.

        Raises:
            ValueError: the input's channels are not known to be Gaussian.
        """
        if before is State.OTHER:
            raise ValueError(
                f"{self} needs Gaussian inputs, which come from Dense, Conv or Attention; after raw inputs, pooled or "
                "flattened activations its infinite-width kernel is not known: put one of them before it."
            )
        if before is State.LATENT:
            notes.add("sampled")
        return State.LATENT

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance of the output [*S, n] or [*S, *S', n], and the features of each input that `cross` needs."""
        if f.latent is not None:
            return self._sampled_own(f, f.latent)
        q = f.variance
        saved = self.prepare(q)
        latent = LatentChannel.start(f.cov, None).then(Act(self)) if f.samples else None
        cov, _ = self.dual(f.cov.clone(), f.left(saved), f.right(saved), slope=False)
        return replace(f, cov=cov, mean=self.first(q), latent=latent), saved

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP E[φ(u)φ(v)] and NTK Θ·E[φ'(u)φ'(v)], of the shape of the input's kernels."""
        if f.latent is not None:
            after = f.latent.then(Act(self))
            moments = expectation(after, f.left(a), f.right(b), f.samples)
            return replace(f, nngp=moments.cov, ntk=None if f.ntk is None else moments.ntk, latent=after)
        latent = LatentChannel.start(f.nngp, f.ntk).then(Act(self)) if f.samples else None
        nngp, slope = self.dual(f.nngp, f.left(a), f.right(b), slope=f.ntk is not None)
        if f.ntk is not None and slope is not None:
            f.ntk.mul_(slope)
        return replace(f, nngp=nngp, latent=latent)

    def _sampled_own(self, f: SelfCovariance, before: LatentChannel) -> tuple[SelfCovariance, Features]:
        latent = before.then(Act(self))
        variances = before.map(lambda t: diagonal(t, f.spatial)).covs if f.pairs else before.covs
        saved = tuple(v.clamp_min(0).sqrt() for v in variances)
        moments = expectation(latent, f.left(saved), f.right(saved), f.samples)
        mean = diagonal(moments.mean, f.spatial) if f.pairs else moments.mean
        return replace(f, cov=moments.cov, mean=mean, latent=latent), saved


@dataclass(frozen=True)
class ABRelu(Elementwise):
    """φ(x) = a·min(x, 0) + b·max(x, 0) (Cho & Saul 2009 for ReLU); φ'(0) = at_zero, by default a, as in torch."""

    a: float
    b: float
    at_zero: float | None = None

    def prepare(self, q: Tensor) -> Features:
        """(√q, 1/√q, φ' where q = 0), each [..., n]; the last is None where every q is positive."""
        s = q.clamp_min(0).sqrt()
        dead = s == 0
        inverse = ((1 + 2 * torch.finfo(q.dtype).eps) / s).masked_fill(dead, 0)
        at_zero = self.a if self.at_zero is None else self.at_zero
        # a zero vector (a blank patch of an image) is not at an angle to anything: φ' is φ'(0) there
        linear = torch.where(dead, at_zero, (self.a + self.b) / 2) if bool(dead.any()) else None
        return s, inverse, linear

    def dual(self, k: Tensor, a: Features, b: Features, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """Closed form by the arc-cosine kernel of order 1 (Cho & Saul 2009, eq. 6); shapes as `Elementwise.dual`."""
        (sa, ia, la), (sb, ib, lb) = a, b
        odd, even = (self.a + self.b) / 2, (self.b - self.a) ** 2 / (2 * math.pi)  # φ = odd·x + (b-a)/2·|x|
        c = (k * ia).mul_(ib).clamp_(-1, 1)
        angle = torch.asin(c)
        height = (c * c).neg_().add_(1).sqrt_().addcmul_(c, angle)
        k = k.mul_(odd**2).add_(height.mul_(sa * even).mul_(sb))
        if not slope:
            return k, None
        angle.mul_(even)
        if la is None and lb is None:
            return k, angle.add_(odd**2)
        return k, angle.add_((odd if la is None else la) * (odd if lb is None else lb))

    def first(self, q: Tensor) -> Tensor | None:
        """E[φ(u)] = (b − a)·√(q/2π), of the shape of q."""
        return (q.clamp_min(0) / (2 * math.pi)).sqrt() * (self.b - self.a)

    def apply(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """φ(u) and φ'(u), both of the shape of u."""
        slope = torch.where(u > 0, self.b, self.a).to(u)
        return u * slope, slope if self.at_zero is None else slope.masked_fill_(u == 0, self.at_zero)


def Relu() -> ABRelu:
    """max(x, 0)."""
    return ABRelu(0.0, 1.0)


def LeakyRelu(negative_slope: float = 0.01) -> ABRelu:
    """max(x, 0) + negative_slope·min(x, 0)."""
    return ABRelu(negative_slope, 1.0)


def Abs() -> ABRelu:
    """|x|."""
    return ABRelu(-1.0, 1.0, at_zero=0.0)


@dataclass(frozen=True)
class Erf(Elementwise):
    """erf(x) (Williams 1997)."""

    def prepare(self, q: Tensor) -> Features:
        """(√q, 1/√(1 + 2q)), each [..., n]."""
        q = q.clamp_min(0)
        return q.sqrt(), (1 + 2 * q).rsqrt()

    def dual(self, k: Tensor, a: Features, b: Features, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """E[φφ'] = (2/π)·asin(2k/√((1 + 2q)(1 + 2q'))) (Williams 1997) and its slope; shapes as `Elementwise.dual`."""
        (sa, ra), (sb, rb) = a, b
        c = _bounded(k, sa, sb).mul_(2 * ra).mul_(rb).clamp_(-1, 1)
        dot = _one_minus_square(c).rsqrt_().mul_(ra * (4 / math.pi)).mul_(rb) if slope else None
        return torch.asin(c).mul_(2 / math.pi), dot

    def apply(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """erf(u) and 2/√π·exp(−u²), both of the shape of u."""
        return torch.erf(u), u.square().neg_().exp_().mul_(2 / math.sqrt(math.pi))


@dataclass(frozen=True)
class Gelu(Elementwise):
    """x·Φ(x), the exact form. By Gaussian integration by parts of E[uΦ(u)·vΦ(v)]; checked against quadrature."""

    def prepare(self, q: Tensor) -> Features:
        """(q, √q, 1/√(1 + q), 1/(1 + q)), each [..., n]."""
        q = q.clamp_min(0)
        return q, q.sqrt(), (1 + q).rsqrt(), 1 / (1 + q)

    def dual(self, k: Tensor, a: Features, b: Features, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """Closed form of both expectations; shapes as `Elementwise.dual`."""
        (qa, sa, ra, ia), (qb, sb, rb, ib) = a, b
        k, scale = _bounded(k, sa, sb), ra * rb
        c = (k * scale).clamp_(-1, 1)
        both = torch.asin(c).mul_(1 / (2 * math.pi)).add_(0.25)  # E[Φ(u)Φ(v)]
        root = _one_minus_square(c).rsqrt_().mul_(scale)  # 1/√((1+q)(1+q') - k²)
        inverse = ia + ib
        nngp = (k * k * (inverse - 1)).add_(qa * qb).mul_(root).mul_(1 / (2 * math.pi)).addcmul_(k, both)
        if not slope:
            return nngp, None
        return nngp, both.add_((root.square() + inverse).mul_(root).mul_(k), alpha=1 / (2 * math.pi))

    def first(self, q: Tensor) -> Tensor | None:
        """E[uΦ(u)] = q/√(2π(1 + q)), of the shape of q."""
        return q / (2 * math.pi * (1 + q)).sqrt()

    def apply(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """uΦ(u) and Φ(u) + u·ϕ(u) with ϕ the normal density, both of the shape of u."""
        phi = torch.special.ndtr(u)
        return u * phi, phi + u * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Sin(Elementwise):
    """sin(x)."""

    def prepare(self, q: Tensor) -> Features:
        """(√q, q/2), each [..., n]."""
        q = q.clamp_min(0)
        return q.sqrt(), q / 2

    def dual(self, k: Tensor, a: Features, b: Features, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """E[sin u sin v] = exp(−(q + q')/2)·sinh k, and cosh k in the place of sinh for the slope."""
        (sa, ma), (sb, mb) = a, b
        k, m = _bounded(k, sa, sb), ma + mb
        # |k| ≤ m exactly; rounding must not let the exponent pass 0
        same, opposite = (k - m).clamp_max_(0).exp_().mul_(0.5), (-k - m).clamp_max_(0).exp_().mul_(0.5)
        return same - opposite, same.add_(opposite) if slope else None

    def apply(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """sin(u) and cos(u), both of the shape of u."""
        return u.sin(), u.cos()


def _bounded(k: Tensor, sa: Tensor, sb: Tensor) -> Tensor:
    """|k| ≤ √(q q'), which a chaotic network would otherwise blow up from one rounding error to a negative kernel."""
    bound = sa * sb
    return torch.clamp(k, -bound, bound, out=k)


def _one_minus_square(c: Tensor) -> Tensor:
    """1 - c², kept off 0, where only variances beyond 1/eps come."""
    return (c * c).neg_().add_(1).clamp_min_(torch.finfo(c.dtype).eps)
