"""Promise 23 in a real run: the time that probes take, as a clock of the test's own sees it, is within the budget."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ntkwatch.watching.runner
from ntkwatch import NTKWatch, load_run
from ntkwatch.frontends.forecast_updates import ForecastUpdates
from ntkwatch.watching.schedule import Schedule
from tests.support.runs import Classifier, loaders, trainer

BUDGET, ALLOWANCE = 0.05, 0.3
STEPS = 300


class Slow(Classifier):
    """Steps of 10 ms and more; a probe takes longer."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def test_a_real_run_stays_within_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: the run is measured by the same clock as its probes."""
    monkeypatch.setattr(ntkwatch.watching.runner, "Schedule", partial(Schedule, allowance=ALLOWANCE))
    spent: list[float] = []
    together = NTKWatch._together

    def timed(*args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        together(*args, **kwargs)
        spent.append(time.perf_counter() - began)

    monkeypatch.setattr(NTKWatch, "_together", timed)
    watch, began = NTKWatch(probes=6, every=1, budget=BUDGET), time.perf_counter()
    trainer(tmp_path, watch, max_steps=STEPS, max_epochs=-1).fit(Slow(), *loaders())
    elapsed = time.perf_counter() - began
    assert watch.last is not None
    assert watch.record is not None
    assert watch.last.step == STEPS
    never_dropped = sum(sorted(spent)[-6:])  # look, gathering, settling, the first probe, the last, and one more
    assert sum(spent) <= ALLOWANCE + (BUDGET + 0.01) * elapsed + never_dropped
    assert watch.schedule.spent >= sum(spent) / 2, "time that nobody counts"
    assert len(load_run(watch.record).steps) < STEPS / 2, "the budget never bit"


def test_the_forecasts_time_is_overhead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept, steps = 0.02, 12
    batch = ForecastUpdates.batch

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(slept)
        batch(*args, **kwargs)

    monkeypatch.setattr(ForecastUpdates, "batch", slow)
    names = ["kernel_angle", "loss_if_lazy"]
    loss = torch.nn.functional.cross_entropy
    watch = NTKWatch(probes=6, every=[0, 2], budget=None, diagnostics=names, loss=loss)
    trainer(tmp_path, watch, max_steps=steps).fit(Classifier(), *loaders())
    schedule = watch.schedule
    assert schedule.overhead * schedule.elapsed - schedule.spent >= slept * steps
