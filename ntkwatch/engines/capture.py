"""One forward pass and C backward passes to the activations yield a per-example factor for every trained parameter.

The backward pass covers a group of outputs and a segment of the graph at a time, from the output down. A parameter's
factor is yielded as soon as it is complete, so memory never holds the gradients of more than one segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ntkwatch.engines.backward import Start, at_once, sequential_passes
from ntkwatch.engines.capture_points import CapturePoints, capture_points_for, leaves_at, outputs_at
from ntkwatch.engines.early_jacobians import EarlyJacobian, Gradients, early_bytes, factor_of
from ntkwatch.engines.factor_sums import add, densify
from ntkwatch.engines.factors import Factor
from ntkwatch.engines.graph import Graph, node_bytes, reaches, walk
from ntkwatch.engines.per_output import PerOutput
from ntkwatch.engines.pullback import carry, leaf_below, pull_back
from ntkwatch.model import Network, UnsupportedModel

G = TypeVar("G")
SEGMENT_BYTES = 1 << 25  # gradients held before the pass pauses and contracts them
GROUP_BYTES = 1 << 28  # gradients of one node for a group of outputs: larger groups share more work and hold more
_PASS_BYTES = {
    "cpu": 1 << 25,
    "cuda": 1 << 27,
}  # gradients of one node in a batched pass, about the size of libraries' workspaces
_BATCHED_BYTES = {"cpu": 1 << 19, "cuda": 1 << 26}  # per node and output: above, one pass per output is faster


@dataclass(frozen=True)
class Found:
    """The complete factor of one parameter, and the names of the rules that produced it."""

    name: str
    factor: Factor
    rule: str


class Capture:
    """A forward pass that yields per-example factors one parameter at a time.

    Args:
        summed: use Σ_c f_c as the only output (enough for the "sum" kernel).
        points: from `read_capture_points`, to avoid reading the layouts again.
        scale: choose groups and segments for this many times the examples (small kernels of `extrapolation`).

    Raises:
        UnsupportedModel: the outputs depend on no trained parameter, or gradients cannot be separated by example.
    """

    def __init__(
        self,
        network: Network,
        x: Any,
        state: Mapping[str, Tensor] | None = None,
        *,
        summed: bool = False,
        points: CapturePoints | None = None,
        scale: float = 1.0,
    ) -> None:
        leaves = leaves_at(network, state)
        f = outputs_at(network, x, state, leaves)
        if f.grad_fn is None:
            raise UnsupportedModel("the outputs depend on no trained parameter (detached, or run under no_grad?)")
        self.graph = walk(f, leaves)
        self.n = f.shape[0]
        self._edge = f
        self.outputs = f.detach()
        self.points = capture_points_for(points, self.graph, f)
        self.cotangents = cotangents(f, summed)
        self._scale = scale

    def groups(self) -> list[slice]:
        """Groups of outputs for which the gradients of the largest node stay below GROUP_BYTES."""
        largest = max(map(self._kept_bytes, self.points.edges))
        outputs = len(self.cotangents)
        size = min(outputs, max(1, int(GROUP_BYTES / max(largest, 1))))
        size = -(-outputs // -(-outputs // size))  # of equal size, nearly
        return [slice(i, min(i + size, outputs)) for i in range(0, outputs, size)]

    def factors(self, outputs: slice = slice(None)) -> Iterator[Found]:
        """The factor of every parameter that the outputs depend on, once each, for a group of outputs."""
        collector = _Collector(self.graph, self.points, self.n)
        for grads in self._segments(PerOutput(self.cotangents.parts[outputs])):
            for number, filled in grads.items():
                collector.take(number, filled)
            yield from collector.complete()
        yield from collector.rest()

    def _segments(self, cotangents: PerOutput) -> Iterator[dict[int, Gradients | EarlyJacobian]]:
        """The gradients at the boundary nodes, one segment of the graph at a time."""
        graph, wanted = self.graph, sorted(self.points.edges)
        start: Start = self._edge
        cuts = _cuts(graph, set(wanted))
        while wanted:
            taken, cut = self._segment(wanted, cuts, len(cotangents))
            wanted = wanted[len(taken) :]
            asked = taken if cut is None or cut in taken else [*taken, cut]
            grads = self._backward(start, cotangents, asked, cut)
            if cut is not None and wanted:
                node = graph.nodes[cut]
                used = graph.outputs_used[node][0]
                whole = grads[cut]
                assert not isinstance(whole, EarlyJacobian)
                reached = whole[used]
                if reached is None:
                    return
                start, cotangents = GradientEdge(node, used), reached
            yield {number: grads[number] for number in taken}

    def _segment(self, wanted: Sequence[int], cuts: Sequence[int], outputs: int) -> tuple[list[int], int | None]:
        """The next wanted nodes up to the first cut with enough gradients held, and the smallest such cut."""
        held, taken = 0.0, []
        for i, number in enumerate(wanted):
            taken.append(number)
            held += outputs * self._kept_bytes(number)
            after = wanted[i + 1] if i + 1 < len(wanted) else None
            if after is None:
                break
            between = [cut for cut in cuts if number <= cut < after]
            if held >= SEGMENT_BYTES and between:
                return taken, min(reversed(between), key=lambda cut: node_bytes(self.graph, self.graph.nodes[cut]))
        return taken, None

    def _backward(
        self, start: Start, cotangents: PerOutput, numbers: Sequence[int], cut: int | None
    ) -> dict[int, Gradients | EarlyJacobian]:
        """The gradients at the numbered nodes: in batched passes where they are small, else in one pass per output."""
        nodes = self.graph.nodes
        pairs = [(number, used) for number in numbers for used in self.graph.outputs_used[nodes[number]]]
        wanted = [GradientEdge(nodes[number], used) for number, used in pairs]
        largest = self._scale * max(node_bytes(self.graph, nodes[number]) for number in numbers)
        grads = None
        if self.points.batched and largest <= _BATCHED_BYTES.get(cotangents.device.type, 0):
            most = max(1, int(_PASS_BYTES.get(cotangents.device.type, 0) / max(largest, 1)))
            grads = at_once(start, wanted, cotangents, most)
        written: dict[int, EarlyJacobian] = {}
        if grads is None:
            small = [i for i in numbers if i != cut and self._early_bytes(i) is not None]
            written = {i: EarlyJacobian(nodes[i], self.points.edges[i], self.n) for i in small}

            def keep(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
                for number, by_output in self._by_node(pairs, grads).items():
                    if number in written:
                        written[number].add(by_output)
                return tuple(None if number in written else g for (number, _), g in zip(pairs, grads, strict=True))

            grads = sequential_passes(start, wanted, cotangents, keep)
        return {**self._by_node(pairs, grads), **written}

    def _by_node(self, pairs: Sequence[tuple[int, int]], grads: Sequence[G | None]) -> dict[int, tuple[G | None, ...]]:
        """Gradients by (node, output) → one tuple per node over all of its outputs, None where there is no gradient."""
        given = dict(zip(pairs, grads, strict=True))
        sizes = {number: len(self.graph.nodes[number]._input_metadata) for number, _ in pairs}
        return {number: tuple(given.get((number, used)) for used in range(size)) for number, size in sizes.items()}

    def _early_bytes(self, number: int) -> int | None:
        """Bytes per output if the node's Jacobians are written out pass by pass, else None."""
        inputs = [k for k, _ in self.points.edges.get(number, ())]
        return early_bytes(self.graph, self.graph.nodes[number], inputs, self.n, self._scale) if inputs else None

    def _kept_bytes(self, number: int) -> float:
        """Bytes per output that the passes keep for a node."""
        written = self._early_bytes(number)
        return self._scale * (node_bytes(self.graph, self.graph.nodes[number]) if written is None else written)


def cotangents(f: Tensor, summed: bool) -> PerOutput:
    """The C one-hot cotangents, each [n, C] and shared by all examples; a single cotangent of ones if `summed`."""
    if summed:
        return PerOutput(torch.ones_like(f.detach())[None])
    return PerOutput(torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, *f.shape))


def _cuts(graph: Graph, wanted: set[int]) -> list[int]:
    """Numbers of the nodes that every path from the output to a later wanted node passes through."""
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    needed = [False] * len(graph.nodes)
    furthest: list[int] = [0] * len(graph.nodes)
    for i in reversed(range(len(graph.nodes))):
        below = [numbers[child] for child, _ in graph.nodes[i].next_functions if child is not None]
        below = [j for j in below if needed[j]]
        needed[i] = i in wanted or bool(below)
        furthest[i] = max(below, default=i)
    cuts, reach = [], 0
    for i, node in enumerate(graph.nodes):
        if needed[i] and reach <= i and len(graph.outputs_used[node]) == 1:
            cuts.append(i)
        if needed[i]:
            reach = max(reach, furthest[i])
    return cuts


class _Collector:
    """Collects factors until all uses of a parameter have arrived."""

    def __init__(self, graph: Graph, points: CapturePoints, n: int) -> None:
        self.graph, self.points, self.n = graph, points, n
        self.names = {leaf: name for name, leaf in graph.leaves.items()}
        self.parts: dict[str, list[Factor]] = {}
        self.rules: dict[str, list[str]] = {}
        self.arrived: dict[tuple[Node, int], Tensor] = {}
        self.edges = {i: [(k, layout, self._owners(i, k)) for k, layout in each] for i, each in points.edges.items()}
        self.left = Counter(name for each in self.edges.values() for _, _, names in each for name in names)
        self.pulled: set[str] = set()  # parameters that are complete only after all shared nodes

    def _owners(self, number: int, k: int) -> tuple[str, ...]:
        """The parameters that an edge leads to."""
        child = self.graph.nodes[number].next_functions[k][0]
        assert child is not None
        leaf = leaf_below(child)
        if leaf is not None:
            return (self.names[leaf],)
        return tuple(name for leaf, name in self.names.items() if reaches(child, leaf))

    def take(self, number: int, grads: Gradients | EarlyJacobian) -> None:
        """Adds the factors of a boundary node's edges, from output gradients or from Jacobians written out early."""
        node: Any = self.graph.nodes[number]
        for k, layout, names in self.edges[number]:
            for name in names:
                self.left[name] -= 1
            got = grads.factor(k) if isinstance(grads, EarlyJacobian) else factor_of(node, k, grads, layout, self.n)
            if got is None:
                continue
            found, how = got
            child, used = node.next_functions[k]
            carried = carry(child, found) if leaf_below(child) is not None else None
            if carried is None:
                how += ", pulled back"
                self._arrive(child, used, densify(found).j.stacked())
                self.pulled.update(names)
            else:
                self.parts.setdefault(names[0], []).append(carried)
            for name in names:
                self.rules.setdefault(name, []).append(how)

    def _arrive(self, child: Any, used: int, j: Tensor) -> None:
        meta = child._input_metadata[used]
        j = j.reshape(*j.shape[:2], *meta.shape).to(meta.dtype)
        self.arrived[child, used] = self.arrived[child, used] + j if (child, used) in self.arrived else j

    def complete(self) -> Iterator[Found]:
        """Parameters with no use left, none of which needed pulling back."""
        for name in [name for name in self.parts if not self.left[name] and name not in self.pulled]:
            yield self._found(name)

    def rest(self) -> Iterator[Found]:
        """All other parameters, after the last segment."""
        for name, dense in pull_back(self.graph, sorted(self.points.shared), self.arrived, self.names).items():
            self.parts.setdefault(name, []).append(dense)
        for name in list(self.parts):
            yield self._found(name)

    def _found(self, name: str) -> Found:
        return Found(name, add(self.parts.pop(name)), " + ".join(dict.fromkeys(self.rules[name])))
