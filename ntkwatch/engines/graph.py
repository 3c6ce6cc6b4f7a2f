"""The autograd graph of one forward pass: its nodes and their consumers.

The graph covers every use of a parameter, where module hooks would miss some: each use is an edge into the parameter's
AccumulateGrad node, whether it is tied, reused, accessed directly, reparametrised or passed to a fused function.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ntkwatch.model import UnsupportedModel

# Nodes whose order or number of rows per example may depend on the data.
_ROUTING = ("Index", "Gather", "Scatter", "Masked", "Sort", "Topk", "Take", "Nonzero", "Where", "Put", "Unique")


# Nodes that only rearrange entries. The search crosses them, so it reaches the node that multiplies a weight.
_REARRANGE = (
    "TBackward0",
    "TransposeBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "AliasBackward0",
    "PermuteBackward0",
)


# The name of a reshape depends on strides, and on whether tensors have memory.
_SAME = dict.fromkeys(("UnsafeViewBackward0", "ReshapeAliasBackward0"), "ViewBackward0")


@dataclass(frozen=True)
class Graph:
    """The nodes from the output down, consumers first, in an order that depends on the structure alone."""

    root: Node
    nodes: tuple[Node, ...]
    consumers: dict[Node, list[tuple[Node, int]]]
    outputs_used: dict[Node, list[int]]
    leaves: dict[str, Node]

    @cached_property
    def signature(self) -> tuple[str, ...]:
        """The names of the nodes, equal for two runs of the same code."""
        return tuple(_SAME.get(name := node.name(), name) for node in self.nodes)

    @cached_property
    def routing(self) -> tuple[Node, ...]:
        """The nodes that may regroup rows depending on the data."""
        pairs = zip(self.nodes, self.signature, strict=True)
        return tuple(node for node, name in pairs if name.startswith(_ROUTING) or "_index" in name.lower())


def walk(outputs: Tensor, parameters: Mapping[str, Tensor]) -> Graph:
    """The graph above `outputs` [n, C]; `leaves` holds the AccumulateGrad nodes of the used parameters.

    Raises:
        NestedTensors: some node computes on nested tensors.
    """
    root = outputs.grad_fn
    assert root is not None
    order = _post_order(root)[::-1]
    consumers: dict[Node, list[tuple[Node, int]]] = {node: [] for node in order}
    used: dict[Node, set[int]] = {node: set() for node in order}
    used[root].add(outputs.output_nr)
    for node in order:
        _check_dense(node)
        for k, (child, number) in enumerate(node.next_functions):
            if child is not None:
                consumers[child].append((node, k))
                used[child].add(number)
    names = {id(p): name for name, p in parameters.items()}
    leaves = {names[id(v)]: node for node in order if (v := variable_of(node)) is not None and id(v) in names}
    return Graph(root, tuple(order), consumers, {node: sorted(s) for node, s in used.items()}, leaves)


class NestedTensors(UnsupportedModel):
    """A node computes on nested tensors, whose gradients have no shape and cannot be separated by example."""


def _check_dense(node: Any) -> None:
    try:
        [m.shape for m in node._input_metadata]
    except RuntimeError:
        raise NestedTensors(f"the model computes on nested tensors (at {node.name()}): pad them and mask") from None


def _post_order(root: Node) -> list[Node]:
    """Depth-first order without recursion: deep graphs exceed Python's stack."""
    done: set[Node] = set()
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in reversed(node.next_functions) if child is not None)
    return order


def edges(graph: Graph, nodes: Sequence[Node]) -> list[GradientEdge]:
    """One gradient edge per used output of each node."""
    return [GradientEdge(node, number) for node in nodes for number in graph.outputs_used[node]]


def types_inside(outputs: Tensor) -> frozenset[torch.dtype]:
    """The floating-point and complex types of all intermediate results of a forward pass."""
    nodes = [] if outputs.grad_fn is None else _post_order(outputs.grad_fn)
    met = {meta.dtype for node in nodes for meta in node._input_metadata}
    return frozenset(dtype for dtype in met if dtype.is_floating_point or dtype.is_complex)


def bytes_inside(outputs: Tensor) -> int:
    """The bytes of all intermediate results of a forward pass, except nested tensors."""
    nodes = [] if outputs.grad_fn is None else _post_order(outputs.grad_fn)
    total = 0
    for node in nodes:
        with contextlib.suppress(RuntimeError):
            total += sum(m.dtype.itemsize * math.prod(int(size) for size in m.shape) for m in node._input_metadata)
    return total


def pull(node: Node, grads: Sequence[Tensor | None], k: int, shape: tuple[int, ...]) -> Tensor:
    """The gradient [*shape] of input `k` of one node, by the node's own backward formula alone."""
    apply: Any = node if callable(node) else node.apply  # type: ignore[attr-defined]
    result = apply(*(_filled(node, grads) if is_function(node) else grads))
    result = result[_argument(node, k)] if isinstance(result, tuple) else result
    if result is None:
        return next(g for g in grads if g is not None).new_zeros(shape)
    if result.is_sparse:
        result = result.to_dense()
    extra = result.ndim - len(shape)  # autograd sums over broadcast dimensions; a node called directly does not
    if extra > 0:
        result = result.sum(list(range(extra)))
    summed = [d for d, size in enumerate(shape) if size == 1 and result.shape[d] != 1]
    return (result.sum(summed, keepdim=True) if summed else result).reshape(shape)


def variable_of(node: Any) -> Tensor | None:
    """The tensor for which a node accumulates gradients, else None; a Function may have an attribute of that name."""
    return None if is_function(node) else getattr(node, "variable", None)


def is_function(node: Any) -> bool:
    """Whether a node belongs to an `autograd.Function`, whose backward pass is Python code of the model."""
    return isinstance(node, torch._C._FunctionBase)


def _argument(node: Any, k: int) -> int:
    """The result index of input `k`: a Function returns one result per argument, while edges exist only for tensors."""
    if not is_function(node):
        return k
    needed = [i for i, needs in enumerate(node.needs_input_grad) if needs]
    return needed[sum(child is not None for child, _ in node.next_functions[:k])]


def _filled(node: Any, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """A Function's output gradients with zeros for missing ones, as autograd passes them."""
    known = next(g for g in grads if g is not None)
    metas = node._input_metadata
    return [
        known.new_zeros(tuple(m.shape), dtype=m.dtype) if g is None else g for g, m in zip(grads, metas, strict=True)
    ]


def rearranges(node: Node) -> bool:
    """Whether a node only rearranges entries."""
    return node.name() in _REARRANGE


def reaches(node: Node, leaf: Node) -> bool:
    """Whether a path leads from a node down to a leaf."""
    seen, stack = {node}, [node]
    while stack:
        here = stack.pop()
        if here is leaf:
            return True
        new = [child for child, _ in here.next_functions if child is not None and child not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def node_bytes(graph: Graph, node: Any) -> int:
    """The bytes of a node's outputs, and so of their gradients."""
    given = [node._input_metadata[used] for used in graph.outputs_used[node]]
    return sum(int(m.dtype.itemsize) * math.prod(int(size) for size in m.shape) for m in given)
