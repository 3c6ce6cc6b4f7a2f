"""The engine for real models: per-example factors of every parameter, contracted without forming the Jacobian."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Kernel, Precision, Reduction, noise_floor, reduce, richest, work_dtype
from ntkwatch.engines.blocks import assemble, blocks
from ntkwatch.engines.capture import Capture, Found
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.functional import quiet
from ntkwatch.engines.separation import Separation, separate_few
from ntkwatch.model import Network, batch_size, inputs_of


class Layerwise:
    """Exact: one forward and C backward passes to the activations, then the cheapest contraction per parameter."""

    name = "layerwise"

    def __init__(self) -> None:
        self._recipes: weakref.WeakKeyDictionary[Network, Separation | None] = weakref.WeakKeyDictionary()

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
        """See `Engine.kernel`. Raises UnsupportedModel where examples are coupled, naming where."""
        rich = richest(reduction, layers)
        with quiet():
            run = _Run(network, state, rich, precision, self.recipe(network, x1, state))
            chunk = chunk_size or batch_size(inputs_of(x1))
            blocks1 = blocks(x1, chunk)
            blocks2 = None if x2 is None else blocks(x2, chunk_size or batch_size(inputs_of(x2)))
            theta = run.kernels(blocks1, blocks2)
        total = _total(theta)
        kept = {} if layers is None else {name: reduce(t, rich, layers) for name, t in theta.items()}
        outputs = torch.cat([run.outputs[i] for i in range(len(blocks1))])
        floor = noise_floor(outputs.dtype, precision, max(p.numel() for p in network.parameters.values()))
        return Kernel(reduce(total, rich, reduction), kept, outputs, reduction, self.name, precision, floor)

    def recipe(self, network: Network, x: Any, state: Mapping[str, Tensor] | None) -> Separation | None:
        """Where this network's examples come apart, read once from a few probes."""
        if network not in self._recipes:
            self._recipes[network] = separate_few(network, x, state)
        return self._recipes[network]


def _total(theta: Mapping[str, Tensor]) -> Tensor:
    parts = list(theta.values())
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class _Run:
    """One kernel: the same network, state and reduction over all blocks."""

    def __init__(
        self,
        network: Network,
        state: Mapping[str, Tensor] | None,
        reduction: Reduction,
        precision: Precision,
        recipe: Separation | None,
    ) -> None:
        self.network, self.state, self.reduction = network, state, reduction
        self.precision, self.recipe = precision, recipe
        self.outputs: dict[int, Tensor] = {}

    def kernels(self, blocks1: list[Any], blocks2: list[Any] | None) -> dict[str, Tensor]:
        """{parameter: kernel} over all blocks."""
        sizes1 = [batch_size(inputs_of(b)) for b in blocks1]
        sizes2 = None if blocks2 is None else [batch_size(inputs_of(b)) for b in blocks2]
        others = blocks1 if blocks2 is None else blocks2

        def cell(i: int, j: int) -> dict[str, Tensor]:
            one = self._capture(blocks1[i])
            self.outputs[i] = one.outputs
            two = one if blocks2 is None and i == j else self._capture(others[j])
            return self._contract(one, two)

        return assemble(sizes1, sizes2, cell, self.reduction)

    def _capture(self, block: Any) -> Capture:
        return Capture(self.network, block, self.state, summed=self.reduction == "sum", recipe=self.recipe)

    def _contract(self, one: Capture, two: Capture) -> dict[str, Tensor]:
        """One block of each parameter's kernel; zero where the outputs do not depend on the parameter."""
        contract = Contractor(self.reduction, work_dtype(one.outputs.dtype, self.precision))
        n, c = one.outputs.shape
        m = len(two.outputs)
        shape = {"full": (n, c, m, c), "blocks": (c, n, m)}.get(self.reduction, (n, m))
        found = {
            name: torch.zeros(shape, dtype=contract.dtype, device=one.outputs.device)
            for name in self.network.parameters
        }
        for outputs in [slice(None)] if self.reduction == "full" else one.groups():
            for a, b in _pairs(one, two, outputs):
                k = contract(a.factor, b.factor)
                if self.reduction == "blocks":
                    found[a.name][outputs] = k
                else:
                    found[a.name] += k
        return {name: k / c if self.reduction in ("trace", "sum") else k for name, k in found.items()}


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
