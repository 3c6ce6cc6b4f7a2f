"""Promise 5: a failing probe never stops training, nor changes it.

A dispatch mode is on while NTKWatch probes (choosing probes, looking at the model, measuring, writing) and makes one
operation raise: which one, and with what, is drawn from a seed. Training must be bitwise the unwatched one.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.trust_harness import Tally, job_named, observe, reference

FAULTS = [
    RuntimeError,
    ValueError,
    MemoryError,
    OSError,
    AssertionError,
    NotImplementedError,
    torch.cuda.OutOfMemoryError,
]
NAMES = ["plain", "accumulation 3", "frozen BatchNorm in eval", "bf16-mixed", "64-true", "EMA", "checkpointing"]
ENGINES = ["auto", "layerwise", "functional"]


class OneFault(TorchDispatchMode):
    """Counts operations; the one numbered `at` raises `fault` (None: only counts)."""

    def __init__(self, at: int | None, fault: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.at, self.fault = at, fault
        self.count = 0
        self.fired = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 == self.at:
            self.fired = True
            raise self.fault(f"injected into {func}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def while_probing(mode: TorchDispatchMode) -> Iterator[None]:
    """Have `mode` on whenever a schedule counts time as probing."""
    from ntkwatch.watching.schedule import Schedule

    original = Schedule.probing

    @contextlib.contextmanager
    def probing(self: Any) -> Iterator[None]:
        with original(self), mode:
            yield

    Schedule.probing = probing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Schedule.probing = original  # type: ignore[method-assign]


def watched(name: str, engine: str, resample: bool, mode: OneFault, on_error: str = "warn") -> Any:
    """The run of the job under NTKWatch with `mode` on while it probes."""
    from ntkwatch import NTKWatch

    def watch() -> list[Any]:
        return [NTKWatch(probes=5, every=[1, 2, 5], budget=None, engine=engine, resample=resample, on_error=on_error)]

    with while_probing(mode):
        return observe(job_named(name), watch=watch)


@cache
def operations(name: str, engine: str, resample: bool) -> int:
    """How many operations the probes of an undisturbed run take."""
    counting = OneFault(at=None)
    watched(name, engine, resample, counting)
    assert counting.count > 100, f"{name} × {engine}: only {counting.count} operations were seen while probing"
    return counting.count


def sweep(faults: int, seed: int) -> tuple[Tally, int]:
    """Runs until `faults` faults have fired; the tally, and in how many runs the callback spoke of it."""
    pick, tally, spoken = random.Random(seed), Tally(), 0
    for attempt in itertools.count():
        assert attempt < 2 * faults + 10, "the faults do not fire"
        case = (pick.choice(NAMES), pick.choice(ENGINES), pick.random() < 0.2)
        fault = OneFault(pick.randrange(operations(*case)), pick.choice(FAULTS))
        seen = watched(*case, fault)
        if fault.fired:
            where = f"{case}: {fault.fault.__name__} at operation {fault.at} of {operations(*case)}"
            tally.compare(where, reference(case[0]), seen)
            spoken += any("ntkwatch" in warning.lower() for warning in seen.warnings)
        if tally.cells == faults:
            return tally, spoken
    raise AssertionError


def run(faults: int, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    tally, spoken = sweep(faults, seed)
    with capsys.disabled():
        print(f"\npromise 5: {tally.cells} faults fired, {len(tally.differ)} runs changed, {spoken} said in a warning")
    assert tally.faults() == ""
    assert tally.cells == faults
    # The rest is met without a warning: by a fallback of engine or tangent, or as an undefined value with its reason.
    assert spoken > 0.5 * faults, "faults are swallowed"


def test_the_faults_bite() -> None:
    """Under on_error="raise" the same fault ends the run, and the harness says so."""
    seen = watched("plain", "layerwise", False, OneFault(operations("plain", "layerwise", False) // 2), "raise")
    assert "injected" in str(reference("plain").difference(seen))


def test_a_failing_probe_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(40, 1, capsys)


@pytest.mark.soak
def test_a_thousand_faults(capsys: pytest.CaptureFixture[str]) -> None:
    run(1000, 2, capsys)
