"""Modules and functions with parameters -> layers with their widths, gradients and initialisation."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from ntkwatch.infinite.compose import Residual
from ntkwatch.infinite.initialisation import Origin, Weights
from ntkwatch.infinite.layers import Affine, Dense, Layer, LayerNorm
from ntkwatch.infinite.softmax import SoftmaxAttention
from ntkwatch.infinite.tokens import Position
from ntkwatch.infinite.windows import Conv

Factory = Callable[[dict[str, Origin]], Layer]  # layers wait until the initialisation of all weights is known


class ConversionError(ValueError):
    """What of a module has no infinite-width counterpart here, by name, and why."""


@dataclass(frozen=True)
class Step:
    """sources: the nodes it computes from (several: their sum). channels_first: of its output.

    mixed: it rearranges or mixes channels of projections, as heads of attention do; `heads` finds out how.
    """

    sources: list[fx.Node]
    layers: list[Factory]
    channels_first: bool
    mixed: bool = False


class ModuleReader(Protocol):
    """What the functions of this file need of the conversion: the module, its names, and the steps so far."""

    module: nn.Module
    modules: dict[str, nn.Module]
    names: dict[int, str]
    steps: dict[fx.Node, Step]

    def register(self, weights: Weights) -> str:
        """Announce a weight, whose initialisation is decided once all are known; returns its name."""


def linear(reader: ModuleReader, prefix: str, weight: Tensor, bias: Tensor | None, factor: float = 1.0) -> Factory:
    """Dense at this fan_in; factor multiplies the weight."""
    fan_out, fan_in = weight.shape
    w = reader.register(Weights(f"{prefix}weight", weight, fan_in, fan_out))
    return _weights(reader, prefix, w, weight, bias, fan_in, Dense, {}, factor)


def attention(reader: ModuleReader, name: str, m: nn.MultiheadAttention) -> Factory:
    """Self-attention at this head size; PyTorch draws queries, keys and values as one weight [3E, E]."""
    if not m._qkv_same_embed_dim or m.bias_k is not None or m.add_zero_attn or not m.batch_first:
        raise ConversionError(
            f"{name} (MultiheadAttention) converts with batch_first=True, kdim = vdim = embed_dim and without "
            "add_bias_kv or add_zero_attn only."
        )
    e = m.embed_dim
    weight, bias = m.in_proj_weight, m.in_proj_bias
    w = reader.register(Weights(f"{name}.in_proj_weight", weight, e, 3 * e))
    inward = _weights(reader, f"{name}.in_proj_", w, weight, bias, e, Dense, {}, 1.0)
    outward = linear(reader, f"{name}.out_proj.", m.out_proj.weight, m.out_proj.bias)

    def make(origins: dict[str, Origin]) -> Layer:
        one, out = (cast(Dense, make(origins)) for make in (inward, outward))
        return SoftmaxAttention(one, one, one, out, head_size=m.head_dim)

    return make


def encoder_layer(reader: ModuleReader, name: str, m: nn.TransformerEncoderLayer, activation: Layer) -> list[Factory]:
    """Attention and a two-layer network, each in a residual branch with its norm before or after."""
    first = [attention(reader, f"{name}.self_attn", m.self_attn)]
    second = [
        linear(reader, f"{name}.linear1.", m.linear1.weight, m.linear1.bias),
        constant(activation),
        linear(reader, f"{name}.linear2.", m.linear2.weight, m.linear2.bias),
    ]
    norms = [layer_norm(f"{name}.norm{i}", norm) for i, norm in ((1, m.norm1), (2, m.norm2))]
    if m.norm_first:
        return [residual([*norms[0], *first]), residual([*norms[1], *second])]
    return [residual(first), *norms[0], residual(second), *norms[1]]


def residual(branch: list[Factory]) -> Factory:
    """x + branch(x)."""
    return lambda origins: Residual(*[make(origins) for make in branch])


def convolution(reader: ModuleReader, name: str, m: nn.Conv1d | nn.Conv2d) -> Factory:
    """Conv at this fan_in.

    Raises:
        ConversionError: groups, dilation, or a padding mode other than zeros and circular.
    """
    if m.groups != 1 or any(d != 1 for d in m.dilation):
        raise ConversionError(
            f"{name} (Conv with groups={m.groups}, dilation={m.dilation}) cannot be converted: no rule."
        )
    if m.padding_mode not in ("zeros", "circular"):
        raise ConversionError(f"{name} has padding_mode={m.padding_mode!r}; zeros and circular convert.")
    window = math.prod(m.kernel_size)
    w = reader.register(Weights(f"{name}.weight", m.weight, m.in_channels * window, m.out_channels * window))
    padding = m.padding if isinstance(m.padding, str) else tuple(m.padding)
    shape = {
        "kernel_size": tuple(m.kernel_size),
        "stride": tuple(m.stride),
        "padding": padding,
        "wrap": m.padding_mode == "circular",
    }
    return _weights(reader, f"{name}.", w, m.weight, m.bias, m.in_channels * window, Conv, shape, 1.0)


def _weights(
    reader: ModuleReader,
    prefix: str,
    w: str,
    weight: Tensor,
    bias: Tensor | None,
    fan_in: int,
    kind: Callable[..., Layer],
    shape: dict[str, Any],
    factor: float,
) -> Factory:
    b = None if bias is None else reader.register(Weights(f"{prefix}bias", bias, fan_in, 1, bias=True))
    gradients = {
        "w_grad": fan_in * factor**2 * weight.requires_grad,
        "b_grad": float(bias is not None and bias.requires_grad),
    }

    def make(origins: dict[str, Origin]) -> Layer:
        w_std = abs(factor) * math.sqrt(fan_in * origins[w].variance)
        b_std = 0.0 if b is None else math.sqrt(origins[b].variance)
        return kind(**shape, w_std=w_std, b_std=b_std, **gradients)

    return make


def functional_linear(reader: ModuleReader, node: fx.Node) -> Factory:
    """Dense of an F.linear call whose weight is a parameter, times a constant perhaps."""
    weight, factor = _parameter(reader, node.args[1] if len(node.args) > 1 else node.kwargs.get("weight"))
    other = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    bias = None if other is None else _parameter(reader, other)
    if bias is not None and bias[1] != 1.0:
        raise ConversionError(f"{node.name} has a bias with a multiplier, which has no rule.")
    name = reader.names.get(id(weight), node.name)
    prefix = name.removesuffix("weight")
    return linear(reader, prefix, weight, None if bias is None else bias[0], factor)


def _parameter(reader: ModuleReader, node: Any) -> tuple[Tensor, float]:
    """A parameter times a constant: NTK parametrizations divide weights by √fan_in."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value: Any = reader.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value, 1.0
    if isinstance(node, fx.Node) and node.target in (operator.mul, operator.truediv, torch.mul, torch.div):
        a, b = node.args
        if isinstance(b, int | float):
            value, factor = _parameter(reader, a)
            return value, factor / b if node.target in (operator.truediv, torch.div) else factor * b
        if isinstance(a, int | float) and node.target in (operator.mul, torch.mul):
            value, factor = _parameter(reader, b)
            return value, factor * a
    raise ConversionError(f"{node} is used as a weight but is not a parameter of the module times a constant.")


def position(reader: ModuleReader, node: fx.Node) -> Factory | None:
    """A learned embedding [1, T, d] or [T, d] that is added to the signal; None for any other node."""
    if node.op != "get_attr":
        return None
    value, _ = _parameter(reader, node)
    shape = value.shape[1:] if value.ndim == 3 and value.shape[0] == 1 else value.shape
    if len(shape) != 2 or not isinstance(value, nn.Parameter):
        return None
    name = reader.register(Weights(str(node.target), value, shape[1], 1, bias=True))
    grad = float(value.requires_grad)
    return lambda origins: Position(shape[0], math.sqrt(origins[name].variance), grad)


def batch_norm(name: str, m: nn.BatchNorm1d | nn.BatchNorm2d) -> Factory:
    """Affine with the running statistics, which must be those of a fresh module.

    Raises:
        ConversionError: the statistics come from batches, or weight and bias are not at initialisation.
    """
    mean, variance = m.running_mean, m.running_var
    if mean is None or variance is None or bool((mean != 0).any()) or bool((variance != variance[0]).any()):
        raise ConversionError(
            f"{name} ({type(m).__name__}) has statistics of batches, which depend on the data; convert before training "
            "or after reset_running_stats()."
        )
    inner = 1 / math.sqrt(float(variance[0]) + m.eps)
    return constant(_affine(name, m.weight, m.bias, inner))


def layer_norm(name: str, m: nn.LayerNorm) -> list[Factory]:
    """LayerNorm, followed by Affine where it has parameters.

    Raises:
        ConversionError: it normalises more than the last dimension.
    """
    if len(m.normalized_shape) != 1:
        raise ConversionError(f"{name} (LayerNorm over {m.normalized_shape}) normalises positions, which has no rule.")
    layers: list[Factory] = [constant(LayerNorm(m.eps))]
    return [*layers, constant(_affine(name, m.weight, m.bias, 1.0))] if m.elementwise_affine else layers


def _affine(name: str, weight: Tensor | None, bias: Tensor | None, inner: float) -> Affine:
    """weight·(inner·h) + bias with one trained weight and bias per channel."""
    if weight is not None and bool((weight != weight[0]).any()):
        raise ConversionError(f"{name}.weight is not constant, so it is not at initialisation.")
    if bias is not None and bool((bias != 0).any()):
        raise ConversionError(f"{name}.bias is not zero, so it is not at initialisation.")
    w_grad = inner**2 if weight is not None and weight.requires_grad else 0.0
    b_grad = 1.0 if bias is not None and bias.requires_grad else 0.0
    return Affine(inner * (1.0 if weight is None else float(weight[0].detach())), w_grad, b_grad)


def constant(layer: Layer) -> Factory:
    """A layer that needs no weight."""
    return lambda origins: layer
