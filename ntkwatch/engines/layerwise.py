"""The engine for real models: per-example factors of every parameter, contracted without forming the Jacobian."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Kernel, Precision, Reduction, noise_floor, reduce, richest, work_dtype
from ntkwatch.engines.blocks import assemble, blocks
from ntkwatch.engines.capture import Capture, Found
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.functional import is_out_of_memory, quiet
from ntkwatch.engines.memory import limit_bytes
from ntkwatch.engines.separation import Separation, separate_few
from ntkwatch.model import Network, batch_size, inputs_of

WHOLE = ""
_RETRIES = 3  # halvings of the block after running out of memory


class Layerwise:
    """Exact: one forward and C backward passes to the activations, then the cheapest contraction per parameter."""

    name = "layerwise"

    def __init__(self) -> None:
        self._recipes: weakref.WeakKeyDictionary[Network, Separation | None] = weakref.WeakKeyDictionary()
        self._chunks: weakref.WeakKeyDictionary[Network, int] = weakref.WeakKeyDictionary()

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
    ) -> Kernel:
        """See `Engine.kernel`. Without `chunk_size`, blocks fit in a share of the free memory.

        Raises:
            UnsupportedModel: examples are coupled, naming where.
        """
        rich = richest(reduction, layers)
        with quiet():
            run = Run(network, state, rich, precision, self.recipe(network, x1, state), layers is not None)
            theta = self._backing_off(run, x1, x2, chunk_size)
        total = theta[WHOLE] if layers is None else torch.stack(list(theta.values())).sum(0)
        kept = {} if layers is None else {name: reduce(t, rich, layers) for name, t in theta.items()}
        outputs = torch.cat([run.outputs[i] for i in sorted(run.outputs)])
        floor = noise_floor(outputs.dtype, precision, max(p.numel() for p in network.parameters.values()))
        return Kernel(reduce(total, rich, reduction), kept, outputs, reduction, self.name, precision, floor)

    def recipe(self, network: Network, x: Any, state: Mapping[str, Tensor] | None) -> Separation | None:
        """Where this network's examples come apart, read once from a few probes."""
        if network not in self._recipes:
            self._recipes[network] = separate_few(network, x, state)
        return self._recipes[network]

    def chunk(self, network: Network, n: int, run: Run) -> int:
        """Probes per block: all, or as many as fit in the limit, or what was learned by running out of memory."""
        return min(n, self._chunks.get(network, n), run.fitting(n, limit_bytes(network.device)))

    def _backing_off(self, run: Run, x1: Any, x2: Any, chunk_size: int | None) -> dict[str, Tensor]:
        n = max(batch_size(inputs_of(x)) for x in (x1, x2) if x is not None)
        chunk = chunk_size or self.chunk(run.network, n, run)
        for _ in range(_RETRIES):
            theta = _attempt(run, x1, x2, chunk)
            if theta is not None:
                return theta
            if chunk == 1:
                break
            chunk = max(1, min(chunk, n) // 2)
            self._chunks[run.network] = chunk
        return run.kernels(blocks(x1, chunk), None if x2 is None else blocks(x2, chunk))


def _attempt(run: Run, x1: Any, x2: Any, chunk: int) -> dict[str, Tensor] | None:
    """None when memory ran out: the caller retries outside of the handler, when the frames are gone."""
    try:
        return run.kernels(blocks(x1, chunk), None if x2 is None else blocks(x2, chunk))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


@dataclass
class Run:
    """One kernel: the same network, state and reduction over all blocks.

    With `apart` there is a kernel for every parameter, else one for all of them, named WHOLE.
    """

    network: Network
    state: Mapping[str, Tensor] | None
    reduction: Reduction
    precision: Precision
    recipe: Separation | None
    apart: bool = True
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def kernels(self, blocks1: list[Any], blocks2: list[Any] | None) -> dict[str, Tensor]:
        """{parameter: kernel} over all blocks."""
        self.outputs.clear()
        sizes1 = [batch_size(inputs_of(b)) for b in blocks1]
        sizes2 = None if blocks2 is None else [batch_size(inputs_of(b)) for b in blocks2]
        others = blocks1 if blocks2 is None else blocks2
        row: dict[int, Capture] = {}  # the block that a row of cells shares

        def cell(i: int, j: int) -> dict[str, Tensor]:
            if i not in row:
                row.clear()
                row[i] = self._capture(blocks1[i])
                self.outputs[i] = row[i].outputs
            return self._contract(row[i], row[i] if blocks2 is None and i == j else self._capture(others[j]))

        return assemble(sizes1, sizes2, cell, self.reduction)

    def fitting(self, n: int, limit: int) -> int:
        """The most probes per block whose graph, and as much in passing, fits; two such where there are several."""
        saved = 0.0 if self.recipe is None else 2 * self.recipe.saved + self.recipe.captured
        if saved * n <= limit:
            return n
        return max(1, int(limit / (2 * saved)))

    def _capture(self, block: Any) -> Capture:
        return Capture(self.network, block, self.state, summed=self.reduction == "sum", recipe=self.recipe)

    def _contract(self, one: Capture, two: Capture) -> dict[str, Tensor]:
        """One block of each parameter's kernel; zero where the outputs do not depend on the parameter."""
        (n, c), m = one.outputs.shape, len(two.outputs)
        reduction = self.reduction if c > 1 else "trace"  # of one output they are all the same
        contract = self.contractor(reduction, work_dtype(one.outputs.dtype, self.precision), one is two)
        names = self.network.parameters if self.apart else (WHOLE,)
        found = {name: contract.zeros(c, n, m, one.outputs.device) for name in names}
        for outputs in [slice(None)] if reduction == "full" else self.groups(one):
            for a, b in _pairs(one, two, outputs):
                self.note(a, n, m, contract)
                out = found[a.name if self.apart else WHOLE]
                contract.add(out[outputs] if reduction == "blocks" else out, a.factor, b.factor)
        shape = {"full": (n, c, m, c), "blocks": (c, n, m)}.get(self.reduction, (n, m))
        return {name: contract.finish(k, c).reshape(shape) for name, k in found.items()}

    def contractor(self, reduction: Reduction, dtype: torch.dtype, same: bool) -> Contractor:
        """What contracts the factors of a pair of blocks."""
        return Contractor(reduction, dtype, same)

    def groups(self, one: Capture) -> list[slice]:
        """Outputs that are taken together."""
        return one.groups()

    def note(self, found: Found, n: int, m: int, contract: Contractor) -> None:
        """Called before every contraction."""


def _pairs(one: Capture, two: Capture, outputs: slice) -> Iterator[tuple[Found, Found]]:
    """The factors of two captures, parameter by parameter; one at a time where both give them in one order."""
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
