"""What a layer of a spec is, and those that leave the positions alone: Dense, LayerNorm, Affine, Identity.

Inside a spec the NNGP is ⟨h, h'⟩/channels and the NTK that of one output unit (units are independent and alike in the
limit of many channels). Positions are shared by both inputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from ntkwatch.infinite.covariances import CrossKernels, Features, SelfCovariance
from ntkwatch.infinite.latent_channels import LatentChannel, Scale

Positions = tuple[int, ...]


class State(Enum):
    """What is known of a channel. LATENT: a function of several Gaussians (see `latent_channels`); OTHER: nothing."""

    GAUSSIAN = "Gaussian"
    LATENT = "latent"
    OTHER = "other"


class Layer(ABC):
    """One node of a spec. `own` runs once over each set of inputs, `cross` over blocks of pairs with what it saved."""

    mixes = False  # ends in fresh zero-mean weights, so its output is uncorrelated with anything before it

    def positions(self, shape: Positions) -> Positions:
        """The positions of the output for those of the input; raises where they do not fit."""
        return shape

    def pairs_in(self, pairs: bool) -> bool:
        """Whether all pairs of positions are needed at the input, given that at the output."""
        return pairs

    def state(self, before: State, notes: set[str]) -> State:
        """What is known of the output's channels; notes "sampled" where that takes quasi-Monte Carlo."""
        return before

    def frozen(self) -> Layer:
        """The same layer with nothing trained in it."""
        return self

    @abstractmethod
    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """The output's own covariance, and what `cross` will need of each input."""

    @abstractmethod
    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """The output's kernels."""


class Linear(Layer):
    """Fresh weights over channels: Σ' = w_std² A(Σ) + b_std², Θ' = w_grad A(Σ) + b_grad + w_std² A(Θ)."""

    w_std: float
    b_std: float
    w_grad: float | None
    b_grad: float | None
    mixes = True

    def average(self, t: Tensor, spatial: int, pairs: bool) -> Tensor:
        """A: the mean over the window, or t itself."""
        return t

    def state(self, before: State, notes: set[str]) -> State:
        """GAUSSIAN: a sum over many channels with fresh weights."""
        return State.GAUSSIAN

    def frozen(self) -> Layer:
        """The same layer with w_grad = b_grad = 0."""
        return replace(self, w_grad=0.0, b_grad=0.0)  # type: ignore[type-var]  # its classes are dataclasses

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """w_std² A(Σ) + b_std², [*S, n] or [*S, *S', n]; no features."""
        cov = self.average(f.cov, f.spatial, f.pairs) * self.w_std**2 + self.b_std**2
        return replace(f, cov=cov, mean=None, latent=None), ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """Σ' and Θ' of the class's formula, both of the shape of the output positions by [n1, n2]."""
        w_grad = self.w_std**2 if self.w_grad is None else self.w_grad
        b_grad = self.b_std**2 if self.b_grad is None else self.b_grad
        nngp = self.average(f.nngp, f.spatial, f.pairs)
        ntk = nngp * w_grad
        if f.ntk is not None:
            ntk.add_(self.average(f.ntk, f.spatial, f.pairs), alpha=self.w_std**2)
        if b_grad:
            ntk.add_(b_grad)
        # Conv's average is a new tensor; Dense's is the input's own, which a layer may overwrite
        nngp.mul_(self.w_std**2)
        return replace(f, nngp=nngp.add_(self.b_std**2) if self.b_std else nngp, ntk=ntk, latent=None)


@dataclass(frozen=True)
class Dense(Linear):
    """A fully connected layer over channels, the same at every position (torch's Linear on [n, d] or [n, T, d]).

    w_std, b_std: of the weights times √fan_in, and of the biases. w_grad, b_grad: what a unit's weights and bias add to
    the kernel per ⟨h, h'⟩/fan_in and per 1; None is w_std², b_std² (NTK parametrization), torch's own is fan_in and 1.
    """

    w_std: float = 1.0
    b_std: float = 0.0
    w_grad: float | None = None
    b_grad: float | None = None

    def __init__(
        self, w_std: float = 1.0, b_std: float = 0.0, *, w_grad: float | None = None, b_grad: float | None = None
    ) -> None:
        assign(self, w_std=w_std, b_std=b_std, w_grad=w_grad, b_grad=b_grad)
        check_scales(self)


@dataclass(frozen=True)
class LayerNorm(Layer):
    """(h - mean)/√(variance + eps) over the channels of each position; no parameters (follow it by `Affine`)."""

    eps: float = 1e-5

    def state(self, before: State, notes: set[str]) -> State:
        """A map that rescales inputs: only GAUSSIAN channels stay what they are."""
        return linear_state(before)

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """The normalised self-covariance, and (1/√(variance + eps), mean), each [*S, n]."""
        centred = f if f.mean is None else replace(f, cov=f.cov - _outer(f, f.mean, f.mean), mean=None)
        scale = (centred.variance.clamp_min(0) + self.eps).rsqrt().nan_to_num(posinf=0.0)
        cov = centred.cov * f.left(scale) * f.right(scale)
        return replace(centred, cov=cov, latent=None), (scale, f.mean)

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """Both kernels, normalised by the scales of their two inputs."""
        (sa, ma), (sb, mb) = a, b
        if ma is not None and mb is not None:
            f.nngp.sub_(_outer(f, ma, mb))
        return replace(f.map(lambda t: t.mul_(f.left(sa)).mul_(f.right(sb))), latent=None)


@dataclass(frozen=True)
class Affine(Layer):
    """scale·h + shift, one trained scale and shift per channel: the affine part of a normalisation at initialisation.

    Shifts are 0 at initialisation. w_grad is added per ⟨h, h'⟩/channels, b_grad per 1.
    """

    scale: float = 1.0
    w_grad: float = 1.0
    b_grad: float = 1.0

    def frozen(self) -> Affine:
        """The same scale without gradients."""
        return replace(self, w_grad=0.0, b_grad=0.0)

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """scale²·Σ; no features."""
        mean = None if f.mean is None else f.mean * self.scale
        return replace(f, cov=f.cov * self.scale**2, mean=mean, latent=self._latent(f.latent)), ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """Σ' = scale² Σ and Θ' = w_grad Σ + b_grad + scale² Θ."""
        ntk = f.nngp * self.w_grad + self.b_grad
        if f.ntk is not None:
            ntk.add_(f.ntk, alpha=self.scale**2)
        return replace(f, nngp=f.nngp.mul_(self.scale**2), ntk=ntk, latent=self._latent(f.latent))

    def _latent(self, latent: LatentChannel | None) -> LatentChannel | None:
        return None if latent is None else latent.then(Scale(self.scale, self.w_grad, self.b_grad))


@dataclass(frozen=True)
class Identity(Layer):
    """x."""

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """The input itself; no features."""
        return f, ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """The input itself."""
        return f


def linear_state(before: State) -> State:
    """After a linear map that treats positions or inputs differently: only Gaussians stay what they are."""
    return before if before is State.GAUSSIAN else State.OTHER


def _outer(f: SelfCovariance | CrossKernels, a: Tensor, b: Tensor) -> Tensor:
    return f.left(a) * f.right(b)


def assign(layer: Layer, **values: object) -> None:
    """Set fields of a frozen dataclass from its own __init__."""
    for name, value in values.items():
        object.__setattr__(layer, name, value)


def check_scales(layer: Linear) -> None:
    """Raises ValueError where a scale of the layer is negative or not finite."""
    for name in ("w_std", "b_std", "w_grad", "b_grad"):
        value = getattr(layer, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{type(layer).__name__} needs a finite {name} >= 0, got {value}.")
