"""What engines/contraction_costs.py says a contraction takes, over what it takes, for weights of many shapes.

    python -m tests.bench.contractions [--only NAME …]

Process time on one thread, the least of three. The numbers of calls in costs.py, and `pad` in machines.py with
constants.py, were set by this table; what is chosen is the cheaper column.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.contraction_costs import gram_cost, jacobian_cost
from ntkwatch.engines.factors import Columns, Factor, Outer
from ntkwatch.engines.per_output import PerOutput

CPU = torch.device("cpu")
ROUNDS = 3  # of which the first warms up: cold code takes half a millisecond more
LONGEST = 2.0  # seconds foretold, above which nothing is run
REDUCTIONS: tuple[Reduction, ...] = ("trace", "full")
SHAPES = {  # n, C, groups, positions, p, q, and whether positions lie last in the gradients
    "gate of experts": (16, 10, 1, 24, 32, 4, False),
    "expert of few rows": (16, 10, 1, 8, 64, 32, False),
    "expert": (16, 10, 1, 24, 64, 64, False),
    "recurrent": (16, 10, 1, 48, 64, 192, False),
    "transformer": (16, 10, 1, 64, 128, 512, False),
    "wide inputs": (32, 8, 1, 16, 1024, 64, False),
    "first convolution": (32, 10, 1, 256, 27, 32, True),
    "convolution": (32, 10, 1, 64, 576, 64, True),
    "convolution, C = 128": (8, 128, 1, 64, 1152, 128, True),
    "depthwise": (32, 10, 64, 256, 9, 1, True),
    "grouped": (16, 10, 4, 64, 72, 16, True),
    "1 × 1": (32, 10, 1, 256, 64, 64, True),
    "tiny": (3, 2, 1, 4, 3, 4, False),
    "tiny depthwise": (3, 2, 4, 9, 9, 1, True),
}


class Told(Contractor):
    """Contracts in the way it is told."""

    gram = True

    def _by_gram(self, one: Factor, two: Factor) -> bool:
        return self.gram


def weight(n: int, c: int, groups: int, s: int, p: int, q: int, last: bool) -> Outer:
    """Random inputs and gradients."""
    shape = (n, groups, q, s) if last else (n, groups, s, q)
    g = tuple(torch.randn(shape).transpose(2, 3) if last else torch.randn(shape) for _ in range(c))
    return Outer(Columns.of(torch.randn(n, groups, s, p)), PerOutput(g))


def ratio(one: Outer, reduction: Reduction, dtype: torch.dtype, gram: bool) -> str:
    """Milliseconds, and how many of them were foretold."""
    cost = (gram_cost if gram else jacobian_cost)(one, one.n, one.n, reduction, dtype).seconds
    if cost > LONGEST:
        return f"{'–':>20}"

    def work() -> None:
        contract = Told(reduction, dtype, True)
        contract.gram = gram
        contract.add(contract.zeros(one.outputs, one.n, one.n, CPU), one, one)

    took = min(_seconds(work) for _ in range(ROUNDS))
    return f"{took * 1e3:>12.3g} {cost / took:>6.2f}×"


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", help="names")
    only = parser.parse_args(arguments).only
    torch.set_num_threads(1)
    lines = [f"{'weight':<22}{'kernel':<8}{'type':<9}{'gram, ms':>20}{'jacobian, ms':>20}"]
    for name, shape in SHAPES.items():
        if only is not None and name not in only:
            continue
        one = weight(*shape)
        for reduction in REDUCTIONS:
            for dtype in (torch.float64, torch.float32):
                pair = "".join(ratio(one, reduction, dtype, gram) for gram in (True, False))
                lines.append(f"{name:<22}{reduction:<8}{str(dtype)[6:]:<9}{pair}")
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
