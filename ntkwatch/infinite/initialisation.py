"""Which initialisation a weight was drawn from: PyTorch keeps no record, so it is inferred from the second moment.

A weight of N entries estimates its variance with a relative error of at most √(2/N) (normal; uniform is closer). A
known scheme within four such errors explains it, and where several do, the one that explains the most weights of the
network is taken; the scheme's variance is exact where the measured one carries the noise of this draw. What no scheme
explains keeps its measured variance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

TORCH_DEFAULT = "PyTorch default, uniform of variance 1/(3 fan_in)"
MAX_STANDARD_ERRORS = 4.0
MAX_SAMPLED_ENTRIES = 2**20  # entries that tell a variance to .2 %; a larger weight is read in even strides


@dataclass(frozen=True)
class Weights:
    """A parameter drawn entry by entry, with its fans."""

    name: str
    value: Tensor
    fan_in: int
    fan_out: int
    bias: bool = False

    @cached_property
    def sample(self) -> Tensor:
        """Enough of its entries, in float64."""
        flat = self.value.detach().reshape(-1)
        return flat[:: -(-len(flat) // MAX_SAMPLED_ENTRIES)].double()

    @cached_property
    def mean_square(self) -> float:
        """The mean square of the sampled entries; an estimate of the variance with relative error √(2/N)."""
        return float(self.sample.square().mean())

    def schemes(self) -> dict[str, float]:
        """Name -> variance of one entry, for the schemes that can have drawn this parameter."""
        if self.mean_square == 0:
            return {"zero": 0.0}
        known = {TORCH_DEFAULT: 1 / (3 * self.fan_in), "standard normal": 1.0, "normal(0, 0.02)": 4e-4}
        if not self.bias:
            known |= {
                "Kaiming, 2/fan_in": 2 / self.fan_in,
                "Kaiming, 2/fan_out": 2 / self.fan_out,
                "LeCun, 1/fan_in": 1 / self.fan_in,
                "1/fan_out": 1 / self.fan_out,
                "Xavier, 2/(fan_in + fan_out)": 2 / (self.fan_in + self.fan_out),
            }
        return {name: variance for name, variance in known.items() if self._may_be(name, variance)}

    def _may_be(self, name: str, variance: float) -> bool:
        if name == TORCH_DEFAULT and float(self.value.detach().abs().max()) > math.sqrt(3 * variance) * (1 + 1e-5):
            return False
        return abs(math.log(self.mean_square / variance)) <= MAX_STANDARD_ERRORS * math.sqrt(2 / len(self.sample))


@dataclass(frozen=True)
class Origin:
    """variance: of one entry. scheme: where it comes from."""

    variance: float
    scheme: str


def origins(weights: Iterable[Weights]) -> dict[str, Origin]:
    """Parameter name -> its origin."""
    candidates = {w.name: (w, w.schemes()) for w in weights}
    # What few entries leave open, others of the kind decide: biases are drawn otherwise than weights.
    votes = Counter((w.bias, scheme) for w, schemes in candidates.values() for scheme in schemes)
    return {name: _decide(w, schemes, votes) for name, (w, schemes) in candidates.items()}


def _decide(w: Weights, schemes: dict[str, float], votes: Counter[tuple[bool, str]]) -> Origin:
    if not schemes:
        return Origin(w.mean_square, "measured")
    best = max(
        schemes, key=lambda s: (votes[w.bias, s], -abs(math.log(w.mean_square / schemes[s])) if schemes[s] else 0.0)
    )
    return Origin(schemes[best], best)


def has_nonzero_mean(w: Weights) -> bool:
    """Whether the mean cannot be sampling error: a constant bias, a trained or a non-negative weight."""
    mean, n = float(w.sample.mean()), len(w.sample)
    return w.mean_square > 0 and abs(mean) > 6 * math.sqrt(w.mean_square / n) and n > 36


def find_copies(weights: Iterable[Weights]) -> tuple[str, str] | None:
    """Two parameters with the same values, which are then not independent draws (nn.TransformerEncoder copies)."""
    seen: dict[tuple[object, ...], Weights] = {}
    for w in weights:
        if w.mean_square == 0:
            continue
        other = seen.setdefault((w.value.shape, w.mean_square), w)
        if other is not w and bool((other.value == w.value).all()):
            return other.name, w.name
    return None
