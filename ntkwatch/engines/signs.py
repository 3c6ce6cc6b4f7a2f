"""The kernel of sign descent, J₁ sign(J₂)ᵀ: asymmetric, not a product of Grams, but computed slab by slab.

The signs of an outer product are the outer product of signs, so a weight used at one position keeps its factors. For
every other parameter, slabs of the summed Jacobian are multiplied with their own signs.

A gradient that is zero up to rounding has the sign 0, so the result does not depend on the last bits of a CPU's
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Reduction, share_of_rounding, signs
from ntkwatch.engines.contract import Contractor, is_single
from ntkwatch.engines.factors import Factor
from ntkwatch.engines.per_output import PerOutput
from ntkwatch.engines.run import Run


@dataclass
class _Signs(Contractor):
    """Replaces the right factor of each product by its signs; nothing is mirrored."""

    share: float = 0.0

    def _by_gram(self, one: Factor, two: Factor) -> bool:
        return is_single(one, two)

    def _right(self, t: Tensor) -> Tensor:
        return signs(t, self.share)

    def _side_by_side(self, g: PerOutput) -> Tensor:
        """[C, n, q]: outputs stay separate, because each has its own rounding threshold."""
        return g.stacked().to(self.dtype)


@dataclass
class SignRun(Run):
    """A run of J₁ sign(J₂)ᵀ over all pairs of blocks, because the kernel is asymmetric."""

    def kernels(self, blocks1: list[Any], blocks2: list[Any] | None) -> dict[str, Tensor]:
        """As `Run.kernels`; `blocks2` None means the same examples on both sides, without symmetry."""
        return super().kernels(blocks1, blocks1 if blocks2 is None else blocks2)

    def contractor(self, reduction: Reduction, dtype: torch.dtype, same: bool) -> Contractor:
        """A contractor without symmetry, also for a block with itself."""
        held = next(iter(self.network.parameters.values())).dtype
        return _Signs(reduction, dtype, False, self.in_blocks, share=share_of_rounding(held))
