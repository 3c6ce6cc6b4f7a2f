"""Hand-written attention: what a module computes between its projections and the next Linear, inferred from values.

There are too many ways to write heads (chunk or three projections, view and transpose or unflatten, matmul and softmax
or scaled_dot_product_attention, masks from buffers) to match them all. The part of the graph in between is run on
random projections instead and compared with self-attention of every number of heads, order of channels, scale and mask:
what agrees in float64 on random numbers is that attention, and what agrees with none is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ntkwatch.infinite.initialisation import Origin
from ntkwatch.infinite.layers import Dense, Layer
from ntkwatch.infinite.parametrized import ConversionError, Factory, ModuleReader, Step, linear
from ntkwatch.infinite.softmax import SoftmaxAttention

ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
MIXING = {"view", "reshape", "unflatten", "chunk", "split", "tensor_split", "unbind", "transpose", "permute", "matmul"}
MIXING |= {"scaled_dot_product_attention", "bmm", "einsum", "getitem"}
ROWS, TOKENS = 2, 4  # of the random projections


@dataclass(frozen=True)
class HeadLayout:
    """How self-attention is laid out.

    order: which third is queries, keys, values. scale: of the logits times √head_size.
    """

    head_size: int
    causal: bool
    scale: float
    order: tuple[int, int, int]


def attention_step(reader: ModuleReader, node: fx.Node) -> Step | None:
    """A step of attention written by hand: among its heads, or the Linear behind them; None for any other node."""
    signals = [n for n in node.all_input_nodes if n in reader.steps]
    name = getattr(node.target, "__name__", str(node.target))
    if not any(reader.steps[n].mixed for n in signals):
        from_linear = all(_is_linear(reader, n) for n in signals)
        flat = name in ("view", "reshape") and flattens(list(node.args[1:]))
        flat |= name == "getitem" and token_index(node.args[1]) is not None
        turned = name in MIXING or (name == "getattr" and node.args[1] in ("mT", "mH"))
        return Step(signals, [], False, mixed=True) if from_linear and turned and not flat else None
    module = reader.modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(module, nn.Linear):
        out = linear(reader, f"{node.target}.", module.weight, module.bias)
        source, make = attention_between(reader, signals[0], out)
        return Step([source], [make], False)
    return Step(signals, [], False, mixed=True)


def _is_linear(reader: ModuleReader, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(reader.modules[str(node.target)], nn.Linear)


def flattens(shape: list[Any]) -> bool:
    """x.view(n, -1) and its like."""
    return len(shape) == 2 and (shape[1] == -1 or shape[0] == -1)


def token_index(index: Any) -> int | None:
    """i of x[:, i]; None for any other index."""
    which = index if isinstance(index, tuple) else (index,)
    one = len(which) > 1 and which[0] == slice(None) and isinstance(which[1], int)
    return which[1] if one and all(i == slice(None) or i is Ellipsis for i in which[2:]) else None


def is_self_attention(node: fx.Node, name: str, m: nn.Module) -> None:
    """Attention of one signal to itself, without masks."""
    signals = 3 if isinstance(m, nn.MultiheadAttention) else 1
    given = {
        k: v for k, v in node.kwargs.items() if k not in ("need_weights", "average_attn_weights") and v is not None
    }
    others = [a for a in node.args[signals:] if a is not None] + [
        k for k in given if k not in ("query", "key", "value")
    ]
    own = [*node.args[:signals], *[given[k] for k in ("query", "key", "value") if k in given]]
    if others or len(set(own)) > 1:
        raise ConversionError(
            f"{name} ({type(m).__name__}) converts where a sequence attends to all of itself: no masks, no other keys."
        )


def attention_between(reader: ModuleReader, node: fx.Node, out: Factory) -> tuple[fx.Node, Factory]:
    """The input of the attention that ends in `node`, and its layer with the projection `out` behind it."""
    projections = _frontier(reader, node)
    sources = {reader.steps[p].sources[0] for p in projections}
    if len(sources) != 1 or len(projections) not in (1, 3):
        raise _unknown(node, f"it mixes {len(projections)} projections of {len(sources)} signals")
    found = _identify(reader, node, projections)
    makes = [reader.steps[p].layers[-1] for p in projections]

    def make(origins: dict[str, Origin]) -> Layer:
        dense = [cast(Dense, m(origins)) for m in makes] * (3 // len(makes))
        query, key, value = (dense[i] for i in found.order)
        s = found.scale
        grads = {"w_grad": (query.w_grad or 0.0) * s**2, "b_grad": (query.b_grad or 0.0) * s**2}
        query = replace(query, w_std=query.w_std * s, b_std=query.b_std * s, **grads)
        return SoftmaxAttention(query, key, value, cast(Dense, out(origins)), found.head_size, found.causal)

    return sources.pop(), make


def _frontier(reader: ModuleReader, node: fx.Node) -> list[fx.Node]:
    """The projections that a mix of channels is computed from, in the order of the graph."""
    found: dict[fx.Node, None] = {}
    todo = [node]
    seen = set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in reader.steps and not reader.steps[current].mixed:
            found[current] = None
        elif current in reader.steps:
            todo += [n for n in current.all_input_nodes if n in reader.steps and not _is_size(reader, n, current)]
    return [n for n in node.graph.nodes if n in found]


def _is_size(reader: ModuleReader, n: fx.Node, user: fx.Node) -> bool:
    """Whether `user` only asks n for its shape."""
    name = getattr(user.target, "__name__", str(user.target))
    return name in ("size", "dim") or (name == "getattr" and user.args[1] in ("shape", "ndim"))


def _identify(reader: ModuleReader, node: fx.Node, projections: list[fx.Node]) -> HeadLayout:
    generator = torch.Generator().manual_seed(0)
    widths = [_width(reader, p) for p in projections]
    drawn = [
        torch.randn(ROWS, TOKENS, w, generator=generator, dtype=torch.float64, device=generator.device) for w in widths
    ]
    known = dict(zip(projections, drawn, strict=True))
    inputs = torch.zeros(ROWS, TOKENS, _fan_in(reader, projections[0]), dtype=torch.float64)
    try:
        with torch.no_grad():
            value = _run(reader, node, known, inputs)
    except Exception as error:
        raise _unknown(node, f"it cannot be run alone ({type(error).__name__}: {error})") from error
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (ROWS, TOKENS):
        wanted = value.double().sort(dim=-1).values  # which channel is which does not matter
        for heads, got in _candidates(drawn):
            if got.shape == wanted.shape and torch.allclose(got.sort(dim=-1).values, wanted, atol=1e-9):
                return heads
    raise _unknown(node, "it is no self-attention with softmax over all or all earlier positions")


def _candidates(drawn: list[Tensor]) -> Iterator[tuple[HeadLayout, Tensor]]:
    """Every attention that the projections allow, with its output [n, T, H·d]."""
    width = drawn[0].shape[-1] // (3 if len(drawn) == 1 else 1)
    if len({d.shape for d in drawn}) > 1 or (len(drawn) == 1 and drawn[0].shape[-1] % 3):
        return
    for h in (h for h in range(1, width + 1) if width % h == 0):
        for parts in _arrangements(drawn, h, width // h):
            for order in itertools.permutations(range(3)):
                q, k, v = (parts[i] for i in order)
                yield from _attend(q, k, v, order)


def _arrangements(drawn: list[Tensor], h: int, d: int) -> Iterator[list[Tensor]]:
    """Three [n, H, T, d], for each way in which channels may number thirds, heads and units."""
    if len(drawn) == 3:
        for swapped in (False, True):
            yield [
                x.unflatten(-1, (d, h)).permute(0, 3, 1, 2) if swapped else x.unflatten(-1, (h, d)).transpose(1, 2)
                for x in drawn
            ]
        return
    sizes = {"3": 3, "h": h, "d": d}
    for axes in itertools.permutations("3hd"):
        x = drawn[0].unflatten(-1, [sizes[a] for a in axes])
        yield list(x.permute(2 + axes.index("3"), 0, 2 + axes.index("h"), 1, 2 + axes.index("d")))


def _attend(q: Tensor, k: Tensor, v: Tensor, order: tuple[int, ...]) -> Iterator[tuple[HeadLayout, Tensor]]:
    d = q.shape[-1]
    logits = q @ k.mT / math.sqrt(d)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    for causal in (False, True):
        for scale in dict.fromkeys((1.0, 1 / math.sqrt(d), math.sqrt(d))):  # 1/√d, 1/d, none
            g = logits * scale
            g = g.masked_fill(later, -math.inf) if causal else g
            yield HeadLayout(d, causal, scale, cast(Any, order)), (torch.softmax(g, -1) @ v).transpose(1, 2).flatten(2)


def _run(reader: ModuleReader, node: Any, known: dict[fx.Node, Tensor], inputs: Tensor) -> Any:
    """The value of a node, given those of the projections; any other signal only has a shape."""
    if isinstance(node, tuple | list):
        return type(node)(_run(reader, n, known, inputs) for n in node)
    if isinstance(node, slice):
        return slice(*(_run(reader, n, known, inputs) for n in (node.start, node.stop, node.step)))
    if not isinstance(node, fx.Node):
        return node
    if node in known:
        return known[node]
    if node in reader.steps and not reader.steps[node].mixed:
        return inputs
    if node.op == "get_attr":
        found: Any = reader.module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found
    args = [_run(reader, a, known, inputs) for a in node.args]
    kwargs = {k: _run(reader, v, known, inputs) for k, v in node.kwargs.items()}
    known[node] = _call(reader, node, args, kwargs)
    return known[node]


def _call(reader: ModuleReader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return cast(Any, node.target)(*args, **kwargs)
    module = reader.modules[str(node.target)]
    if any(True for _ in module.parameters()):
        raise TypeError(f"{node.target} has parameters")
    return args[0] if isinstance(module, nn.Dropout) else module(*args, **kwargs)


def _width(reader: ModuleReader, node: fx.Node) -> int:
    return _weight(reader, node).shape[0]


def _fan_in(reader: ModuleReader, node: fx.Node) -> int:
    return _weight(reader, node).shape[1]


def _weight(reader: ModuleReader, node: fx.Node) -> Tensor:
    module = reader.modules.get(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.Linear):
        raise _unknown(node, "it splits channels of what is no Linear")
    return module.weight


def _unknown(node: fx.Node, why: str) -> ConversionError:
    return ConversionError(f"{node.name} rearranges channels in a way that has no rule: {why}.")
