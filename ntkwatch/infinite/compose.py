"""Layers after one another and side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ntkwatch.infinite.covariances import CrossKernels, Features, SelfCovariance, combined_draws
from ntkwatch.infinite.latent_channels import LatentChannel
from ntkwatch.infinite.layers import Layer, Positions, State


@dataclass(frozen=True, init=False)
class Serial(Layer):
    """One layer after another. Serial() is the identity."""

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer) -> None:
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"Serial takes layers such as Dense() and Relu(), got {layer!r}.")
        object.__setattr__(self, "layers", layers)

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        """Whether any of the layers has fresh weights."""
        return any(layer.mixes for layer in self.layers)

    def positions(self, shape: Positions) -> Positions:
        """The positions after the last layer; raises ValueError where a layer does not fit its input."""
        for layer in self.layers:
            shape = layer.positions(shape)
        return shape

    def state(self, before: State, notes: set[str]) -> State:
        """What is known of the channels after the last layer."""
        for layer in self.layers:
            before = layer.state(before, notes)
        return before

    def pairs_in(self, pairs: bool) -> bool:
        """Whether the first layer needs all pairs of positions."""
        return self.needs(pairs)[0]

    def frozen(self) -> Serial:
        """The same layers, none of them trained."""
        return Serial(*[layer.frozen() for layer in self.layers])

    def needs(self, pairs: bool) -> list[bool]:
        """Whether pairs of positions are needed before each layer, and after the last."""
        needs = [pairs]
        for layer in reversed(self.layers):
            needs.append(layer.pairs_in(needs[-1]))
        return needs[::-1]

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance after the last layer, and a tuple of each layer's features."""
        needs, saved = self.needs(pairs), []
        for layer, before, after in zip(self.layers, needs, needs[1:], strict=False):
            f, s = layer.own(f if before or not f.pairs else f.diagonal(), after)
            saved.append(s)
        return f if pairs or not f.pairs else f.diagonal(), tuple(saved)

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP and NTK after the last layer."""
        for after in self.stages(f, a, b, pairs):
            f = after
        return f if pairs or not f.pairs else f.diagonal()

    def stages(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> Iterator[CrossKernels]:
        """The kernels after each layer in turn; the next layer may overwrite them."""
        needs = self.needs(pairs)
        for layer, sa, sb, before, after in zip(self.layers, a, b, needs, needs[1:], strict=False):
            f = layer.cross(f if before or not f.pairs else f.diagonal(), sa, sb, after)
            yield f


@dataclass(frozen=True, init=False)
class Sum(Layer):
    """The sum of branches with a common input; all but one must end in fresh weights (Dense, Conv, Attention)."""

    branches: tuple[Serial, ...]

    def __init__(self, *branches: Layer) -> None:
        if not branches:
            raise ValueError("Sum needs at least one branch.")
        serial = tuple(b if isinstance(b, Serial) else Serial(b) for b in branches)
        if sum(not b.mixes for b in serial) > 1:
            raise ValueError(
                f"Of the branches of {type(self).__name__} only one may be without Dense, Conv or Attention: others "
                "would be correlated with it, which has no closed form here."
            )
        object.__setattr__(self, "branches", serial)

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        """Whether every branch has fresh weights."""
        return all(b.mixes for b in self.branches)

    def positions(self, shape: Positions) -> Positions:
        """The positions that all branches end with.

        Raises:
            ValueError: the branches end with different positions.
        """
        shapes = [b.positions(shape) for b in self.branches]
        if len(set(shapes)) > 1:
            raise ValueError(f"The branches of {type(self).__name__} end with different positions: {shapes}.")
        return shapes[0]

    def state(self, before: State, notes: set[str]) -> State:
        """GAUSSIAN where all branches are; LATENT where one is latent and the others are Gaussian; else OTHER."""
        each = [b.state(before, notes) for b in self.branches]
        if all(s is State.GAUSSIAN for s in each):
            return State.GAUSSIAN
        single = State.OTHER not in each and each.count(State.LATENT) == 1
        return State.LATENT if single else State.OTHER

    def frozen(self) -> Sum:
        """The same branches, none of them trained."""
        return Sum(*[branch.frozen() for branch in self.branches])

    def pairs_in(self, pairs: bool) -> bool:
        """Whether any branch needs all pairs of positions."""
        return any(b.pairs_in(pairs) for b in self.branches)

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance of the sum, and each branch's features and mean."""
        fields, saved = zip(*[b.own(f, pairs) for b in self.branches], strict=True)
        total = fields[0]
        for field in fields[1:]:
            cov = total.cov + field.cov
            if total.mean is not None and field.mean is not None:  # E[h]E[g'] + E[g]E[h'] of independent h, g
                cov = cov + total.left(total.mean) * total.right(field.mean)
                cov = cov + total.left(field.mean) * total.right(total.mean)
            latent = _joined((total.latent, total.cov, None), (field.latent, field.cov, None)) if f.samples else None
            draws = combined_draws(total.draws, field.draws)
            total = replace(total, cov=cov, mean=_plus(total.mean, field.mean), latent=latent, draws=draws)
        return total, (saved, tuple(field.mean for field in fields))

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP and NTK of the sum: branches are uncorrelated but for their means."""
        (sa, ma), (sb, mb) = a, b
        total, mean_a, mean_b = None, None, None
        for i, branch in enumerate(self.branches):
            last = i == len(self.branches) - 1
            g = branch.cross(f if last else f.clone(), sa[i], sb[i], pairs)
            total = g if total is None else _add(total, g, (mean_a, ma[i]), (mean_b, mb[i]))
            mean_a, mean_b = _plus(mean_a, ma[i]), _plus(mean_b, mb[i])
        assert total is not None
        return total


class Residual(Sum):
    """x + branch(x)."""

    def __init__(self, *branch: Layer) -> None:
        super().__init__(Serial(), Serial(*branch))


Means = tuple[Tensor | None, Tensor | None]


def _add(f: CrossKernels, g: CrossKernels, a: Means, b: Means) -> CrossKernels:
    latent = _joined((f.latent, f.nngp, f.ntk), (g.latent, g.nngp, g.ntk)) if f.samples else None
    nngp = f.nngp.add_(g.nngp)
    (fa, ga), (fb, gb) = a, b
    if fa is not None and ga is not None:
        nngp.add_(f.left(fa) * f.right(gb)).add_(f.left(ga) * f.right(fb))
    ntk = g.ntk if f.ntk is None else f.ntk if g.ntk is None else f.ntk.add_(g.ntk)
    return replace(f, nngp=nngp, ntk=ntk, latent=latent, draws=combined_draws(f.draws, g.draws))


Part = tuple[LatentChannel | None, Tensor, Tensor | None]


def _joined(f: Part, g: Part) -> LatentChannel | None:
    """The latent of a sum, of which at most one part may be more than Gaussian."""
    (latent, _, _), (_, cov, ntk) = (f, g) if f[0] is not None else (g, f)
    return None if latent is None else latent.plus(cov, ntk)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
