"""How the time of a kernel grows with examples, outputs, width and depth, beside the growth of its arithmetic."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ntkwatch.engines.base import Reduction
from ntkwatch.guard import leave_no_trace
from tests.bench.engines import Ours, floor
from tests.bench.models import mlp
from tests.bench.timing import Timer, measure, peak_memory

INPUTS = 784
LARGE = 512  # examples of the 1024-wide MLP whose trace has to fit in a gigabyte


@dataclass(frozen=True)
class Sweep:
    """One quantity at several values of n, C, width or depth, all else as in the MLP of 64 × 784."""

    quantity: Reduction
    symbol: str
    values: Sequence[int]
    make: Callable[[int], nn.Module]
    examples: Callable[[int], int]


def _fixed(_: int) -> int:
    return 64


def sweeps(small: bool = False) -> list[Sweep]:
    """Those of the benchmark; `small`: one of little cost."""
    if small:
        return [Sweep("trace", "width", (16, 32, 64), lambda w: mlp(w), lambda _: 8)]
    n, c = (16, 32, 64, 128, 256, 512), (1, 3, 10, 30, 100)
    wide, by_outputs = (lambda _: mlp()), (lambda c: mlp(outputs=c))
    return [
        Sweep("trace", "n", n, wide, lambda n: n),
        Sweep("full", "n", n, wide, lambda n: n),
        Sweep("trace", "C", c, by_outputs, _fixed),
        Sweep("full", "C", c, by_outputs, _fixed),
        Sweep("trace", "width", (64, 128, 256, 512, 1024, 2048), lambda w: mlp(w), _fixed),
        Sweep("trace", "depth", (1, 2, 4, 8, 16), lambda d: mlp(depth=d), _fixed),
    ]


@dataclass(frozen=True)
class Growth:
    """A sweep's medians: seconds of the kernel (single precision), of the floor, and operations that `plan` counts."""

    sweep: Sweep
    seconds: list[float]
    floor: list[float]
    flops: list[float]

    def exponents(self, of: str, last: int = 0) -> float:
        """The slope of log(y) over log(value), over all points or the last few, where fixed costs weigh less."""
        return exponent(self.sweep.values[-last:], getattr(self, of)[-last:])


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of log y over log x."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def grow(sweep: Sweep, timer: Timer) -> Growth:
    """All values of a sweep in turn, round by round."""
    work, flops = {}, []
    guards = contextlib.ExitStack()
    for value in sweep.values:
        torch.manual_seed(0)
        module = sweep.make(value).eval().to(timer.device)
        x = torch.randn(sweep.examples(value), INPUTS, device=timer.device)
        ours = Ours(module, x)
        work[f"kernel {value}"] = partial(ours.kernel, sweep.quantity, "single")
        work[f"floor {value}"] = partial(floor, module, x)
        guards.enter_context(leave_no_trace(module))
        flops.append(sum(row.flops for row in ours.plan(sweep.quantity, "single").rows()))
    with guards:
        found = measure(work, {}, timer, work)
    times = {name: outcome.seconds for name, outcome in found.items()}
    failed = [f"{name}: {outcome.note}" for name, outcome in found.items() if outcome.seconds is None]
    if failed:
        raise RuntimeError(f"the sweep over {sweep.symbol} failed: {'; '.join(failed)}")
    return Growth(sweep, *([times[f"{k} {v}"] for v in sweep.values] for k in ("kernel", "floor")), flops)


def large_trace_bytes(device: torch.device, examples: int = LARGE) -> dict[str, int]:
    """Peak memory over the model of the trace of many examples, by precision."""
    torch.manual_seed(0)
    module = mlp().eval().to(device)
    ours = Ours(module, torch.randn(examples, INPUTS, device=device))
    with leave_no_trace(module):
        return {p: peak_memory(lambda p=p: ours.kernel("trace", p), device) for p in ("single", "double")}
