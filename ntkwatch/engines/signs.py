"""The kernel of sign descent, J₁ sign(J₂)ᵀ: not symmetric, and no product of Grams, but still a slab of J at a time.

Signs of an outer product are the outer product of signs, so a weight used at one position keeps its factors; of every
other parameter the Jacobian has to be added up first, and its slabs are multiplied with their own signs.

A gradient that is zero but for rounding has the sign 0: whatever instructions a CPU has, its last bits decide nothing.
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
    """Multiplies with signs on the right; nothing is mirrored."""

    share: float = 0.0

    def _by_gram(self, one: Factor, two: Factor) -> bool:
        return is_single(one, two)

    def _right(self, t: Tensor) -> Tensor:
        return signs(t, self.share)

    def _side_by_side(self, g: PerOutput) -> Tensor:
        """Outputs stay apart: the largest entry of one says nothing about another's rounding."""
        return g.stacked().to(self.dtype)


@dataclass
class SignRun(Run):
    """A run of J₁ sign(J₂)ᵀ; all pairs of blocks are taken, for K[n, m] is not K[m, n]."""

    def kernels(self, blocks1: list[Any], blocks2: list[Any] | None) -> dict[str, Tensor]:
        """As of any run; `blocks2` None is the same examples on both sides."""
        return super().kernels(blocks1, blocks1 if blocks2 is None else blocks2)

    def contractor(self, reduction: Reduction, dtype: torch.dtype, same: bool) -> Contractor:
        """Of a batch with itself as of any two."""
        held = next(iter(self.network.parameters.values())).dtype
        return _Signs(reduction, dtype, False, self.in_blocks, share=share_of_rounding(held))
