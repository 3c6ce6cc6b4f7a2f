"""From a capture point down to the parameter: rearrangements cost nothing, other nodes pull the gradient back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ntkwatch.engines.factors import Dense, Factor, Outer
from ntkwatch.engines.graph import Graph, pull, rearranges, variable_of
from ntkwatch.engines.memory import is_out_of_memory
from ntkwatch.engines.per_output import PerOutput
from ntkwatch.engines.rules import operand_shape


def leaf_below(node: Node) -> Node | None:
    """The leaf below a chain of rearrangements; None if the chain contains any other operation."""
    while variable_of(node) is None:
        if not rearranges(node) or node.name() == "PermuteBackward0":
            return None
        child = node.next_functions[0][0]
        assert child is not None
        node = child
    return node


def carry(node: Node, found: Factor) -> Factor | None:
    """The factor in the leaf's own order of entries; None if its gradient must be pulled back."""
    reshaped = False
    while variable_of(node) is None:
        if node.name() in ("TBackward0", "TransposeBackward0"):
            if reshaped or not isinstance(found, Outer) or not _last_two(node) or not _matrices(node, found):
                return None
            found = Outer(found.a, found.g, not found.a_first)
        elif tuple(node._input_metadata[0].shape) != operand_shape(node, 0):
            reshaped = True
        child = node.next_functions[0][0]
        assert child is not None
        node = child
    return _real(found) if isinstance(found, Dense) else found


def _real(found: Dense) -> Dense:
    """The Jacobian of a complex parameter as that of its real and imaginary parts."""
    if not found.dtype.is_complex:
        return found
    return Dense(found.j.over(lambda j: torch.view_as_real(j.resolve_conj()).flatten(-2)))


def _matrices(node: Any, found: Outer) -> bool:
    """Whether the factor's groups, rows and columns are the tensor's dimensions; a convolution kernel has more."""
    *lead, rows, columns = (int(size) for size in node._input_metadata[0].shape)
    p, q = found.p, found.q
    return math.prod(lead) == found.groups and (rows, columns) == ((p, q) if found.a_first else (q, p))


def _last_two(node: Any) -> bool:
    """Whether a transposition exchanges the last two dimensions."""
    rank = len(node._input_metadata[0].shape)
    if node.name() == "TBackward0":
        return rank == 2
    dims = {(d if d < 2**62 else d - 2**64) % rank for d in (node._saved_dim0, node._saved_dim1)}
    return rank >= 2 and dims == {rank - 1, rank - 2}


def pull_back(
    graph: Graph, shared: Sequence[int], arrived: dict[tuple[Node, int], Tensor], names: Mapping[Node, str]
) -> dict[str, Dense]:
    """Per-example gradients [C, n, *shape] of shared tensors → Jacobians of the parameters below them, by name.

    Args:
        shared: numbers of the nodes that depend on parameters alone.
        arrived: gradients by (node, output number); the function consumes them.
    """
    inside = {graph.nodes[number] for number in shared}
    result: dict[str, Dense] = {}
    for number in sorted(shared):
        node: Any = graph.nodes[number]
        if node in names:
            g = arrived.pop((node, 0), None)
            if g is not None:
                result[names[node]] = _real(Dense(PerOutput(g.flatten(2) if g.ndim > 2 else g[..., None])))
            continue
        ready = [arrived.pop((node, i), None) for i in range(len(node._input_metadata))]
        if all(g is None for g in ready):
            continue
        for k, (child, used) in enumerate(node.next_functions):
            if child in inside:
                pulled = _pull_each(node, ready, k, operand_shape(node, k))
                arrived[child, used] = arrived[child, used] + pulled if (child, used) in arrived else pulled
    return result


def _pull_each(node: Node, grads: Sequence[Tensor | None], k: int, shape: tuple[int, ...]) -> Tensor:
    """The gradient of input `k` for each of the [C, n] output gradients."""
    given = [g for g in grads if g is not None]
    lead = given[0].shape[:2]
    flat = [g.flatten(0, 1) for g in given]

    def one(*each: Tensor) -> Tensor:
        values = iter(each)
        return pull(node, [None if g is None else next(values) for g in grads], k, shape)

    with torch.no_grad():
        try:
            stacked = torch.func.vmap(one)(*flat)
        except Exception as error:  # operations and Functions that cannot be batched raise errors of any type
            if is_out_of_memory(error):
                raise
            stacked = torch.stack([one(*(g[i] for g in flat)) for i in range(len(flat[0]))])
    return stacked.unflatten(0, lead)
