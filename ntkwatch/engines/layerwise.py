"""The engine for real models: per-example factors of every parameter, contracted without forming the Jacobian."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Kernel, Precision, Reduction, at_hand, noise_floor, reduce, richest
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.capture_points import CapturePoints, read_capture_points
from ntkwatch.engines.coupling import Sizes, check_uncoupled
from ntkwatch.engines.extrapolation import extrapolate, small_block
from ntkwatch.engines.functional import quiet
from ntkwatch.engines.grad_attribute import returned_gradients
from ntkwatch.engines.memory import backing_off, limit_bytes
from ntkwatch.engines.one_by_one import one_by_one
from ntkwatch.engines.run import WHOLE, Run
from ntkwatch.engines.signs import SignRun
from ntkwatch.model import Network, batch_size, inputs_of

_LEAST = 32 << 20  # the smallest memory limit under which small kernels run
ROUGHLY = 2  # a kernel needs at most ROUGHLY × its rough estimate + WORKSPACE bytes
WORKSPACE = 256 << 20


@dataclass(frozen=True)
class Reading:
    """What an engine has learned about one network, without a reference to it.

    Attributes:
        separation: the capture points; None if the outputs depend on no trained parameter.
        sizes: batch sizes at which examples were found uncoupled.
        chunks: probes per block that fit in memory, by number of probes and reductions.
        alone: one pass per example and output.
    """

    separation: CapturePoints | None
    sizes: frozenset[int]
    chunks: Mapping[Any, int]
    alone: bool


class Layerwise:
    """Exact: one forward pass and C backward passes to the activations, then the cheapest contraction per parameter.

    uncoupled: the caller has passed the probes of the first kernel to `check_uncoupled`.
    alone: compute factors by plain backward passes of one example and one output each, for models that allow nothing
    else.
    """

    name = "layerwise"

    def __init__(self, uncoupled: bool = False, alone: bool = False) -> None:
        self._uncoupled, self.alone, self._sizes = uncoupled, alone, Sizes()
        self._points: weakref.WeakKeyDictionary[Network, CapturePoints | None] = weakref.WeakKeyDictionary()
        self._chunks: weakref.WeakKeyDictionary[Network, dict[Any, int]] = weakref.WeakKeyDictionary()

    def reading(self, network: Network) -> Reading:
        """What this engine has learned about a network, for `restored`."""
        chunks = dict(self._chunks.get(network, {}))
        return Reading(self._points.get(network), self._sizes.known(network), chunks, self.alone)

    @classmethod
    def restored(cls, network: Network, reading: Reading) -> Layerwise:
        """An engine with what another engine has learned about a Network of the same module."""
        engine = cls(uncoupled=True, alone=reading.alone)
        engine._points[network], engine._chunks[network] = reading.separation, dict(reading.chunks)
        engine._sizes.restore(network, reading.sizes)
        return engine

    def graphs(self, network: Network) -> frozenset[tuple[str, ...]]:
        """Signatures of the graphs in which the network's examples were separated."""
        points = self._points.get(network)
        return frozenset() if points is None else frozenset(r.signature for r in (points, *points.read.values()))

    def kernel(
        self,
        network: Network,
        x1: Any,
        x2: Any = None,
        *,
        reduction: Reduction = "trace",
        layers: Reduction | None = "trace",
        state: Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
        precision: Precision = "double",
        signed: bool = False,
    ) -> Kernel:
        """See `Engine.kernel`. Without `chunk_size`, blocks fit in a share of the free memory.

        Raises:
            UnsupportedModel: examples are coupled; the message names the module.
            MemoryError: a single probe needs too much memory.
        """
        rich, precision = richest(reduction, layers), at_hand(precision, network.device)
        with quiet(), returned_gradients(network):
            points = self.points(network, x1, state)
            run = (SignRun if signed else Run)(network, state, rich, precision, points, layers)
            theta = self._backing_off(run, x1, x2, chunk_size)
        total = theta.pop(WHOLE)
        outputs = torch.cat([run.outputs[i] for i in sorted(run.outputs)])
        floor = noise_floor(network.rounding(outputs.dtype), precision)
        return Kernel(reduce(total, rich, reduction), theta, outputs, reduction, self.name, precision, floor)

    def points(self, network: Network, x: Any, state: Mapping[str, Tensor] | None) -> CapturePoints | None:
        """The network's capture points, read once from a few probes.

        Raises:
            UnsupportedModel: an example's output depends on the other examples, or is random in evaluation mode.
        """
        if network not in self._points:
            if not self._uncoupled:
                check_uncoupled(network, x, state)
            self._sizes.add(network, x)
            self._points[network] = self._separation(network, x, state)
        return self._points[network]

    def _separation(self, network: Network, x: Any, state: Mapping[str, Tensor] | None) -> CapturePoints | None:
        if self.alone:
            return one_by_one(network, x, state)
        inner = None if network.mixes is None else self.points(network.mixes, x, state)
        return read_capture_points(network, x, state, inner)

    def chunk(self, run: Run, x1: Any, x2: Any = None) -> int:
        """Probes per block: all, or as many as fit in the memory limit by prediction or by earlier experience."""
        n = max(batch_size(inputs_of(x)) for x in (x1, x2) if x is not None)
        known = self._chunks.setdefault(run.network, {})
        limit, key = limit_bytes(run.network.device), (n, run.reduction, run.layers)
        if key in known:
            return known[key]
        if ROUGHLY * run.rough(n) + WORKSPACE <= limit:
            return n
        known[key] = _fitting(run, x1 if batch_size(inputs_of(x1)) == n else x2, n, limit)
        return known[key]

    def _backing_off(self, run: Run, x1: Any, x2: Any, chunk_size: int | None) -> dict[str, Tensor]:
        """Halves the blocks each time memory runs out, and remembers the size that fitted."""
        n = max(batch_size(inputs_of(x)) for x in (x1, x2) if x is not None)
        known, key = self._chunks.setdefault(run.network, {}), (n, run.reduction, run.layers)

        def attempt(size: int) -> dict[str, Tensor]:
            parts, others = blocks(x1, size), None if x2 is None else blocks(x2, size)
            self._sizes.check(run.network, [*parts, *(others or [])], run.state)
            return run.kernels(parts, others)

        chunk = min(n, chunk_size or self.chunk(run, x1, x2))
        return backing_off(attempt, chunk, run.network.device, lambda size: known.__setitem__(key, size))


def _fitting(run: Run, x: Any, n: int, limit: int) -> int:
    """Halves the blocks until the peak predicted from small kernels fits in the limit."""
    chunk = n
    while chunk > 1 and _peak(run, x, chunk, limit) > limit:
        chunk = -(-chunk // 2)
    return chunk


def _peak(run: Run, x: Any, chunk: int, limit: int) -> float:
    """The peak predicted from a small kernel, or a rough estimate if few probes fail or memory is too short for one."""
    size = small_block(chunk)
    if limit >= _LEAST and run.rough(2 * size) <= limit:
        with contextlib.suppress(Exception):  # models may raise anything on few probes, including out-of-memory errors
            return extrapolate(run, x, chunk).peak
    return run.rough(min(batch_size(inputs_of(x)), 2 * chunk))
