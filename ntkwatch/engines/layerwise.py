"""The engine for real models: per-example factors of every parameter, contracted without forming the Jacobian."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Kernel, Precision, Reduction, at_hand, noise_floor, reduce, richest
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.coupling import Sizes, check_uncoupled
from ntkwatch.engines.functional import quiet
from ntkwatch.engines.memory import backing_off, limit_bytes
from ntkwatch.engines.one_by_one import one_by_one
from ntkwatch.engines.prediction import Prediction, predict, try_forward
from ntkwatch.engines.returned import only_returned
from ntkwatch.engines.run import WHOLE, Run
from ntkwatch.engines.separation import Separation, separate_few
from ntkwatch.engines.signs import SignRun
from ntkwatch.model import Network, batch_size, inputs_of

_REHEARSED = 32 << 20  # allowed for a kernel: with less, a rehearsal itself would take too much
ROUGHLY = 3  # times what a run roughly takes, no kernel goes beyond


@dataclass(frozen=True)
class Reading:
    """What an engine has learned of one network, without a reference to it.

    Attributes:
        separation: where examples come apart; None where the outputs depend on no trained parameter.
        sizes: of batches in which examples were found not to be coupled.
        chunks: probes per block that went through, by number of probes and reductions.
        alone: examples are passed through one by one.
    """

    separation: Separation | None
    sizes: frozenset[int]
    chunks: Mapping[Any, int]
    alone: bool


class Layerwise:
    """Exact: one forward and C backward passes to the activations, then the cheapest contraction per parameter.

    uncoupled: whoever asks has passed the probes of the first kernel to `check_uncoupled`.
    alone: factors from plain backward passes of one example and one output each, for models of which nothing else is
    right.
    """

    name = "layerwise"

    def __init__(self, uncoupled: bool = False, alone: bool = False) -> None:
        self._uncoupled, self.alone, self._sizes = uncoupled, alone, Sizes()
        self._recipes: weakref.WeakKeyDictionary[Network, Separation | None] = weakref.WeakKeyDictionary()
        self._chunks: weakref.WeakKeyDictionary[Network, dict[Any, int]] = weakref.WeakKeyDictionary()

    def reading(self, network: Network) -> Reading:
        """What was learned of a network, for `restored`."""
        chunks = dict(self._chunks.get(network, {}))
        return Reading(self._recipes.get(network), self._sizes.known(network), chunks, self.alone)

    @classmethod
    def restored(cls, network: Network, reading: Reading) -> Layerwise:
        """An engine that has learned of a network what another had of a Network of the same module."""
        engine = cls(uncoupled=True, alone=reading.alone)
        engine._recipes[network], engine._chunks[network] = reading.separation, dict(reading.chunks)
        engine._sizes.restore(network, reading.sizes)
        return engine

    def graphs(self, network: Network) -> frozenset[tuple[str, ...]]:
        """Signatures of the graphs in which the network's examples were told apart."""
        recipe = self._recipes.get(network)
        return frozenset() if recipe is None else frozenset(r.signature for r in (recipe, *recipe.read.values()))

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
            UnsupportedModel: examples are coupled, naming where.
            MemoryError: one probe at a time is too much.
        """
        rich, precision = richest(reduction, layers), at_hand(precision, network.device)
        with quiet(), only_returned(network):
            recipe = self.recipe(network, x1, state)
            run = (SignRun if signed else Run)(network, state, rich, precision, recipe, layers)
            theta = self._backing_off(run, x1, x2, chunk_size)
        total = theta.pop(WHOLE)
        outputs = torch.cat([run.outputs[i] for i in sorted(run.outputs)])
        floor = noise_floor(network.rounding(outputs.dtype), precision)
        return Kernel(reduce(total, rich, reduction), theta, outputs, reduction, self.name, precision, floor)

    def recipe(self, network: Network, x: Any, state: Mapping[str, Tensor] | None) -> Separation | None:
        """Where this network's examples come apart, read once from a few probes.

        Raises:
            UnsupportedModel: an example's output depends on the other examples, or is random in evaluation mode.
        """
        if network not in self._recipes:
            if not self._uncoupled:
                check_uncoupled(network, x, state)
            self._sizes.add(network, x)
            self._recipes[network] = self._separation(network, x, state)
        return self._recipes[network]

    def _separation(self, network: Network, x: Any, state: Mapping[str, Tensor] | None) -> Separation | None:
        if self.alone:
            return one_by_one(network, x, state)
        inner = None if network.mixes is None else self.recipe(network.mixes, x, state)
        return separate_few(network, x, state, inner)

    def chunk(self, run: Run, x1: Any, x2: Any = None) -> tuple[int, Prediction | None]:
        """Probes per block: all, or as many as are predicted to fit in the limit, or as memory turned out to hold.

        With the prediction, where one was made for it now.
        """
        n = max(batch_size(inputs_of(x)) for x in (x1, x2) if x is not None)
        known = self._chunks.setdefault(run.network, {})
        limit, key = limit_bytes(run.network.device), (n, run.reduction, run.layers)
        if key not in known and ROUGHLY * run.rough(n) <= limit:
            return n, None
        found = None
        if key not in known:
            larger = x1 if batch_size(inputs_of(x1)) == n else x2
            known[key], found = _fitting(run, larger, n, limit)
        return known[key], found

    def _backing_off(self, run: Run, x1: Any, x2: Any, chunk_size: int | None) -> dict[str, Tensor]:
        """Halves the blocks as often as memory runs out, and remembers the size that went through."""
        n = max(batch_size(inputs_of(x)) for x in (x1, x2) if x is not None)
        known, key = self._chunks.setdefault(run.network, {}), (n, run.reduction, run.layers)

        def attempt(size: int) -> dict[str, Tensor]:
            parts, others = blocks(x1, size), None if x2 is None else blocks(x2, size)
            self._sizes.check(run.network, [*parts, *(others or [])], run.state)
            return run.kernels(parts, others)

        chunk = min(n, chunk_size or self.chunk(run, x1, x2)[0])
        return backing_off(attempt, chunk, run.network.device, lambda size: known.__setitem__(key, size))


def _fitting(run: Run, x: Any, n: int, limit: int) -> tuple[int, Prediction | None]:
    """Halves the blocks until a rehearsal fits; without memory for one, what a pair of blocks roughly takes."""
    chunk, found = n, None
    forward = try_forward(run, x) if limit >= _REHEARSED else None
    while True:
        found = predict(run, x, chunk, forward) if forward is not None else None
        if chunk == 1 or (found.peak if found is not None else run.rough(min(n, 2 * chunk))) <= limit:
            return chunk, found
        chunk = -(-chunk // 2)
