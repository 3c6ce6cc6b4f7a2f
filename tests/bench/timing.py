"""Timing and memory of pieces of work, interleaved in one process; what fails is reported, not dropped."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.engines.functional import is_out_of_memory
from ntkwatch.engines.memory import free_bytes, peak_bytes

SHARE = 0.8  # of the free memory that a peer may take before it counts as out of memory
WRONG = 0.01  # relative error above which a kernel is wrong: float32 explains a tenth of it
OUT_OF_MEMORY, NOT_INSTALLED = "out of memory", "not installed"

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # on one thread, the second does not see other processes

Work = Callable[[], "Tensor | None"]


@dataclass
class Outcome:
    """Median seconds over `rounds`; `error` relative to the exact kernel; `note` says why there is no figure."""

    seconds: float | None = None
    rounds: int = 0
    error: float | None = None
    note: str = ""

    @property
    def right(self) -> bool:
        return self.seconds is not None and not self.note


def relative_error(kernel: Tensor, exact: Tensor) -> float:
    """‖K − K_exact‖ / ‖K_exact‖, Frobenius."""
    return float((kernel.to(exact) - exact).norm() / exact.norm())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timer:
    """How work is timed: `rounds` each, fewer where they would take more than `patience` seconds together."""

    rounds: int
    patience: float
    device: torch.device
    clock: str = "wall"

    def once(self, work: Work) -> tuple[float, Tensor | None]:
        """Seconds of one call, and what it gave."""
        gc.collect()
        synchronise(self.device)
        start = CLOCKS[self.clock]()
        value = work()
        synchronise(self.device)
        return CLOCKS[self.clock]() - start, value

    def rounds_of(self, seconds: float) -> int:
        """Rounds of work of which a call takes so long: none beyond the first call where that was enough."""
        return min(self.rounds, int(self.patience / max(seconds, 1e-9)))


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """What is alive now is left out of `gc.collect()`, which then costs little between two calls."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def address_limit(device: torch.device) -> Iterator[None]:
    """An allocation above a share of the free memory raises, where the system would otherwise kill the process."""
    try:
        import resource

        with open("/proc/self/statm") as line:
            mapped = int(line.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if device.type == "cpu" and soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + int(SHARE * free_bytes(device)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(work: Work, exact: Tensor | None, timer: Timer) -> Outcome:
    """The first call, which warms up: its seconds, its error, or why there are none."""
    try:
        with address_limit(timer.device):
            seconds, value = timer.once(work)
    except Exception as error:  # whatever a peer does with a model it was not made for
        if is_out_of_memory(error):
            return Outcome(note=OUT_OF_MEMORY)
        return Outcome(note=f"refused: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    found = Outcome(seconds, 1)
    if value is not None and exact is not None:
        found.error = relative_error(value, exact)
        found.note = "" if found.error <= WRONG else f"wrong: relative error {found.error:.1e}"
    return found


def measure(
    work: Mapping[str, Work], exact: Mapping[str, Tensor], timer: Timer, always: Collection[str] = ()
) -> dict[str, Outcome]:
    """Each piece of work in turn, round by round after a first call; those in `always` in every round.

    Whatever failed or was wrong is not called again.
    """
    with quick_collections():
        found = {name: attempt(fn, exact.get(name), timer) for name, fn in work.items()}
        rounds = {
            name: timer.rounds if name in always else timer.rounds_of(outcome.seconds)
            for name, outcome in found.items()
            if outcome.right and outcome.seconds is not None
        }
        times: dict[str, list[float]] = {name: [] for name in rounds}
        for i in range(timer.rounds):
            for name in rounds:
                if i < rounds[name]:
                    times[name].append(timer.once(work[name])[0])
    for name, t in times.items():
        if t:
            found[name].seconds, found[name].rounds = statistics.median(t), len(t)
    return found


def peak_memory(work: Work, device: torch.device) -> int:
    """The most bytes alive at once over what was there before."""
    gc.collect()
    if device.type != "cuda":
        return peak_bytes(work)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before
