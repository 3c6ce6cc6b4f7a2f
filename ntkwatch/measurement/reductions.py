"""One kernel, measured as richly as anything asks for → the reductions that are asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ntkwatch.engines.base import Kernel, Reduction, reduce


def on_cpu(kernel: Tensor) -> Tensor:
    """Float64 on the CPU, detached."""
    return kernel.detach().double().cpu()


@dataclass(frozen=True)
class Derived:
    """A measured kernel seen in the run's own reduction and in richer ones.

    left_out: why the reduction that a diagnostic needs was not measured, None where it was.
    """

    rich: Kernel
    reduction: Reduction
    left_out: str | None = None

    @property
    def own(self) -> Kernel:
        """In the run's own reduction."""
        if self.rich.reduction == self.reduction:
            return self.rich
        return replace(self.rich, value=self._reduced(self.reduction), reduction=self.reduction)

    @property
    def trace(self) -> Tensor:
        """[n, n]: the trace reduction, whatever was measured; float64 on the CPU."""
        if self.rich.reduction == "sum":
            return on_cpu(torch.stack(list(self.rich.layers.values())).sum(dim=0))
        return on_cpu(self._reduced("trace"))

    @property
    def full(self) -> Tensor | str:
        """Θ [n, C, n, C], or why it is not there; for one output every reduction is Θ."""
        n, outputs = self.rich.outputs.shape
        if outputs == 1:
            return on_cpu(self.rich.value).reshape(n, 1, n, 1)
        return on_cpu(self.rich.value) if self.rich.reduction == "full" else self._too_small()

    @property
    def blocks(self) -> Tensor | str:
        """[C, n, n], or why they are not there."""
        n, outputs = self.rich.outputs.shape
        if outputs == 1:
            return on_cpu(self.rich.value).reshape(1, n, n)
        return on_cpu(self._reduced("blocks")) if self.rich.reduction in ("full", "blocks") else self._too_small()

    def _reduced(self, reduction: Reduction) -> Tensor:
        return reduce(self.rich.value, cast(Reduction, self.rich.reduction), reduction)

    def _too_small(self) -> str:
        return self.left_out or f"a kernel reduced to {self.rich.reduction!r} is too small for it"
