"""Promise 1 beyond the table: models, data and trainers that keep state in unusual places train bitwise unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.support.trust_configs import Job
from tests.support.trust_exotics import EXOTICS, PRUNING, UNSTEADY
from tests.support.trust_harness import Driver, MonitorProbe, Observation, observe, real_kernel

WATCHERS = ["NTKWatch", "NTKWatch, resampling", "NTKWatch on training data", "Monitor in on_after_backward"]


@cache
def unwatched(name: str) -> Observation:
    return observe(next(job for job in [*EXOTICS, *UNSTEADY, PRUNING] if job.name == name))


def watch(watcher: str) -> tuple[Any, Any]:
    """The watching callback, and whether it recorded."""
    if watcher.startswith("Monitor"):
        probe = MonitorProbe("layerwise")
        return Driver("on_after_backward", probe), lambda: probe.missing()
    from ntkwatch import NTKWatch

    probes: Any = "train" if watcher.endswith("training data") else 6
    callback = NTKWatch(probes, [1, 2, 5], None, on_error="raise", resample=watcher.endswith("resampling"))
    return callback, lambda: None if callback.last is not None and real_kernel(callback.last.kernel) else "no kernel"


def every_pair() -> Iterator[Any]:
    """Each job under each watcher; every second pair in the soak alone."""
    for (i, job), (j, watcher) in itertools.product(enumerate(EXOTICS), enumerate(WATCHERS)):
        marks = [pytest.mark.soak] if (i + j) % 2 else []
        yield pytest.param(job, watcher, id=f"{job.name}-{watcher}", marks=marks)


@pytest.mark.parametrize(("job", "watcher"), list(every_pair()))
def test_training_is_unchanged(job: Job, watcher: str) -> None:
    if (job.name, watcher) == ("iterable dataset", "NTKWatch, resampling"):
        pytest.skip("refused at on_train_start: a stream has no fresh probes to draw")
    before = unwatched(job.name)
    assert before.error is None, f"the unwatched run does not train: {before.error}"
    callback, missing = watch(watcher)
    seen = observe(job, watch=lambda: [callback])
    assert before.difference(seen) is None
    assert seen.violations == []
    assert missing() is None


@pytest.mark.parametrize("job", UNSTEADY, ids=lambda job: job.name)
def test_a_model_that_cannot_be_measured_trains_on(job: Job) -> None:
    from ntkwatch import NTKWatch

    callback = NTKWatch(6, [1, 2, 5], None)
    seen = observe(job, watch=lambda: [callback])
    assert unwatched(job.name).error is None
    assert unwatched(job.name).difference(seen) is None
    assert seen.violations == []
    assert callback.last is None
    assert any("switched off" in said and "forward passes on the same probes differ" in said for said in seen.warnings)


@pytest.mark.parametrize("watcher", ["NTKWatch", "Monitor in on_after_backward"])
def test_parameters_that_are_renamed_end_the_watch_by_name_and_training_goes_on(watcher: str) -> None:
    from ntkwatch import NTKWatch

    probe = MonitorProbe("layerwise")
    callback: Any = NTKWatch(6, 1, None) if watcher == "NTKWatch" else Driver("on_after_backward", probe)
    seen = observe(PRUNING, watch=lambda: [callback])
    assert unwatched(PRUNING.name).difference(seen) is None
    assert seen.violations == []
    said = seen.warnings if watcher == "NTKWatch" else [str(probe.missing())]
    assert any("no longer the parameter that was there" in line for line in said), said
