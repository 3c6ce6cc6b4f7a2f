"""What `plan` says of seconds over what a kernel takes, for models of memory_models.py, odd ones and the zoo.

    python -m tests.bench.seconds [--threads 2] [--zoo] [--only NAME …]

Wall time on several threads; on one, process time, which other processes do not change. Medians of a few kernels, each
after a garbage collection, the model known, in double precision.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.engines.base import Reduction
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from ntkwatch.model import UnsupportedModel as Unsupported
from tests.bench.engines import Ours
from tests.bench.timing import Timer
from tests.engines import test_zoo as test_engines_zoo
from tests.support import cases, memory_models

assert test_engines_zoo  # registers all cases
Made = tuple[nn.Module, Any]
REDUCTIONS: tuple[Reduction, ...] = ("trace", "full")


class Decomposed(nn.Module):
    """Singular values of a matrix made of each example."""

    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.a, self.b, self.size = nn.Linear(32, size * size), nn.Linear(size, 10), size

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.linalg.svd(self.a(x).unflatten(1, (self.size, self.size)))[1])


def many_channels() -> nn.Module:
    """Dense convolutions of 128 channels, 128 outputs."""
    return nn.Sequential(
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128),
    )  # fmt: skip


def small_depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


ODD: dict[str, Callable[[], Made]] = {
    "svd": lambda: (Decomposed(), torch.randn(16, 32)),
    "128 channels": lambda: (many_channels(), torch.randn(8, 128, 8, 8)),
    "small depthwise": lambda: (small_depthwise(), torch.randn(16, 16, 12, 12)),
}


@dataclass(frozen=True)
class Compared:
    """Seconds of one kernel: foretold, and taken."""

    name: str
    reduction: str
    planned: float
    taken: float

    @property
    def ratio(self) -> float:
        return self.planned / self.taken

    def __str__(self) -> str:
        told, took = f"{self.planned * 1e3:.3g}", f"{self.taken * 1e3:.3g}"
        return f"{self.name:<28}{self.reduction:<7}{told:>10}{took:>10}{self.ratio:>8.2f}"


def models(zoo: bool) -> Mapping[str, Callable[[], Made]]:
    """By name, each from a seed, in evaluation mode, float32."""
    if zoo:
        known = [each for each in cases.CASES if not each.refused and not each.heavy]
        return {each.name: lambda each=each: cases.build(each, torch.float32) for each in known}
    listed = {name: lambda name=name: memory_models.build(name) for name in memory_models.MODELS}
    return {**listed, **{name: lambda make=make: _seeded(make) for name, make in ODD.items()}}


def _seeded(make: Callable[[], Made]) -> Made:
    torch.manual_seed(0)
    module, x = make()
    return module.eval(), x


def compare(name: str, made: Made, reduction: Reduction, timer: Timer) -> Compared:
    """The plan first, as a person asks for it, then kernels."""
    ours = Ours(*made)
    with leave_no_trace(Network(made[0]).module):
        planned = ours.plan(reduction, "double").seconds
        first, _ = timer.once(lambda: ours.kernel(reduction, "double"))
        times = [timer.once(lambda: ours.kernel(reduction, "double"))[0] for _ in range(timer.rounds_of(first))]
    return Compared(name, reduction, planned, statistics.median(times or [first]))


def table(chosen: Mapping[str, Callable[[], Made]], timer: Timer) -> list[Compared]:
    """Printed line by line; what the layerwise engine refuses is said."""
    print(f"{'model':<28}{'kernel':<7}{'plan, ms':>10}{'taken, ms':>10}{'ratio':>8}")
    found = []
    for name, make in chosen.items():
        for reduction in REDUCTIONS:
            try:
                found.append(compare(name, make(), reduction, timer))
            except (Unsupported, ImportError) as error:
                print(f"{name:<28}{reduction:<7}{type(error).__name__}: {str(error)[:70]}")
                continue
            print(found[-1], flush=True)
    return found


def said(found: Sequence[Compared]) -> str:
    """The extremes, and how many are within a factor."""
    ratios = [each.ratio for each in found]
    within = ", ".join(f"{sum(1 / f <= r <= f for r in ratios)} within {f}×" for f in (1.5, 2, 3))
    middle = math.exp(statistics.median(map(math.log, ratios)))
    return f"{len(ratios)} kernels: {min(ratios):.2f} to {max(ratios):.2f}, median {middle:.2f}; {within}"


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zoo", action="store_true", help="the test suite's small models")
    parser.add_argument("--only", nargs="+", help="names")
    args: Any = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    timer = Timer(args.rounds, 4.0, torch.device("cpu"), "cpu" if args.threads == 1 else "wall")
    chosen = {name: make for name, make in models(args.zoo).items() if args.only is None or name in args.only}
    summary = said(table(chosen, timer))
    print(summary)
    return summary


if __name__ == "__main__":
    main()
