"""What the functional engine takes at its peak: its own code on tensors without memory, as far as more would repeat."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Reduction, entries
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.functional import Functional, quiet
from ntkwatch.engines.memory import LiveStorages, Repeats
from ntkwatch.engines.shapes import shapes_only
from ntkwatch.engines.values import Answers
from ntkwatch.model import Network, batch_size, inputs_of, take

_ROUND = 3  # blocks: with two Jacobians kept and the third being made, all that is held at once has been held


class _Brief(Functional):
    """Takes two stretches of every product, beyond which none takes more memory, and one Jacobian of a size."""

    stretches = 2

    def __init__(self, counter: LiveStorages) -> None:
        self._repeats = Repeats(counter)

    def _jacobian(
        self, network: Network, block: Any, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        make = super()._jacobian
        n = batch_size(inputs_of(block))
        return dict(self._repeats.once(n, lambda: make(network, block, parameters, state)))


@dataclass(frozen=True)
class Foresight:
    """A kernel that has not been computed: in blocks of `chunk` probes, its products in `dtype`.

    answers: what the model asks of values.
    """

    network: Network
    chunk: int
    reduction: Reduction
    layers: Reduction | None
    dtype: torch.dtype
    answers: Answers = field(default_factory=Answers)

    def peak(self, x: Any) -> int:
        """Bytes over the model's own; where shapes depend on values, from few probes, and continued."""
        n = batch_size(inputs_of(x))
        nothing = contextlib.suppress(Exception)  # whatever a model does with values that are not there
        with nothing, shapes_only(self.network, x, None) as (batch, state):
            return self._measured(batch, state, self.chunk)
        sizes, count = [size for size in (1, 2) if size <= self.chunk], min(_ROUND, -(-n // self.chunk))
        peaks = [self._measured(take(x, slice(0, count * size)), None, size, n) for size in sizes]
        return peaks[-1] + (peaks[-1] - peaks[0]) * (self.chunk - sizes[-1])

    def _measured(self, x: Any, state: Mapping[str, Tensor] | None, chunk: int, n: int | None = None) -> int:
        """Of the first blocks of x, with the kernels of n probes."""
        some, n = blocks(x, chunk)[:_ROUND], n or batch_size(inputs_of(x))
        with LiveStorages(None if state is None else self.answers.again()) as counter, quiet():
            with torch.no_grad():
                outputs = self.network.outputs(x, state).detach()
            found = _Brief(counter).by_parameter(self.network, some, None, state, self.reduction, self.dtype)
            ends, made = counter.peak, sum(k.untyped_storage().nbytes() for k in found.values())
        part = sum(batch_size(inputs_of(block)) for block in some)
        pairs = n * n * len(found) * self.dtype.itemsize
        whole = pairs * entries(self.reduction, outputs.shape[1])
        together = outputs.untyped_storage().nbytes() + pairs * self._kept(outputs.shape[1])
        return max(ends + (whole - made if n > part else 0), together)

    def _kept(self, outputs: int) -> int:
        """Numbers for each pair of probes and parameter at the end: a kernel of each, stacked, and some reduced."""
        reduced = 0 if self.layers in (None, self.reduction) else entries(str(self.layers), outputs)
        return 2 * entries(self.reduction, outputs) + reduced
