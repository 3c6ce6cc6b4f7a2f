"""One node of a traced module -> the layers it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from ntkwatch.infinite.activations import Abs, Erf, Gelu, LeakyRelu, Relu, Sin
from ntkwatch.infinite.attention_detection import ATTENTION, attention_step, flattens, is_self_attention, token_index
from ntkwatch.infinite.layers import Affine, Layer
from ntkwatch.infinite.parametrized import (
    ConversionError,
    Factory,
    ModuleReader,
    Step,
    attention,
    batch_norm,
    constant,
    convolution,
    encoder_layer,
    functional_linear,
    layer_norm,
    linear,
    position,
)
from ntkwatch.infinite.quadrature import Activation
from ntkwatch.infinite.tokens import Token
from ntkwatch.infinite.windows import AvgPool, Flatten, GlobalAvgPool

IGNORED = {"size", "dim", "getattr", "getitem", "__getitem__"}
PASS_THROUGH = {"contiguous", "dropout", "dropout1d", "dropout2d", "to", "float", "double", "identity"}
ELEMENTWISE: dict[str, Callable[[], Layer]] = {
    "relu": Relu,
    "relu_": Relu,
    "abs": Abs,
    "sin": Sin,
    "erf": Erf,
    "tanh": lambda: Activation(torch.tanh),
    "sigmoid": lambda: Activation(torch.sigmoid),
    "silu": lambda: Activation(F.silu),
    "softplus": lambda: Activation(F.softplus),
    "mish": lambda: Activation(F.mish),
    "elu": lambda: Activation(F.elu),
    "selu": lambda: Activation(F.selu),
    "cos": lambda: Activation(torch.cos),
}
SMOOTH = (nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Softsign, nn.LogSigmoid)
DROPOUT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


def step(reader: ModuleReader, node: fx.Node) -> Step | None:
    """The step of a node that computes from the input, None for bookkeeping such as x.size(0)."""
    if (mixed := attention_step(reader, node)) is not None:
        return mixed
    if node.op == "call_module":
        module = reader.modules[str(node.target)]
        if isinstance(module, ATTENTION):
            is_self_attention(node, str(node.target), module)
        return _one(reader, node, *_module(reader, str(node.target), module, _first(reader, node)))
    name = getattr(node.target, "__name__", str(node.target))
    if name in ("getitem", "__getitem__") and _is_attention(reader, node.args[0]):
        return Step([cast(fx.Node, node.args[0])], [], False)  # (output, weights)[0]
    if name in ("getitem", "__getitem__") and cast(fx.Node, node.args[0]) in reader.steps:
        return _token(reader, node)
    if name in IGNORED:
        return None
    if name in ("add", "add_", "iadd", "sum_"):
        return _add(reader, node)
    if name in ("mul", "truediv", "div", "imul", "itruediv", "mul_", "div_", "neg"):
        return _scale(reader, node, name)
    return _one(reader, node, *_call(reader, node, name))


def _is_attention(reader: ModuleReader, node: Any) -> bool:
    """Whether a node is the pair (output, weights) of nn.MultiheadAttention."""
    called = isinstance(node, fx.Node) and node.op == "call_module" and node in reader.steps
    return called and isinstance(reader.modules[str(node.target)], nn.MultiheadAttention)


def _encoder(reader: ModuleReader, name: str, m: nn.Module) -> list[Factory]:
    """nn.MultiheadAttention, nn.TransformerEncoderLayer or nn.TransformerEncoder."""
    if isinstance(m, nn.MultiheadAttention):
        return [attention(reader, name, m)]
    if isinstance(m, nn.TransformerEncoderLayer):
        function = m.activation
        known = ELEMENTWISE | {"gelu": Gelu}
        act = known.get(getattr(function, "__name__", ""))
        return encoder_layer(reader, name, m, act() if act else _activation(f"{name}.activation", cast(Any, function)))
    assert isinstance(m, nn.TransformerEncoder)
    layers = [make for i, layer in enumerate(m.layers) for make in _encoder(reader, f"{name}.layers.{i}", layer)]
    return layers if m.norm is None else [*layers, *layer_norm(f"{name}.norm", cast(nn.LayerNorm, m.norm))]


def _first(reader: ModuleReader, node: fx.Node) -> Step:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if not isinstance(source, fx.Node) or source not in reader.steps:
        raise ConversionError(f"{node.name} does not take the network's signal as its first argument.")
    return reader.steps[source]


def _one(reader: ModuleReader, node: fx.Node, layers: list[Factory], channels_first: bool) -> Step:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(source, fx.Node)
    return Step([source], layers, channels_first)


def _module(reader: ModuleReader, name: str, m: nn.Module, before: Step) -> tuple[list[Factory], bool]:
    """The layers of a module, and whether its output has channels first."""
    first = before.channels_first
    if hasattr(m, "parametrizations") or hasattr(m, "weight_g"):
        raise ConversionError(
            f"{name} ({type(m).__name__}) has a parametrized weight, which is not drawn entry by entry."
        )
    if isinstance(m, DROPOUT):
        return [], first
    if isinstance(m, nn.Linear):
        _no_channels_first(first, f"{name} (Linear)")
        return [linear(reader, f"{name}.", m.weight, m.bias)], False
    if isinstance(m, ATTENTION):
        _no_channels_first(first, f"{name} ({type(m).__name__})")
        return _encoder(reader, name, m), False
    if isinstance(m, nn.Conv1d | nn.Conv2d):
        return [convolution(reader, name, m)], True
    if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
        return [batch_norm(name, m)], first
    if isinstance(m, nn.LayerNorm):
        _no_channels_first(first, f"{name} (LayerNorm)")
        return layer_norm(name, m), False
    if isinstance(m, nn.Flatten):
        if (m.start_dim, m.end_dim) != (1, -1):
            raise ConversionError(f"{name} (Flatten) must flatten everything but the batch.")
        return [constant(Flatten())], False
    if (pool := _pool(name, m)) is not None:
        return [constant(pool)], not isinstance(pool, GlobalAvgPool)
    return [constant(_activation(name, m))], first


def _activation(name: str, m: nn.Module) -> Layer:
    if isinstance(m, nn.ReLU):
        return Relu()
    if isinstance(m, nn.LeakyReLU):
        return LeakyRelu(m.negative_slope)
    if isinstance(m, nn.GELU):
        return Gelu() if m.approximate == "none" else Activation(m)
    if isinstance(m, SMOOTH):
        return Activation(m)
    why = {
        "MaxPool2d": "a maximum of correlated Gaussians has no closed form; use an average",
        "Embedding": "its inputs are indices, not vectors; convert what follows it",
    }.get(type(m).__name__, "no rule for this module")
    raise ConversionError(f"{name} ({type(m).__name__}) cannot be converted: {why}.")


def _call(reader: ModuleReader, node: fx.Node, name: str) -> tuple[list[Factory], bool]:
    """The layers of a function or method on the signal."""
    first = _first(reader, node).channels_first
    rest = [*node.args[1:], *[v for k, v in node.kwargs.items() if k not in ("training", "inplace")]]
    if name in PASS_THROUGH:
        return [], first
    if name in ELEMENTWISE:
        return [constant(_elementwise(node, name, rest))], first
    if name == "gelu":
        return [constant(Gelu() if "tanh" not in rest else Activation(lambda u: F.gelu(u, approximate="tanh")))], first
    if name == "leaky_relu":
        return [constant(LeakyRelu(float(rest[0]) if rest else 0.01))], first  # type: ignore[arg-type]
    if name == "linear":
        _no_channels_first(first, node.name)
        return [functional_linear(reader, node)], False
    if name == "flatten" and rest in ([1], [1, -1]):
        return [constant(Flatten())], False
    if name in ("view", "reshape") and flattens(rest):
        return [constant(Flatten())], False
    if name == "mean":
        return [constant(_mean(node, rest, first))], False
    if name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d") and rest in ([1], [(1, 1)], [[1, 1]]):
        return [constant(GlobalAvgPool())], False
    if name in ("avg_pool1d", "avg_pool2d") and len(rest) == len(node.args) - 1 <= 3:
        return [constant(AvgPool(*[_shape(r) for r in rest]))], True
    raise ConversionError(f"{node.name} ({name}{_shown(rest)}) cannot be converted: no rule for it.")


def _elementwise(node: fx.Node, name: str, rest: list[Any]) -> Layer:
    """An activation, with its arguments where it was given some (elu's alpha, softplus' beta)."""
    if not [r for r in rest if not isinstance(r, bool)]:
        return ELEMENTWISE[name]()
    if any(isinstance(r, fx.Node) for r in rest) or not callable(node.target):
        raise ConversionError(f"{node.name} ({name}{_shown(rest)}) cannot be converted: its arguments are no numbers.")
    kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    return Activation(lambda u: node.target(u, *node.args[1:], **kwargs))  # type: ignore[operator]


def _mean(node: fx.Node, rest: list[Any], first: bool) -> Layer:
    dims = rest[0] if rest else None
    dims = tuple(dims) if isinstance(dims, list | tuple) else (dims,)
    positions = {(2, 3), (-2, -1), (2,), (-1,)} if first else {(1,), (-2,)}
    if dims not in positions or True in rest[1:]:
        raise ConversionError(f"{node.name} (mean over {rest}) is not the mean over all positions, without keepdim.")
    return GlobalAvgPool()


def _token(reader: ModuleReader, node: fx.Node) -> Step:
    """x[:, i] of tokens."""
    source, index = cast(fx.Node, node.args[0]), node.args[1]
    if (token := token_index(index)) is None:
        raise ConversionError(f"{node.name} (x[{index}]) converts where it takes one token, x[:, i].")
    _no_channels_first(reader.steps[source].channels_first, node.name)
    return Step([source], [constant(Token(token))], False)


def _add(reader: ModuleReader, node: fx.Node) -> Step:
    a, b = node.args[:2]
    for signal, other in ((a, b), (b, a)):
        if not (isinstance(signal, fx.Node) and isinstance(other, fx.Node) and signal in reader.steps):
            continue
        if (make := position(reader, other)) is not None:
            _no_channels_first(reader.steps[signal].channels_first, node.name)
            return Step([signal], [make], False)
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and a in reader.steps and b in reader.steps):
        raise ConversionError(f"{node.name} adds what does not come from the input; only sums of branches convert.")
    return Step([a, b], [], reader.steps[a].channels_first)


def _scale(reader: ModuleReader, node: fx.Node, name: str) -> Step:
    signal = [a for a in node.args if isinstance(a, fx.Node)]
    numbers = [float(a) for a in node.args if isinstance(a, int | float)]
    if len(signal) != 1 or (name != "neg" and (len(numbers) != 1 or ("div" in name and node.args[0] is not signal[0]))):
        raise ConversionError(f"{node.name} ({name}) multiplies by what is not a constant, which has no rule.")
    factor = -1.0 if name == "neg" else 1 / numbers[0] if "div" in name else numbers[0]
    layer = Affine(factor, w_grad=0.0, b_grad=0.0)
    return Step(signal, [constant(layer)], reader.steps[signal[0]].channels_first)


def _pool(name: str, m: nn.Module) -> Layer | None:
    if isinstance(m, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        if m.output_size not in (1, (1, 1), (1,)):
            raise ConversionError(f"{name} (AdaptiveAvgPool to {m.output_size}) converts to size 1 only; use AvgPool.")
        return GlobalAvgPool()
    if isinstance(m, nn.AvgPool1d | nn.AvgPool2d):
        if m.ceil_mode or not m.count_include_pad or getattr(m, "divisor_override", None) is not None:
            raise ConversionError(f"{name} (AvgPool) converts with ceil_mode=False and count_include_pad=True only.")
        return AvgPool(_shape(m.kernel_size), _shape(m.stride), _shape(m.padding))
    return None


def _shape(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _shown(rest: list[Any]) -> str:
    return "" if not rest else ", " + ", ".join(str(r) for r in rest)


def _no_channels_first(first: bool, what: str) -> None:
    if first:
        raise ConversionError(
            f"{what} follows a convolution without Flatten or pooling: it would act on a position axis."
        )
