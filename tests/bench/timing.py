"""Timing and memory of pieces of work, interleaved in one process; what fails is reported, not dropped."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.engines.functional import is_out_of_memory
from ntkwatch.engines.memory import free_bytes, peak_bytes

SHARE = 0.8  # of the free memory that a peer may take before it counts as out of memory
WRONG = 0.01  # relative error above which a kernel is wrong: float32 explains a tenth of it
OUT_OF_MEMORY, NOT_INSTALLED = "out of memory", "not installed"

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


def once(work: Work, device: torch.device) -> tuple[float, Tensor | None]:
    """Seconds of one call, and what it gave."""
    gc.collect()
    synchronise(device)
    start = time.perf_counter()
    value = work()
    synchronise(device)
    return time.perf_counter() - start, value


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


def attempt(work: Work, exact: Tensor | None, device: torch.device) -> Outcome:
    """The first call, which warms up: its seconds, its error, or why there are none."""
    try:
        with address_limit(device):
            seconds, value = once(work, device)
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
    work: Mapping[str, Work],
    exact: Mapping[str, Tensor],
    rounds: int,
    patience: float,
    device: torch.device,
    always: frozenset[str] = frozenset(),
) -> dict[str, Outcome]:
    """Each piece of work in turn, `rounds` times after a first call.

    Those not in `always` get fewer rounds where these would take more than `patience` seconds together, and none after
    the first call where it took that long by itself. Whatever failed or was wrong is not called again.
    """
    with quick_collections():
        return _measure(work, exact, rounds, patience, device, always)


def _measure(
    work: Mapping[str, Work],
    exact: Mapping[str, Tensor],
    rounds: int,
    patience: float,
    device: torch.device,
    always: frozenset[str],
) -> dict[str, Outcome]:
    found = {name: attempt(fn, exact.get(name), device) for name, fn in work.items()}
    left = {
        name: rounds if name in always else min(rounds, int(patience / max(outcome.seconds, 1e-9)))
        for name, outcome in found.items()
        if outcome.right and outcome.seconds is not None
    }
    times: dict[str, list[float]] = {name: [] for name in left}
    for i in range(rounds):
        for name in left:
            if i < left[name]:
                times[name].append(once(work[name], device)[0])
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
