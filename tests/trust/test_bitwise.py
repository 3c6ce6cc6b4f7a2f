"""Promise 1: training with the monitor is bitwise the training without it.

A cell is a configuration of the Trainer × the hook in which a Monitor measures × the engine. It counts only if kernels
were in fact recorded; the functional engine on a checkpointed model counts as a refusal that names its cause.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.trust_configs import ENGINES, HOOKS, IMPORT_NAMES, JOBS, STREAMS, Job
from tests.support.trust_harness import Driver, MonitorProbe, Tally, observe, real_kernel, reference
from tests.support.trust_observe import Observation

Cell = tuple[Job, str, str]
EVERY_CELL: list[Cell] = list(itertools.product(JOBS, HOOKS, ENGINES))
SAMPLE: list[Cell] = [
    cell
    for i, job in enumerate(JOBS)
    for cell in [(job, HOOKS[i % 6], "functional"), (job, HOOKS[(i + 2 + i // 6) % 6], "layerwise")]
]


def refusal_expected(cell: Cell) -> bool:
    job, _, engine = cell
    return job.name == "checkpointing" and engine == "functional"


def sweep(cells: list[Cell]) -> Tally:
    tally = Tally()
    for job, hook, engine in cells:
        name, probe = f"{job.name} × {hook} × {engine}", MonitorProbe(engine)
        probes = [probe, MonitorProbe(engine)] if job.resumed else [probe]  # a resumed run has a new Monitor
        waiting = iter(probes)
        seen = observe(job, watch=lambda hook=hook, waiting=waiting: [Driver(hook, next(waiting))])
        tally.compare(name, reference(job.name), seen)
        if refusal_expected((job, hook, engine)) and "torch.func cannot transform" in str(probe.refusal):
            tally.refused.append(f"{name}: {probe.refusal}")
        elif not any(missing := [p.missing() for p in probes]):
            tally.recorded += 1
        else:
            tally.unrecorded.append(f"{name}: {missing}")
    return tally


def assert_all(tally: Tally, cells: list[Cell]) -> None:
    assert tally.differ == [], tally.faults()
    assert tally.unrecorded == [], tally.faults()
    expected = sum(map(refusal_expected, cells))
    assert len(tally.refused) == expected
    assert (tally.cells, tally.recorded) == (len(cells), len(cells) - expected)


def test_the_sample_holds_every_configuration_hook_and_engine() -> None:
    assert len(EVERY_CELL) == 168
    assert {job.name for job, _, _ in SAMPLE} == {job.name for job in JOBS}
    assert {(hook, engine) for _, hook, engine in SAMPLE} == set(itertools.product(HOOKS, ENGINES))


def test_a_monitor_in_any_hook_leaves_training_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tally = sweep(SAMPLE)
    with capsys.disabled():
        print("\n" + tally.line("promise 1, sample"))
    assert_all(tally, SAMPLE)


@pytest.mark.soak
def test_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    tally = sweep(EVERY_CELL)
    with capsys.disabled():
        print("\n" + tally.line("promise 1"))
    assert_all(tally, EVERY_CELL)


def watched(job: Job, import_name: str, tally: Tally, before: Observation | None = None, **arguments: Any) -> None:
    """NTKWatch itself in one configuration, counted into `tally`; before: the job without it, if it is none of JOBS."""
    from ntkwatch import NTKWatch

    made: list[Any] = []

    def watch() -> list[Any]:
        made.append(NTKWatch(probes=6, every=[1, 2, 5], budget=None, on_error="raise", **arguments))
        return made[-1:]

    name = f"NTKWatch × {job.name} × {import_name}"
    tally.compare(name, before or reference(job.name, import_name), observe(job, import_name, watch))
    if all(callback.last is not None and real_kernel(callback.last.kernel) for callback in made) and made:
        tally.recorded += 1
    else:
        tally.unrecorded.append(name)


def test_the_callback_in_every_configuration_under_both_import_names(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    for job, import_name in itertools.product(JOBS, IMPORT_NAMES):
        watched(job, import_name, tally)
    with capsys.disabled():
        print("\n" + tally.line("promise 1, NTKWatch"))
    assert tally.faults() == ""
    assert (tally.cells, tally.recorded) == (28, 28)


def test_the_callback_on_streams_whose_probes_come_batch_by_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """θ_0 is put in the place of the run's weights while the first kernel is measured, some batches late."""
    tally = Tally()
    for i, job in enumerate(STREAMS):
        import_name = list(IMPORT_NAMES)[i % 2]
        watched(job, import_name, tally, before=observe(job, import_name))
    with capsys.disabled():
        print("\n" + tally.line("promise 1, streams"))
    assert tally.faults() == ""
    assert (tally.cells, tally.recorded) == (len(STREAMS), len(STREAMS))


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.soak)])
def test_a_forecast_trained_beside_the_run_leaves_it_as_it_is(every: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The linear model steps at every batch; where it cannot follow (two optimizers), the rest is measured."""
    from torch.nn.functional import cross_entropy

    tally, jobs = Tally(), JOBS[1::every] if every > 1 else JOBS
    for i, job in enumerate(jobs):
        import_name = list(IMPORT_NAMES)[i % 2]
        watched(job, import_name, tally, diagnostics=["default", "loss_if_lazy", "forecast_error"], loss=cross_entropy)
    with capsys.disabled():
        print("\n" + tally.line("promise 1, with the forecast"))
    assert tally.faults() == ""
    assert (tally.cells, tally.recorded) == (len(jobs), len(jobs))
