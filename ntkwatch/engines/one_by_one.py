"""Jacobians from plain backward passes: one forward pass for each example and output.

Correct wherever autograd is, even if a graph allows one backward pass only (a Function that frees its saved tensors) or
a node's formula cannot be called separately. It needs n·C forward and backward passes, and memory for the Jacobian of a
group of outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.backward import in_row
from ntkwatch.engines.capture import Found, cotangents
from ntkwatch.engines.capture_points import CapturePoints, few, leaves_at, outputs_at
from ntkwatch.engines.factors import Dense
from ntkwatch.engines.graph import bytes_inside
from ntkwatch.engines.per_output import PerOutput
from ntkwatch.model import Network, take

RULE = "one pass for each example and output"
_GROUP_BYTES = 1 << 28  # Jacobians of a group of outputs


def one_by_one(network: Network, x: Any, state: Mapping[str, Tensor] | None = None) -> CapturePoints | None:
    """Capture points without a boundary, for one pass per example; None if outputs depend on no trained parameter."""
    f = outputs_at(network, few(x), state, leaves_at(network, state))
    if f.grad_fn is None:
        return None
    n, outputs = f.shape
    held = float(sum(p.numel() * p.element_size() for p in network.parameters.values()))
    saved = bytes_inside(f) / n
    return CapturePoints(n, (), (), frozenset(), True, saved, held, outputs, batched=False, alone=True)


class OneByOne:
    """The factors of a block, with the interface of `Capture`; each example and output gets a new graph.

    Args:
        summed: use Σ_c f_c as the only output.
        scale: choose groups for this many times the examples.
    """

    def __init__(
        self,
        network: Network,
        x: Any,
        state: Mapping[str, Tensor] | None,
        summed: bool,
        points: CapturePoints,
        scale: float = 1.0,
    ) -> None:
        self._network, self._x, self._state, self.points = network, x, state, points
        with torch.no_grad():
            self.outputs = network.outputs(x, state).detach()
        self.n, self._scale = self.outputs.shape[0], scale
        self.cotangents = cotangents(self.outputs, summed)

    def groups(self) -> list[slice]:
        """Groups of outputs whose Jacobians stay below a fixed size (256 MiB)."""
        outputs = len(self.cotangents)
        size = max(1, int(_GROUP_BYTES / max(1.0, self._scale * self.n * self.points.captured)))
        return [slice(i, min(i + size, outputs)) for i in range(0, outputs, size)]

    def factors(self, outputs: slice = slice(None)) -> Iterator[Found]:
        """The factor of every trained parameter, once each, for a group of outputs."""
        found = [self._jacobians(cotangent) for cotangent in PerOutput(self.cotangents.parts[outputs])]
        for name, each in zip(self._network.parameters, zip(*found, strict=True), strict=True):
            yield Found(name, Dense(PerOutput(each)), RULE)

    def _jacobians(self, cotangent: Tensor) -> list[Tensor]:
        """The Jacobians [n, P] of one output by parameter."""
        rows = [self._gradients(i, cotangent) for i in range(self.n)]
        return [torch.stack(each) for each in zip(*rows, strict=True)]

    def _gradients(self, i: int, cotangent: Tensor) -> list[Tensor]:
        rows = slice(i, i + 1)
        leaves = leaves_at(self._network, self._state)
        f = outputs_at(self._network, take(self._x, rows), self._state, leaves)
        if f.grad_fn is None:
            return [in_row(torch.zeros_like(leaf)) for leaf in leaves.values()]
        grads = torch.autograd.grad(f, list(leaves.values()), cotangent[rows], allow_unused=True)
        return [
            in_row(torch.zeros_like(leaf) if g is None else g) for g, leaf in zip(grads, leaves.values(), strict=True)
        ]
