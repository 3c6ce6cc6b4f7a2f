"""Layers that look at positions: convolutions, pooling, flattening."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ntkwatch.infinite.covariances import CrossKernels, Features, SelfCovariance, window_mean
from ntkwatch.infinite.layers import Layer, Linear, Positions, State, assign, check_scales, linear_state

Size = int | tuple[int, ...]
Padding = str | int | tuple[int, ...]


@dataclass(frozen=True)
class Conv(Linear):
    """A convolution over the positions of its input, 1-d or 2-d; fan_in = channels · window (see `Dense`).

    padding: "same" (zeros so that out = ceil(in/stride), the extra one at the end, as TensorFlow and JAX do), "valid",
    "circular" (as much as "same", wrapped), or the number of zeros on either side, also per dimension.
    wrap: with a number, wrap around instead of zeros (torch's padding_mode="circular").
    """

    kernel_size: Size
    stride: Size = 1
    padding: Padding = "same"
    w_std: float = 1.0
    b_std: float = 0.0
    w_grad: float | None = None
    b_grad: float | None = None
    wrap: bool = False

    def __init__(
        self,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = "same",
        w_std: float = 1.0,
        b_std: float = 0.0,
        *,
        w_grad: float | None = None,
        b_grad: float | None = None,
        wrap: bool = False,
    ) -> None:
        assign(self, kernel_size=kernel_size, stride=stride, padding=padding, wrap=wrap)
        assign(self, w_std=w_std, b_std=b_std, w_grad=w_grad, b_grad=b_grad)
        check_scales(self)
        _check_window(self, kernel_size, stride, padding)

    def positions(self, shape: Positions) -> Positions:
        """The positions of the output; raises ValueError where the window does not fit."""
        return _windows(self, shape, self.kernel_size, self.stride, self.padding)

    def average(self, t: Tensor, spatial: int, pairs: bool) -> Tensor:
        """The mean over the window at each position, or at each pair of positions."""
        for i in range(spatial):
            size, stride = _at(self.kernel_size, i), _at(self.stride, i)
            pads = _pads(t.shape[i], size, stride, _padding_at(self.padding, i))
            t = window_mean(
                t, (i, spatial + i) if pairs else (i,), size, stride, pads, self.wrap or self.padding == "circular"
            )
        return t


@dataclass(frozen=True)
class AvgPool(Layer):
    """The mean over windows of positions; stride defaults to the window, zeros of the padding count."""

    window: Size
    stride: Size | None = None
    padding: Padding = "valid"

    def __post_init__(self) -> None:
        _check_window(self, self.window, self._stride, self.padding)

    @property
    def _stride(self) -> Size:
        return self.window if self.stride is None else self.stride

    def positions(self, shape: Positions) -> Positions:
        """The positions of the output; raises ValueError where the window does not fit."""
        return _windows(self, shape, self.window, self._stride, self.padding)

    def pairs_in(self, pairs: bool) -> bool:
        """True: a mean over positions mixes all pairs."""
        return True

    def state(self, before: State, notes: set[str]) -> State:
        """A map that treats positions differently: only GAUSSIAN channels stay what they are."""
        return linear_state(before)

    def _pool(self, t: Tensor, spatial: int, copies: int) -> Tensor:
        for d in range(spatial * copies):
            i = d % spatial
            size, stride = _at(self.window, i), _at(self._stride, i)
            pads = _pads(t.shape[d], size, stride, _padding_at(self.padding, i))
            t = window_mean(t, (d,), size, stride, pads, self.padding == "circular")
        return t

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance [*S, *S', n] of the means; no features."""
        mean = None if f.mean is None else self._pool(f.mean, f.spatial, 1)
        return replace(f, cov=self._pool(f.cov, f.spatial, 2), mean=mean, latent=None), ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP and NTK [*S, *S', n1, n2] of the means."""
        return replace(f.map(lambda t: self._pool(t, f.spatial, 2)), latent=None)


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """The mean over all positions."""

    def positions(self, shape: Positions) -> Positions:
        """No positions; raises ValueError where the input has none."""
        need_positions(self, shape)
        return ()

    def pairs_in(self, pairs: bool) -> bool:
        """True: the mean over positions mixes all pairs."""
        return True

    def state(self, before: State, notes: set[str]) -> State:
        """A map that treats inputs differently: only GAUSSIAN channels stay what they are."""
        return linear_state(before)

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance [n] of the mean over positions; no features."""
        mean = None if f.mean is None else _mean_over(f.mean, f.spatial)
        return SelfCovariance(_mean_over(f.cov, 2 * f.spatial), mean, 0, False, samples=f.samples, draws=f.draws), ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP and NTK [n1, n2] of the mean over positions."""
        return replace(f.map(lambda t: _mean_over(t, 2 * f.spatial)), spatial=0, pairs=False, latent=None)


@dataclass(frozen=True)
class Flatten(Layer):
    """Positions become channels. Their variances differ, so an activation needs a Dense in between."""

    def positions(self, shape: Positions) -> Positions:
        """No positions."""
        return ()

    def pairs_in(self, pairs: bool) -> bool:
        """False: a flattened position meets only itself."""
        return False

    def state(self, before: State, notes: set[str]) -> State:
        """OTHER: the channels have different variances."""
        return State.OTHER

    def own(self, f: SelfCovariance, pairs: bool) -> tuple[SelfCovariance, Features]:
        """Self-covariance [n], the mean over positions; no features."""
        mean = None if f.mean is None else _mean_over(f.mean, f.spatial)
        return SelfCovariance(_mean_over(f.cov, f.spatial), mean, 0, False, samples=f.samples, draws=f.draws), ()

    def cross(self, f: CrossKernels, a: Features, b: Features, pairs: bool) -> CrossKernels:
        """NNGP and NTK [n1, n2], the means over positions."""
        return replace(f.map(lambda t: _mean_over(t, f.spatial)), spatial=0, pairs=False, latent=None)


def _mean_over(t: Tensor, leading: int) -> Tensor:
    return t.mean(dim=tuple(range(leading))) if leading else t


def _at(value: Size, i: int) -> int:
    return value[i] if isinstance(value, tuple) else value


def _padding_at(value: Padding, i: int) -> str | int:
    return value[i] if isinstance(value, tuple) else value


def _pads(length: int, size: int, stride: int, padding: int | str) -> tuple[int, int]:
    if isinstance(padding, int):
        return padding, padding
    if padding == "valid":
        return 0, 0
    total = max((math.ceil(length / stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2


def need_positions(layer: Layer, shape: Positions) -> None:
    """Raises ValueError where inputs are plain vectors and the layer needs positions."""
    if not shape:
        raise ValueError(f"{layer} needs positions, got vectors; give inputs [n, C, H, W], [n, C, L] or [n, T, d].")


class OverPositions(Layer):
    """Ends in fresh weights and looks at all pairs of positions, of which there must be some."""

    mixes = True

    def positions(self, shape: Positions) -> Positions:
        """The same positions; raises ValueError where there are none."""
        need_positions(self, shape)
        return shape

    def pairs_in(self, pairs: bool) -> bool:
        """True."""
        return True


def _windows(layer: Layer, shape: Positions, size: Size, stride: Size, padding: Padding) -> Positions:
    """The positions left after sliding a window."""
    need_positions(layer, shape)
    for value in (size, stride, padding):
        if isinstance(value, tuple) and len(value) != len(shape):
            raise ValueError(f"{layer} has {len(value)} dimensions where its input has {len(shape)}: {list(shape)}.")
    out = []
    for i, length in enumerate(shape):
        width, step = _at(size, i), _at(stride, i)
        room = length + sum(_pads(length, width, step, _padding_at(padding, i))) - width
        if room < 0:
            raise ValueError(f"{layer} has a window larger than its padded input {list(shape)}; use a smaller one.")
        out.append(room // step + 1)
    return tuple(out)


def _check_window(layer: Layer, size: Size, stride: Size, padding: Padding) -> None:
    name = type(layer).__name__
    for what, value in (("window", size), ("stride", stride)):
        if not all(isinstance(v, int) and v >= 1 for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} needs a {what} of whole numbers >= 1, got {value!r}.")
    if isinstance(padding, str):
        if padding not in ("same", "valid", "circular"):
            raise ValueError(f'{name} knows padding "same", "valid", "circular" or a number, got {padding!r}.')
    elif min(padding if isinstance(padding, tuple) else (padding,)) < 0:
        raise ValueError(f"{name} needs padding >= 0, got {padding!r}.")
