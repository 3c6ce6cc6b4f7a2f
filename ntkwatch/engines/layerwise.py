"""The engine for real models: per-example factors of every parameter, contracted without forming the Jacobian."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Kernel, Precision, Reduction, noise_floor, reduce, richest, work_dtype
from ntkwatch.engines.capture import Captured, Separation, capture, separate_few
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.factors import Factor
from ntkwatch.engines.functional import _COLUMNS, _assemble, _blocks, math_attention
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
        recipe = self.recipe(network, x1, state)

        def captured(block: Any) -> Captured:
            with math_attention():
                return capture(network, block, state, summed=rich == "sum", recipe=recipe)

        chunk = chunk_size or batch_size(inputs_of(x1))
        blocks1 = _blocks(x1, chunk)
        blocks2 = blocks1 if x2 is None else _blocks(x2, chunk_size or batch_size(inputs_of(x2)))
        rows: list[dict[str, Tensor]] = []
        outputs: list[Tensor] = []
        for i, block in enumerate(blocks1):
            one = captured(block)
            outputs.append(one.outputs)
            row = []
            for k, other in enumerate(blocks2[: i + 1] if x2 is None else blocks2):
                two = one if x2 is None and k == i else captured(other)
                row.append(_cell(network, one, two, rich, work_dtype(one.outputs.dtype, precision)))
            rows.append({name: torch.cat([cell[name] for cell in row], _COLUMNS[rich]) for name in row[0]})
        theta = {name: _assemble([row[name] for row in rows], rich, x2 is None) for name in rows[0]}
        total = torch.stack(list(theta.values())).sum(0)
        kept = {} if layers is None else {name: reduce(t, rich, layers) for name, t in theta.items()}
        floor = noise_floor(outputs[0].dtype, precision, max(p.numel() for p in network.parameters.values()))
        return Kernel(reduce(total, rich, reduction), kept, torch.cat(outputs), reduction, self.name, precision, floor)

    def recipe(self, network: Network, x: Any, state: Mapping[str, Tensor] | None) -> Separation | None:
        """The layouts of this network's gradients, read once from a few probes."""
        if network not in self._recipes:
            with math_attention():
                self._recipes[network] = separate_few(network, x, state)
        return self._recipes[network]


def _cell(
    network: Network, one: Captured, two: Captured, reduction: Reduction, dtype: torch.dtype
) -> dict[str, Tensor]:
    """One block of each parameter's kernel; zero where the outputs do not depend on the parameter."""
    found: dict[str, Tensor] = {}
    contract = Contractor(reduction, dtype)
    for name in network.parameters:
        a: Factor | None = one.factors.get(name)
        b: Factor | None = two.factors.get(name)
        if a is None or b is None:
            n, c = one.outputs.shape
            shape = {"full": (n, c, len(two.outputs), c), "blocks": (c, n, len(two.outputs))}.get(reduction)
            found[name] = torch.zeros(shape or (n, len(two.outputs)), dtype=dtype, device=one.outputs.device)
        else:
            k = contract(a, b)
            found[name] = k / one.outputs.shape[1] if reduction == "sum" else k
    return found
