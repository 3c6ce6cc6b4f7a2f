"""Promise 4: the harness can see. Nine naive probes are caught, and a careful one is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.trust_configs import HOOKS, JOBS, Job
from tests.support.trust_harness import Driver, Observation, Tally, observe, reference
from tests.support.trust_mutants import MUTANTS, TRACKED, Mutant, careful


def unwatched(job: Job) -> Observation:
    return observe(TRACKED) if job is TRACKED else reference(job.name)


def harm(mutant: Mutant, job: Job, hook: str) -> str | None:
    """What the naive probe changed first, and whether the trained weights differ in the end."""
    before, after = unwatched(job), observe(job, watch=lambda: [Driver(hook, mutant.probe)])
    assert before.error is None, f"{job.name} does not train: {before.error}"
    first = before.difference(after)
    reached = "the final weights differ" if before.reached_the_weights(after) else "the final weights are the same"
    return first and f"{first[:90]}; {reached}"


def test_every_naive_probe_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = {job.name: job for job in [*JOBS, TRACKED]}
    found = {mutant.name: harm(mutant, jobs[mutant.job], mutant.hook) for mutant in MUTANTS}
    with capsys.disabled():
        print(f"\npromise 4: {sum(map(bool, found.values()))} of {len(MUTANTS)} mutants caught")
        for mutant in MUTANTS:
            print(f"  {mutant.name}, in '{mutant.job}' at {mutant.hook}: {found[mutant.name]}")
    assert [name for name, fault in found.items() if not fault] == [], "the harness is blind to these"
    assert [name for name, fault in found.items() if not str(fault).endswith("differ")] == [], "no harm to the weights"
    assert len(found) == 9


def guarded(mutant: Mutant) -> Callable[[Any, int], None]:
    from ntkwatch.guard import leave_no_trace

    def probe(module: Any, call: int) -> None:
        with leave_no_trace(module):
            mutant.probe(module, call)

    return probe


def test_the_guard_makes_every_naive_probe_harmless() -> None:
    jobs, tally = {job.name: job for job in [*JOBS, TRACKED]}, Tally()
    for mutant in MUTANTS:
        seen = observe(jobs[mutant.job], watch=lambda m=mutant: [Driver(m.hook, guarded(m))])
        tally.compare(mutant.name, unwatched(jobs[mutant.job]), seen)
    assert tally.faults() == ""


def test_a_careful_probe_passes() -> None:
    tally = Tally()
    for i, job in enumerate([*JOBS, TRACKED]):
        hook = HOOKS[i % len(HOOKS)]
        tally.compare(f"{job.name} × {hook}", unwatched(job), observe(job, watch=lambda h=hook: [Driver(h, careful)]))
    assert tally.differ == []


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_an_unwatched_run_repeats_itself(job: Job) -> None:
    """Were the job not deterministic, a difference would say nothing about the watcher."""
    again = observe(job)
    assert again.error is None
    assert again.losses >= 12, "too few training steps were seen"
    assert reference(job.name).difference(again) is None


def test_both_sides_of_a_watcher_are_compared() -> None:
    """The pair around the watcher sees what leaves no trace in the weights: an equal tensor in place of `.grad`."""

    def replace_grad(module: object, call: int) -> None:
        for p in module.parameters():  # type: ignore[attr-defined]
            p.grad = None if p.grad is None else p.grad.clone()

    seen = observe(JOBS[0], watch=lambda: [Driver("on_after_backward", replace_grad)])
    assert reference("plain").difference(seen) is None
    assert any(".grad at on_after_backward" in name for name in seen.violations), seen.violations


@pytest.mark.soak
def test_in_how_many_cells_each_mutant_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for mutant in MUTANTS:
        cells = [(job, hook) for job in [*JOBS, TRACKED] for hook in HOOKS]
        caught = sum(bool(harm(mutant, job, hook)) for job, hook in cells)
        lines.append(f"  {mutant.name}: caught in {caught} of {len(cells)} cells")
        assert caught > 0, mutant.name
    with capsys.disabled():
        print("\npromise 4, every cell:", *lines, sep="\n")
