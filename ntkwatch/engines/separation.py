"""Where examples come apart in the graph of a forward pass, read from a few probes.

Going up the graph from a parameter, the first node whose output gradient can be told apart by example is where its
per-example gradient is read off. Nodes below it (a transpose, weight norm, a lookup of position embeddings) depend on
parameters alone; the gradient is pulled back through them for each example.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ntkwatch.engines.graph import (
    Graph,
    Layout,
    NestedTensors,
    Scattered,
    base_of,
    digits,
    edges,
    find_layout,
    node_bytes,
    reaches,
    rearranges,
    types_inside,
    walk,
)
from ntkwatch.engines.passes import can_be_batched
from ntkwatch.engines.suspects import nested
from ntkwatch.model import Network, UnsupportedModel, take

_FEW = 3  # the fewest probes that tell [n, T] from [T, n] and from T = n by their values


@dataclass(frozen=True)
class Separation:
    """Where examples come apart: boundary edges (node number, input, layout), and the shared nodes below them."""

    n: int
    signature: tuple[str, ...]
    boundary: tuple[tuple[int, int, Layout | Scattered], ...]
    shared: frozenset[int]
    sure: bool  # told apart beyond doubt and not by the data: they hold for more probes of the same shape too
    saved: float = 0.0  # bytes per example of all that the graph's nodes give
    captured: float = 0.0  # bytes per example and output of the gradients at the boundary
    outputs: int = 1
    batched: bool = True  # whether backward passes for all outputs at once are as right as in turn
    alone: bool = False  # examples are passed through one by one, and there is no boundary

    @functools.cached_property
    def edges(self) -> dict[int, list[tuple[int, Layout | Scattered]]]:
        """The boundary by node: its inputs there, and how examples lie in its output's gradients."""
        found: dict[int, list[tuple[int, Layout | Scattered]]] = {}
        for number, k, layout in self.boundary:
            found.setdefault(number, []).append((k, layout))
        return found


def leaves_at(network: Network, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors that stand for the trained parameters in the graph: the module's own, or fresh ones of `state`."""
    chosen: dict[str, Tensor] = {}
    for name, p in network.parameters.items():
        own = (state or {}).get(name, p)
        chosen[name] = own if own is p and p.requires_grad else own.detach().requires_grad_()
    return chosen


def outputs_at(network: Network, x: Any, state: Mapping[str, Tensor] | None, leaves: Mapping[str, Tensor]) -> Tensor:
    """f(x) [n, C] with a graph to `leaves`."""
    swapped = {name: t for name, t in leaves.items() if t is not network.parameters[name]}
    with _steps_apart(network):
        return network.outputs(x, {**(state or {}), **swapped})


@contextlib.contextmanager
def _steps_apart(network: Network) -> Iterator[None]:
    """Recurrent layers as a graph of their steps: a fused one's gradient could be taken apart by repeating it only."""
    if not any(isinstance(module, torch.nn.RNNBase) for module in network.module.modules()):
        yield
        return
    fused = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(fused)


def few(x: Any) -> Any:
    """The first probes, as few as tell layouts apart."""
    return take(x, slice(0, _FEW))


def separate_few(network: Network, x: Any, state: Mapping[str, Tensor] | None = None) -> Separation | None:
    """The layouts read from a few probes; None where the outputs depend on no trained parameter.

    Examples must not be coupled: see `coupling.check_uncoupled`.
    """
    leaves = leaves_at(network, state)
    f = outputs_at(network, few(x), state, leaves)
    if f.grad_fn is None:
        return None
    try:
        graph = walk(f, leaves)
    except NestedTensors:
        raise UnsupportedModel(nested(network, lambda: outputs_at(network, few(x), state, leaves))) from None
    found = separate(graph, f, f.shape[0])
    return dataclasses.replace(found, sure=found.sure and not graph.routes)


def separate(graph: Graph, f: Tensor, n: int) -> Separation:
    """Finds, going up from the leaves, the nodes at which examples come apart.

    Raises:
        UnsupportedModel: some parameter's gradient cannot be told apart by example anywhere.
    """
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    shared: set[Node] = set()
    boundary: dict[tuple[int, int], Layout | Scattered] = {}
    layouts: dict[Node, tuple[Layout | Scattered | None, bool]] = {}
    sure, frontier = True, list(graph.leaves.values())
    while frontier:
        shared.update(frontier)
        above = list(dict.fromkeys(node for child in frontier for node, _ in graph.consumers[child]))
        asked = [node for node in above if node not in layouts and not rearranges(node)]
        layouts.update(_read_layouts(graph, f, asked, n))
        for child in frontier:
            for node, k in graph.consumers[child]:
                layout = None if rearranges(node) else layouts[node][0]
                if layout is not None:
                    boundary[numbers[node], k] = layout
                    sure = sure and layouts[node][1] and isinstance(layout, Layout)
                elif node is graph.root:
                    raise UnsupportedModel(_inseparable(graph, child))
        crossed = [node for node in above if rearranges(node) or layouts[node][0] is None]
        frontier = [node for node in crossed if node not in shared]
    return Separation(
        n,
        graph.signature,
        tuple((i, k, layout) for (i, k), layout in sorted(boundary.items(), key=lambda item: item[0])),
        frozenset(numbers[node] for node in shared),
        sure,
        sum(node_bytes(graph, node) for node in graph.nodes if node not in shared) / n,
        sum(node_bytes(graph, graph.nodes[i]) for i in {i for i, _ in boundary}) / n,
        f.shape[1],
        can_be_batched(f, edges(graph, [graph.nodes[i] for i in sorted({i for i, _ in boundary})])),
    )


def _inseparable(graph: Graph, node: Node) -> str:
    names = [name for name, leaf in graph.leaves.items() if reaches(node, leaf)]
    return (
        f"the gradients of {', '.join(names[:3])} cannot be told apart by example: examples are coupled in the model, "
        "and the per-example kernel does not exist"
    )


def _read_layouts(
    graph: Graph, f: Tensor, nodes: Sequence[Node], n: int
) -> dict[Node, tuple[Layout | Scattered | None, bool]]:
    """The layout of each node's output gradients, from 1 + digits backward passes."""
    if not nodes:
        return {}
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(f.shape, generator=generator, dtype=torch.float64, device="cpu").to(f.device, f.dtype) + 0.5
    base = base_of(types_inside(f))
    codes = [code.to(f.device, f.dtype)[:, None] for code in digits(n, base)]
    passes = [_backward_once(f, graph, nodes, u * code) for code in (torch.ones_like(codes[0]), *codes)]
    found: dict[Node, tuple[Layout | Scattered | None, bool]] = {}
    for node in nodes:
        if any(g is not None and (g.is_nested or g.layout is not torch.strided) for g in passes[0][node]):
            found[node] = None, True
            continue
        readings = [
            find_layout(passes[0][node][i], [p[node][i] for p in passes[1:]], n, base)  # type: ignore[arg-type, misc]
            for i, g in enumerate(passes[0][node])
            if g is not None
        ]
        found[node] = _common(readings)
    return found


def _common(readings: Sequence[tuple[Layout | Scattered | None, bool]]) -> tuple[Layout | Scattered | None, bool]:
    """One layout for all outputs of a node: they are few, and mostly one."""
    if not readings:
        return Layout(0, 1), False
    first, sure = readings[0]
    if all(layout == first for layout, _ in readings[1:] if isinstance(first, Layout)):
        return first, sure and all(also for _, also in readings)
    return None, True


def _backward_once(
    f: Tensor, graph: Graph, nodes: Sequence[Node], cotangent: Tensor
) -> dict[Node, list[Tensor | None]]:
    wanted = edges(graph, nodes)
    grads = iter(torch.autograd.grad([f], wanted, [cotangent], retain_graph=True, allow_unused=True))
    return {node: [next(grads) for _ in graph.outputs_used[node]] for node in nodes}


def transfers(recipe: Separation, graph: Graph, n: int) -> bool:
    """Whether layouts read from a few probes hold in this graph too."""
    if not recipe.sure or recipe.signature != graph.signature or (n == 1) != (recipe.n == 1):
        return False
    for number, _, layout in recipe.boundary:
        node: Any = graph.nodes[number]
        for used in graph.outputs_used[node]:
            if not layout.fits(tuple(node._input_metadata[used].shape), n):
                return False
    return True
