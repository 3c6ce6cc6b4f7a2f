"""The computation of one kernel by factors: captures of blocks of probes, contracted pair by pair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Precision, Reduction, reduce, work_dtype
from ntkwatch.engines.blocks import assemble
from ntkwatch.engines.capture import GROUP_BYTES, SEGMENT_BYTES, Capture, Found
from ntkwatch.engines.capture_points import CapturePoints
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.one_by_one import OneByOne
from ntkwatch.model import Network, batch_size, inputs_of

WHOLE = ""  # the name of the kernel of all parameters


@dataclass
class Run:
    """One kernel: network, state and reduction for all blocks; `layers` is the reduction of kernels per parameter."""

    network: Network
    state: Mapping[str, Tensor] | None
    reduction: Reduction
    precision: Precision
    points: CapturePoints | None
    layers: Reduction | None = "trace"
    outputs: dict[int, Tensor] = field(default_factory=dict)
    in_blocks: bool = False
    scale: float = 1.0  # choose block and buffer sizes for this many times the examples (`extrapolation`)

    def kernels(self, blocks1: list[Any], blocks2: list[Any] | None) -> dict[str, Tensor]:
        """{WHOLE: kernel in `reduction`, parameter: kernel in `layers`} over all blocks; `blocks2` None: `blocks1`."""
        self.outputs.clear()
        self.in_blocks = len(blocks1) > 1  # memory is short
        sizes1 = [batch_size(inputs_of(b)) for b in blocks1]
        sizes2 = None if blocks2 is None else [batch_size(inputs_of(b)) for b in blocks2]
        others = blocks1 if blocks2 is None else blocks2
        row: dict[int, Capture | OneByOne] = {}  # the capture that a row of cells shares

        def cell(i: int, j: int) -> dict[str, Tensor]:
            if i not in row:
                row.clear()
                row[i] = self.capture(blocks1[i])
                self.outputs[i] = row[i].outputs
            return self._contract(row[i], row[i] if others is blocks1 and i == j else self.capture(others[j]))

        return assemble(sizes1, sizes2, cell, lambda name: self.reduction if name == WHOLE else str(self.layers))

    def rough(self, n: int) -> float:
        """A rough estimate of the bytes for n probes in one block: the graph, gradients and their copies, kernels."""
        if self.points is None:
            return math.inf
        outputs, entries = self.points.outputs, {"full": self.points.outputs**2, "blocks": self.points.outputs}
        kept = 0 if self.layers is None else len(self.network.parameters) * entries.get(self.layers, 1)
        kernels = 16 * n * n * (kept + 5 * entries.get(self.reduction, 1))
        gradients = n * outputs * self.points.captured
        if (
            self.reduction != "full" and not self.points.alone
        ):  # computed by groups of outputs and segments of the graph
            gradients = min(gradients, SEGMENT_BYTES + GROUP_BYTES + n * self.points.captured)
        return n * 2 * self.points.saved + 4 * gradients + kernels

    def capture(self, block: Any) -> Capture | OneByOne:
        """A forward pass of a block, or its replacement with one pass per example."""
        if self.points is not None and self.points.alone:
            return OneByOne(self.network, block, self.state, self.reduction == "sum", self.points, self.scale)
        summed = self.reduction == "sum"
        return Capture(self.network, block, self.state, summed=summed, points=self.points, scale=self.scale)

    def _contract(self, one: Capture | OneByOne, two: Capture | OneByOne) -> dict[str, Tensor]:
        """One block of each kernel; zero where the outputs do not depend on the parameter."""
        (n, c), m, device = one.outputs.shape, len(two.outputs), one.outputs.device
        reduction = self.reduction if c > 1 else "trace"  # for one output, all reductions are equal
        contract = self.contractor(reduction, work_dtype(one.outputs.dtype, self.precision), one is two)
        whole = contract.zeros(c, n, m, device)
        kept: dict[str, Tensor] = {}
        for outputs in [slice(None)] if reduction == "full" else one.groups():
            for a, b in _pairs(one, two, outputs):
                self.note(a, n, m, contract)
                out = whole if self.layers is None else contract.zeros(c, n, m, device)
                contract.add(out[outputs] if reduction == "blocks" else out, a.factor, b.factor)
                if self.layers is not None:
                    whole += out
                    own = self._shaped(contract.finish(out, c), c)
                    if self.layers != self.reduction:  # a copy: a view would hold the richer one
                        own = reduce(own, self.reduction, self.layers).contiguous()
                    kept[a.name] = kept[a.name] + own if a.name in kept else own
        whole = self._shaped(contract.finish(whole, c), c)
        if self.layers is not None:
            unused = torch.zeros_like(reduce(whole, self.reduction, self.layers))
            kept = {name: kept.get(name, unused) for name in self.network.parameters}
        return {WHOLE: whole, **kept}

    def _shaped(self, k: Tensor, c: int) -> Tensor:
        """The kernel in the shape of the run's reduction, also if it was computed as the trace of a single output."""
        n, m = (k.shape[0], k.shape[2]) if k.ndim == 4 else k.shape[-2:]
        return k.reshape({"full": (n, c, m, c), "blocks": (c, n, m)}.get(self.reduction, (n, m)))

    def contractor(self, reduction: Reduction, dtype: torch.dtype, same: bool) -> Contractor:
        """The contractor for a pair of blocks; a hook for subclasses."""
        return Contractor(reduction, dtype, same, self.in_blocks)

    def note(self, found: Found, n: int, m: int, contract: Contractor) -> None:
        """A hook for subclasses, called before every contraction."""


def _pairs(one: Capture | OneByOne, two: Capture | OneByOne, outputs: slice) -> Iterator[tuple[Found, Found]]:
    """The factors of two captures, paired by parameter; only one pair in memory if both have the same order."""
    if one is two:
        for found in one.factors(outputs):
            yield found, found
        return
    waiting: tuple[dict[str, Found], dict[str, Found]] = ({}, {})
    streams = (one.factors(outputs), two.factors(outputs))
    live = [True, True]
    while any(live):
        for side in (0, 1):
            new = next(streams[side], None)
            if new is None:
                live[side] = False
                continue
            other = waiting[1 - side].pop(new.name, None)
            if other is None:
                waiting[side][new.name] = new
            else:
                yield (new, other) if side == 0 else (other, new)
