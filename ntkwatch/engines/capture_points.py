"""Capture points: where the autograd graph of a forward pass separates examples, read from a few probes.

Going up from a parameter, the first node whose output gradient can be separated by example yields the per-example
gradient. Nodes below it (a transpose, weight norm) depend on parameters alone; the gradient is pulled back there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ntkwatch.engines.backward import can_be_batched
from ntkwatch.engines.graph import Graph, NestedTensors, edges, node_bytes, reaches, rearranges, types_inside, walk
from ntkwatch.engines.layouts import Layout, Scattered, agrees, base_of, digits, find_layout
from ntkwatch.engines.refusals import nested
from ntkwatch.model import Network, UnsupportedModel, take

_KEPT = 64  # capture points kept per network
_INDICES = ("_saved_indices", "_saved_index", "_saved_mask", "_saved_condition")  # of nodes that route rows
_FEW = 3  # the fewest probes whose values distinguish [n, T] from [T, n]


@dataclass(frozen=True)
class CapturePoints:
    """The boundary edges (node number, input, layout) at which examples separate, and the shared nodes below them."""

    n: int
    signature: tuple[str, ...]
    boundary: tuple[tuple[int, int, Layout | Scattered], ...]
    shared: frozenset[int]
    sure: bool  # the layouts are unambiguous and independent of the data: they hold for any probes
    saved: float = 0.0  # bytes per example of all node outputs
    captured: float = 0.0  # bytes per example and output of the gradients at the boundary
    outputs: int = 1
    batched: bool = True  # whether batched backward passes give the results of sequential ones
    alone: bool = False  # one pass per example, without a boundary
    certain: bool = False  # the layouts are unambiguous, but may depend on how the data route rows
    routing: str | None = None  # digest of the indices that rows were routed by; None where a node does not show them
    read: dict[tuple[int, str | None], CapturePoints] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def edges(self) -> dict[int, list[tuple[int, Layout | Scattered]]]:
        """The boundary by node number: its inputs, and the layout of examples in its output gradients."""
        found: dict[int, list[tuple[int, Layout | Scattered]]] = {}
        for number, k, layout in self.boundary:
            found.setdefault(number, []).append((k, layout))
        return found


def leaves_at(network: Network, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The leaf tensors of the trained parameters: the module's own, or fresh ones at `state`."""
    chosen: dict[str, Tensor] = {}
    for name, p in network.parameters.items():
        own = (state or {}).get(name, p)
        chosen[name] = own if own is p and p.requires_grad else own.detach().requires_grad_()
    return chosen


def outputs_at(network: Network, x: Any, state: Mapping[str, Tensor] | None, leaves: Mapping[str, Tensor]) -> Tensor:
    """f(x) [n, C], with a graph to `leaves`."""
    swapped = {name: t for name, t in leaves.items() if t is not network.parameters[name]}
    with _steps_apart(network):
        return network.outputs(x, {**(state or {}), **swapped})


@contextlib.contextmanager
def _steps_apart(network: Network) -> Iterator[None]:
    """Runs recurrent layers step by step: separating a fused layer's gradient would repeat its backward pass."""
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
    """The first probes, as few as distinguish layouts."""
    return take(x, slice(0, _FEW))


def read_capture_points(
    network: Network, x: Any, state: Mapping[str, Tensor] | None = None, inner: CapturePoints | None = None
) -> CapturePoints | None:
    """The capture points from a few uncoupled probes; None where the outputs depend on no trained parameter.

    inner: the points of a network whose outputs this one mixes, reused where its graph occurs in this one.
    Raises UnsupportedModel for nested tensors, and as `separate`.
    """
    leaves = leaves_at(network, state)
    f = outputs_at(network, few(x), state, leaves)
    if f.grad_fn is None:
        return None
    try:
        graph = walk(f, leaves)
    except NestedTensors:
        raise UnsupportedModel(nested(network, lambda: outputs_at(network, few(x), state, leaves))) from None
    below = None if inner is None else _shifted(inner, graph, f)
    return separate(graph, f, f.shape[0]) if below is None else below


def _shifted(inner: CapturePoints, graph: Graph, f: Tensor) -> CapturePoints | None:
    """An inner graph's capture points, renumbered for one with more nodes near the output; None if it is another."""
    more = len(graph.signature) - len(inner.signature)
    if more < 0 or graph.signature[more:] != inner.signature:
        return None
    found = dataclasses.replace(
        inner,
        signature=graph.signature,
        boundary=tuple((number + more, k, layout) for number, k, layout in inner.boundary),
        shared=frozenset(number + more for number in inner.shared),
        outputs=f.shape[1],
        read={},
    )
    return found if _fits(found, graph, f.shape[0]) else None


def separate(graph: Graph, f: Tensor, n: int) -> CapturePoints:
    """Finds the capture points for n examples, going up from the leaves.

    Raises:
        UnsupportedModel: the gradient of some parameter cannot be separated by example at any node.
    """
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    shared: set[Node] = set()
    boundary: dict[tuple[int, int], Layout | Scattered] = {}
    layouts: dict[Node, tuple[Layout | Scattered | None, bool]] = {}
    sure = certain = True
    frontier = list(graph.leaves.values())
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
                    certain = certain and layouts[node][1]
                    sure = sure and isinstance(layout, Layout)
                elif node is graph.root:
                    raise UnsupportedModel(_inseparable(graph, child))
        crossed = [node for node in above if rearranges(node) or layouts[node][0] is None]
        frontier = [node for node in crossed if node not in shared]
    return CapturePoints(
        n,
        graph.signature,
        tuple((i, k, layout) for (i, k), layout in sorted(boundary.items(), key=lambda item: item[0])),
        frozenset(numbers[node] for node in shared),
        sure and certain and not graph.routing,
        sum(node_bytes(graph, node) for node in graph.nodes if node not in shared) / n,
        sum(node_bytes(graph, graph.nodes[i]) for i in {i for i, _ in boundary}) / n,
        f.shape[1],
        can_be_batched(f, edges(graph, [graph.nodes[i] for i in sorted({i for i, _ in boundary})])),
        certain=certain,
        routing=routing_digest(graph),
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
    """The layout of each node's output gradients, from 1 + (number of digits) backward passes."""
    if not nodes:
        return {}
    u, codes, base = _cotangents(f)
    passes = [_backward_once(f, graph, nodes, u * code) for code in codes]
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


def _cotangents(f: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """A cotangent without zeros, the codes [n, 1] that scale it (ones first), and the base of their digits."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(f.shape, generator=generator, dtype=torch.float64, device="cpu").to(f.device, f.dtype) + 0.5
    base = base_of(types_inside(f))
    codes = [code.to(f.device, f.dtype)[:, None] for code in digits(f.shape[0], base)]
    return u, [torch.ones_like(codes[0]), *codes], base


def _common(readings: Sequence[tuple[Layout | Scattered | None, bool]]) -> tuple[Layout | Scattered | None, bool]:
    """One layout for all outputs of a node; most nodes have a single output."""
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


def capture_points_for(points: CapturePoints | None, graph: Graph, f: Tensor) -> CapturePoints:
    """The capture points of this graph: those of `points` where they hold, else read again; raises as `separate`.

    Data-dependent layouts hold if the data route rows identically (equal digests). Otherwise backward passes verify
    them, which costs one reading instead of one per step up the graph. `points.read` keeps the result.
    """
    n = f.shape[0]
    if points is None:
        return separate(graph, f, n)
    if points.sure and _fits(points, graph, n):
        return points
    digest = routing_digest(graph)
    known = points.read.get((n, digest), points)
    if not _fits(known, graph, n):
        known = points
    if known.certain and digest is not None and known.routing == digest and known.n == n and _fits(known, graph, n):
        return known
    held = _fits(known, graph, n) and _holds(known, graph, f)
    found = dataclasses.replace(known, n=n, routing=digest, read={}) if held else separate(graph, f, n)
    if len(points.read) >= _KEPT:
        points.read.clear()
    points.read[n, digest] = found
    return found


def _fits(points: CapturePoints, graph: Graph, n: int) -> bool:
    """Whether the layouts belong to a graph of this form."""
    if points.signature != graph.signature or (n == 1) != (points.n == 1):
        return False
    for number, _, layout in points.boundary:
        node: Any = graph.nodes[number]
        for used in graph.outputs_used[node]:
            if not layout.fits(tuple(node._input_metadata[used].shape), n):
                return False
    return True


def _holds(points: CapturePoints, graph: Graph, f: Tensor) -> bool:
    """Whether backward passes confirm the layouts; scattered rows of other data are never reused."""
    if any(isinstance(layout, Scattered) for _, _, layout in points.boundary):
        return False
    layouts = {graph.nodes[i]: layout for i, _, layout in points.boundary if isinstance(layout, Layout)}
    u, codes, base = _cotangents(f)
    passes = [_backward_once(f, graph, list(layouts), u * code) for code in codes]
    return all(
        g is None or agrees(layout, g, [each[node][i] for each in passes[1:]], f.shape[0], base)
        for node, layout in layouts.items()
        for i, g in enumerate(passes[0][node])
    )


def routing_digest(graph: Graph) -> str | None:
    """A digest of the indices and masks that regroup rows in a graph; None where a node does not expose them."""
    digest = hashlib.blake2b(digest_size=16)
    for node in graph.routing:
        name = next((name for name in _INDICES if hasattr(node, name)), None)
        try:
            saved = None if name is None else getattr(node, name)
        except RuntimeError:  # modified in place since
            saved = None
        if saved is None:
            return None
        for t in saved if isinstance(saved, list | tuple) else [saved]:
            if t is not None:
                digest.update(repr((tuple(t.shape), t.dtype)).encode())
                digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
