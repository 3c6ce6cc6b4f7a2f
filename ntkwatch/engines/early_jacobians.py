"""Jacobians written out after each backward pass, for nodes whose gradients need much more memory than their Jacobians.

Early convolutions have few weights and many positions. The gradients of all outputs at their positions would need more
memory than everything else, and allocating fresh pages costs as much time as the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.factor_sums import densify
from ntkwatch.engines.factors import Columns, Dense, Factor, Outer
from ntkwatch.engines.graph import Graph, node_bytes
from ntkwatch.engines.layouts import Layout, Scattered
from ntkwatch.engines.per_output import PerOutput
from ntkwatch.engines.rules import Use, factor, operand_shape, unfolding

_LARGE = 1 << 22  # write out early only from this many bytes of gradients per output …
_MUCH = 8  # … if the gradients are at least this many times as large as the Jacobians …
_WIDE = 4  # … and if a convolution's unfolded inputs are at most this many times as large as its output

Gradients = tuple[PerOutput | None, ...]  # one entry per output of a node


def factor_of(node: Any, k: int, grads: Gradients, layout: Layout | Scattered, n: int) -> tuple[Factor, str] | None:
    """The factor of one input of a node and the name of its rule; None if no output depends on the node."""
    if all(g is None for g in grads):
        return None
    return factor(Use(node, k, operand_shape(node, k), grads, layout, n))


def early_bytes(graph: Graph, node: Any, inputs: Sequence[int], n: int, scale: float = 1.0) -> int | None:
    """Bytes of one output's Jacobians of the node's inputs if they are to be written out early, else None.

    scale: decide as for this many times the examples.
    """
    gradients = node_bytes(graph, node)
    if scale * gradients < _LARGE or any(unfolding(node, k) > _WIDE for k in inputs):
        return None
    itemsize = max(int(meta.dtype.itemsize) for meta in node._input_metadata)
    size = n * itemsize * sum(math.prod(operand_shape(node, k)) for k in inputs)
    return size if _MUCH * size <= gradients else None


@dataclass
class EarlyJacobian:
    """The Jacobians of a node's inputs, collected from the gradients of one output after another."""

    node: Any
    edges: Sequence[tuple[int, Layout | Scattered]]
    n: int
    _parts: dict[int, list[Tensor | None]] = field(default_factory=dict)
    _inputs: dict[int, Columns] = field(default_factory=dict)
    _rules: dict[int, str] = field(default_factory=dict)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds the next output, given the gradients of the node's outputs; None where there is no gradient."""
        given = tuple(None if g is None else PerOutput((g.detach(),)) for g in grads)
        for k, layout in self.edges:
            found = factor_of(self.node, k, given, layout, self.n)
            if found is not None:
                self._rules[k] = found[1]
            part = None if found is None else densify(self._sharing(k, found[0])).j[0]
            self._parts.setdefault(k, []).append(part)

    def _sharing(self, k: int, found: Factor) -> Factor:
        """The factor with inputs that are unfolded once for all outputs."""
        if not isinstance(found, Outer):
            return found
        if k not in self._inputs:
            self._inputs[k] = Columns.of(found.a.make())
        return replace(found, a=self._inputs[k])

    def factor(self, k: int) -> tuple[Factor, str] | None:
        """The Jacobian of input `k` for all outputs and the name of its rule; None if no output depends on the node."""
        self._inputs.clear()
        parts = self._parts.pop(k)
        known = next((part for part in parts if part is not None), None)
        if known is None:
            return None
        filled = tuple(torch.zeros_like(known) if part is None else part for part in parts)
        return Dense(PerOutput(filled)), self._rules[k]
