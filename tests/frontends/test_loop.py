"""watch: a plain training loop is watched through its optimizer's hooks, and trains exactly as it would alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkwatch
from ntkwatch.loggers.memory import Memory
from ntkwatch.measurement.monitor import Monitor

N, STEPS = 6, 9
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(32, 5, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = STEPS) -> None:
    x, y = data()
    for _ in range(steps):
        rows = torch.randint(0, len(x), (8,))
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        for optimizer in optimizers:
            optimizer.step()


def probes() -> tuple[Tensor, Tensor]:
    x, y = data()
    return x[:N], y[:N]


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    moments = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return [*model.state_dict().values(), *moments, torch.get_rng_state(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("make", MAKERS)
def test_training_is_bitwise_that_without_a_watch(make: str, tmp_path: Path) -> None:
    ends = []
    for is_watched in (False, True):
        model = network()
        optimizer = MAKERS[make](model.parameters())
        torch.manual_seed(7)
        if is_watched:
            with ntkwatch.watch(model, probes(), optimizer, every=2, budget=None, record=tmp_path / "r") as watched:
                train(model, [optimizer])
            assert ntkwatch.load_run(tmp_path / "r").steps == [0, 2, 4, 6, 8, 9]
            assert watched.last is not None
            assert watched.last.metrics["kernel_angle"] > 1e-3, "the kernel has not moved: nothing was measured"
        else:
            train(model, [optimizer])
        ends.append(state(model, optimizer))
        assert model.training
    assert len(ends[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_it_measures_what_a_monitor_measures(tmp_path: Path) -> None:
    found: list[dict[int, dict[str, float | None]]] = []
    for by_hand in (False, True):
        model = network()
        optimizer = MAKERS["SGD"](model.parameters())
        torch.manual_seed(7)
        if by_hand:
            monitor = Monitor(model, probes(), record=tmp_path / "monitor")
            monitor.measure(0, optimizer=optimizer)
            for step in range(1, 4):
                train(model, [optimizer], 1)
                monitor.measure(step, optimizer=optimizer)
        else:
            with ntkwatch.watch(model, probes(), optimizer, every=1, budget=None, record=tmp_path / "watch"):
                train(model, [optimizer], 3)
        run = ntkwatch.load_run(tmp_path / ("monitor" if by_hand else "watch"))
        found.append({step: {**run.measurement(step).metrics, "overhead": None} for step in run.steps})
    assert list(found[0]) == [0, 1, 2, 3]
    assert found[0] == found[1]


def test_loggers_last_measure_summary_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, logger = network(), Memory()
    optimizer = MAKERS["Adam"](model.parameters())
    watched = ntkwatch.watch(model, probes(), optimizer, every=[0], loggers=[logger], hparams={"width": 8})
    assert watched.last is not None
    assert watched.last.step == 0, "step 0 is measured at once"
    train(model, [optimizer], 4)
    assert watched.last.step == 0
    now = watched.measure()
    assert now is not None
    assert now.step == 4
    assert watched.measure() is watched.last, "a step is measured once"
    train(model, [optimizer], 1)
    watched.close()
    watched.close()
    assert watched.last.step == 5
    assert list(logger.curve("ntk/kernel_angle")) == [0, 4, 5]
    record = watched.record
    assert record is not None
    assert record.parent == Path("runs/ntkwatch")
    manifest = json.loads((record / "manifest.json").read_text())
    assert manifest["optimizer"] == ["Adam"]
    assert manifest["completed"] is True
    assert manifest["hparams"] == {"width": 8}
    assert "kernel" in watched.summary()
    train(model, [optimizer], 1)
    assert watched.last.step == 5, "a closed watch is over"
    assert not optimizer._optimizer_step_post_hooks


def test_of_several_optimizers_the_last_completes_a_step(tmp_path: Path) -> None:
    model = network()
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[4].parameters(), lr=0.01)]  # type: ignore[index]
    with ntkwatch.watch(model, probes(), optimizers, every=1, budget=None, record=tmp_path / "r") as watched:
        train(model, optimizers, 3)
    assert ntkwatch.load_run(tmp_path / "r").steps == [0, 1, 2, 3]
    assert ntkwatch.load_run(tmp_path / "r").manifest["optimizer"] == ["SGD", "Adam"]
    assert watched.last is not None


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failing_measurement_warns_and_training_goes_on(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = network()
    optimizer = MAKERS["SGD"](reference.parameters())
    torch.manual_seed(7)
    train(reference, [optimizer])
    measure, calls = Monitor.measure, []

    def failing(self: Monitor, step: int, **options: Any) -> Any:
        calls.append(step)
        if len(calls) > fails_at:
            raise RuntimeError("no kernel today")
        return measure(self, step, **options)

    monkeypatch.setattr(Monitor, "measure", failing)
    model = network()
    optimizer = MAKERS["SGD"](model.parameters())
    torch.manual_seed(7)
    with (
        pytest.warns(UserWarning, match="no kernel today"),
        ntkwatch.watch(model, probes(), optimizer, every=1, budget=None, record=tmp_path / "r") as watched,
    ):
        train(model, [optimizer])
    assert len(calls) == fails_at + 3, "three failures in a row switch off"
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), model.parameters(), strict=True))
    assert watched.last is not None
    assert watched.last.step == fails_at - 1
    assert "no kernel today" in ntkwatch.load_run(tmp_path / "r").manifest["switched_off"]["why"]
    assert "no kernel today" in " ".join(watched.summary().split())


def test_an_error_of_the_loop_leaves_the_record_unfinished_and_passes_through(tmp_path: Path) -> None:
    model = network()
    optimizer = MAKERS["SGD"](model.parameters())

    def loop() -> None:
        with ntkwatch.watch(model, probes(), optimizer, every=[0], record=tmp_path / "r"):
            train(model, [optimizer], 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    run = ntkwatch.load_run(tmp_path / "r")
    assert run.steps == [0]
    assert run.manifest["completed"] is False
    assert not optimizer._optimizer_step_post_hooks


def test_on_error_raise_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = MAKERS["SGD"](model.parameters())
    ntkwatch.watch(model, probes(), optimizer, every=1, on_error="raise", record=tmp_path / "r")

    def failing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(Monitor, "measure", failing)
    with pytest.raises(RuntimeError, match="no kernel today"):
        train(model, [optimizer], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 32}, "pass a batch, a tensor or a ProbeSet"),
        ({"probes": torch.ones(4, 7)}, "the model"),
        ({"optimizer": "SGD"}, "pass a torch optimizer, or a list of them"),
        ({"optimizer": []}, "pass a torch optimizer, or a list of them"),
        ({"every": "sometimes"}, "every='sometimes' is unknown"),
        ({"budget": 7}, "budget=7 must be a share"),
        ({"loggers": "csv"}, "loggers='csv' is not understood"),
        ({"on_error": "ignore"}, "on_error='ignore' is unknown"),
        ({"model": nn.Linear}, "an nn.Module, not its class"),
    ],
)
def test_wrong_arguments_raise_at_once_and_leave_no_hook(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = network()
    optimizer = MAKERS["SGD"](model.parameters())
    given = {"model": model, "probes": probes(), "optimizer": optimizer, "record": tmp_path / "r"} | arguments
    with pytest.raises(ValueError, match=message):
        ntkwatch.watch(given.pop("model"), given.pop("probes"), given.pop("optimizer"), **given)
    assert not optimizer._optimizer_step_post_hooks
    assert not (tmp_path / "r").exists()


def test_a_distributed_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkwatch.distributed import Ranks

    monkeypatch.setattr(Ranks, "detect", classmethod(lambda cls: Ranks(0, 2)))
    model = network()
    with pytest.raises(ValueError, match="pass NTKWatch to a Trainer"):
        ntkwatch.watch(model, probes(), MAKERS["SGD"](model.parameters()), record=tmp_path / "r")


def test_a_folder_that_holds_a_record_is_left_as_it_is(tmp_path: Path) -> None:
    for _ in range(2):
        model = network()
        optimizer = MAKERS["SGD"](model.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with ntkwatch.watch(model, probes(), optimizer, every=[0], record=tmp_path / "r") as watched:
                train(model, [optimizer], 1)
    assert watched.record is not None
    assert watched.record != tmp_path / "r"
    assert [str(w.message) for w in caught if str(watched.record) in str(w.message)]
    assert ntkwatch.load_run(tmp_path / "r").steps == [0, 1]
