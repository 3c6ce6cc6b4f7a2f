"""NTKWatch in a Trainer: when it measures, what it writes, what it does with trouble."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ntkwatch import NTKWatch, UnsupportedModel, empirical_ntk, load_run
from tests.support.runs import Classifier, Rows, loaders, rows, trainer

DEFAULT = {
    "kernel_distance", "kernel_angle", "kernel_scale", "relative_change", "kernel_velocity", "centered_alignment",
    "distance_to_infinite", "centered_alignment_z", "effective_rank", "log10_lambda_max", "taylor_ratio",
    "parameter_distance", "overhead",
    *(f"log10_lambda_{i}" for i in range(1, 6)),
}  # fmt: skip


def watched(path: Path, model: pl.LightningModule | None = None, data: Any = None, **settings: Any) -> NTKWatch:
    """One run watched without a budget, settings starting with `watch_` going to the callback."""
    arguments = {k.removeprefix("watch_"): settings.pop(k) for k in list(settings) if k.startswith("watch_")}
    watch = NTKWatch(**{"probes": 12, "budget": None, **arguments})
    trainer(path, watch, **settings).fit(model or Classifier(), *(data or loaders()))
    return watch


def steps(watch: NTKWatch) -> list[int]:
    assert watch.record is not None
    return load_run(watch.record).steps


# ── zero configuration ────────────────────────────────────────────────────────────────────────────────────────────────
def test_adding_the_callback_is_all(tmp_path: Path) -> None:
    watch = NTKWatch()
    trainer(tmp_path, watch).fit(Classifier(), *loaders())
    run = load_run(watch.record)
    assert set(run.metrics.columns) == DEFAULT
    assert run.manifest["probes"]["n"] == 64
    assert run.manifest["probes"]["source"] == "val"
    assert run.manifest["hparams"]["width"] == 16
    assert watch.last.step == 12
    assert watch.last.metrics["kernel_angle"] > 0
    assert "angle" in watch.summary()


def test_the_first_kernel_is_the_one_before_training(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Classifier()
    probes = rows(12, seed=3).tensors[0]
    expected = empirical_ntk(model, probes)
    watch = watched(tmp_path, model, watch_probes=probes)
    torch.testing.assert_close(load_run(watch.record).kernel(0), expected, rtol=1e-12, atol=0)


FORMS = {
    "pair": (Classifier(), lambda: loaders()),
    "dict": (Classifier(form="dict"), lambda: [DataLoader(Rows("dict"), 16)] * 2),
    "bare": (Classifier(form="bare"), lambda: [DataLoader(Rows("bare"), 16)] * 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form(form: str, tmp_path: Path) -> None:
    model, data = FORMS[form]
    metrics = watched(tmp_path, model, data()).last.metrics
    assert metrics["kernel_angle"] > 0, form
    assert (metrics["centered_alignment"] is None) == (form == "bare"), form


@dataclass
class Fields:
    """A batch as a dataclass: README says that `forward` gets it whole."""

    x: Tensor
    y: Tensor


class TakesFields(Classifier):
    """Its forward takes the batch, or (whole=False) one field of it."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Any) -> Tensor:
        return self.net(x.x if self.whole else x)

    def training_step(self, batch: Fields, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch if self.whole else batch.x), batch.y)


@pytest.mark.parametrize("whole", [True, False])
def test_a_dataclass_goes_into_forward_whole_or_through_outputs(whole: bool, tmp_path: Path) -> None:
    def collate(items: list[Any]) -> Fields:
        return Fields(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    given = {"watch_outputs": lambda model, batch: model(batch.x)} if not whole else {}
    data = [DataLoader(rows(48), 16, collate_fn=collate)] * 2
    last = watched(tmp_path, TakesFields(whole), data, **given, watch_targets=lambda batch: batch.y).last
    assert last.metrics["kernel_angle"] > 0
    assert last.metrics["centered_alignment"] is not None


def test_absent_targets_have_a_reason(tmp_path: Path) -> None:
    last = watched(tmp_path, Classifier(form="bare"), [DataLoader(Rows("bare"), 16)] * 2).last
    assert last.metrics["centered_alignment"] is None
    assert "target" in last.reasons["centered_alignment"]


# ── when ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "log grid": ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]),
    "a number": ({"watch_every": 5}, [0, 5, 10, 12]),
    "a list": ({"watch_every": [3, 7]}, [0, 3, 7, 12]),
    "a function": ({"watch_every": lambda step: step % 4 == 2}, [0, 2, 6, 10, 12]),
    "accumulation": ({"watch_every": 2, "accumulate_grad_batches": 3, "max_steps": 4}, [0, 2, 4]),
    "max_steps in mid-epoch": ({"watch_every": 4, "max_steps": 9}, [0, 4, 8, 9]),
    "one batch": ({"watch_every": 1, "limit_train_batches": 1, "max_epochs": 1, "max_steps": -1}, [0, 1]),
    "late validation": ({"watch_every": 6, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}, [0, 6, 12]),
    "stopped early": ({"watch_every": 5, "max_steps": 7}, [0, 5, 7]),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULES)
def test_it_measures_at_the_right_steps(case: str, tmp_path: Path) -> None:
    settings, expected = SCHEDULES[case]
    watch = watched(tmp_path, **dict(settings))
    assert steps(watch) == expected, case
    assert load_run(watch.record).manifest["probes"]["source"] == "val", case


class TwoOptimizers(Classifier):
    """Manual optimization: Lightning's global_step then jumps by two a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[-1]
        return [torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.Adam(last.parameters(), lr=0.01)]


def test_two_optimizers_count_batches_not_optimizer_steps(tmp_path: Path) -> None:
    watch = watched(tmp_path, TwoOptimizers(), watch_every=2, max_epochs=1, max_steps=-1)
    assert steps(watch) == [0, 2, 4, 6]
    assert watch.last.global_step == 12


def test_a_resumed_run_counts_batches_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"probes": 12, "budget": None, "every": 2}
    run = trainer(tmp_path, NTKWatch(**settings), max_epochs=1, max_steps=-1)
    run.fit(TwoOptimizers(), *loaders())
    run.save_checkpoint(tmp_path / "half.ckpt")
    rest = NTKWatch(**settings)
    trainer(tmp_path, rest, max_epochs=2, max_steps=-1).fit(
        TwoOptimizers(), *loaders(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert steps(rest) == [0, 2, 4, 6, 8, 10, 12]


# ── trainers that are special ─────────────────────────────────────────────────────────────────────────────────────────
def test_fast_dev_run_tries_once_and_writes_nothing(tmp_path: Path) -> None:
    watch = watched(tmp_path, fast_dev_run=True)
    assert watch.last.step == 0
    assert watch.record is None
    assert not list(tmp_path.rglob("manifest.json"))


def test_barebones_switches_off(tmp_path: Path) -> None:
    watch = NTKWatch()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"))
    with pytest.warns(UserWarning, match="switched off.*barebones"):
        trainer(tmp_path, watch, barebones=True, **quiet).fit(Classifier(), loaders()[0])
    assert watch.last is None


def test_a_model_whose_parameters_are_spread_over_ranks_is_refused_by_name(tmp_path: Path) -> None:
    class FSDPModule(nn.Sequential):
        """As torch's are told: by the name of the class."""

    model = Classifier()
    model.net = FSDPModule(*model.net)
    watch = NTKWatch(probes=12)
    with pytest.warns(UserWarning, match="switched off: net is managed by FSDPModule; sharded parameters cannot be"):
        trainer(tmp_path, watch, max_steps=3).fit(model, *loaders())
    assert watch.last is None
    assert watch.record is None
    assert model.global_step == 3


def test_no_validation_loader_falls_back_to_training(tmp_path: Path) -> None:
    watch = watched(tmp_path, data=loaders()[:1])
    assert load_run(watch.record).manifest["probes"]["source"] == "train"


def test_an_empty_loader_harms_nobody(tmp_path: Path) -> None:
    watch = watched(tmp_path, limit_train_batches=0)
    assert watch.last is None


class Stream(IterableDataset):
    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __iter__(self) -> Any:
        return iter(rows(48, self.seed))


def test_an_iterable_dataset_gives_its_first_rows(tmp_path: Path) -> None:
    watch = watched(tmp_path, data=[DataLoader(Stream(), 16)], max_steps=-1, max_epochs=1)
    run = load_run(watch.record)
    assert run.manifest["probes"]["n"] == 12
    assert run.steps == [0, 1, 2, 3]


def test_both_lightnings() -> None:
    """Run in a fresh process each, since the base class follows the import that came first."""
    import subprocess
    import sys

    code = (
        "import {name} as pl, tempfile, pathlib; from ntkwatch import NTKWatch; from tests.support import runs; "
        "module = type('M', (pl.LightningModule,), dict(vars(runs.Classifier))); "
        "assert issubclass(NTKWatch, pl.Callback), NTKWatch.__mro__"
    )
    for name in ("pytorch_lightning", "lightning.pytorch"):
        subprocess.run([sys.executable, "-c", f"import {name}; {code.format(name=name)}"], check=True)


# ── where it goes ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_logger_tells_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    watch = watched(tmp_path, logger=logged, watch_every=4, log_every_n_steps=1)
    run = load_run(watch.record)
    assert watch.record == Path(logged[0].log_dir) / "ntkwatch"
    events = EventAccumulator(logged[0].log_dir).Reload()
    table = pd.read_csv(Path(logged[1].log_dir) / "metrics.csv").set_index("step")
    for name in DEFAULT:
        expected = {step: value for step, value in run.metrics[name].items() if pd.notna(value)}
        tag = f"ntk/{name}"
        assert {e.step: pytest.approx(e.value, rel=1e-6) for e in events.Scalars(tag)} == expected, name
        rows_ = table[tag].dropna()
        assert dict(rows_.items()) == pytest.approx(expected, rel=1e-12), name


def test_values_reach_callbacks_that_monitor(tmp_path: Path) -> None:
    stop = pl.callbacks.EarlyStopping("ntk/kernel_angle", mode="max", stopping_threshold=1e-9)
    watch = watched(tmp_path, max_epochs=20, max_steps=-1)
    assert watch.last.step == 120
    watch = NTKWatch(probes=12, every=1)
    trainer(tmp_path, watch, stop, max_epochs=20, max_steps=-1).fit(Classifier(), *loaders())
    assert watch.last.step == 6, "EarlyStopping saw the angle at the end of the first epoch"


def test_resume_continues_the_same_record(tmp_path: Path) -> None:
    def fit(watch: NTKWatch, to: int, resume: Path | None = None) -> pl.Trainer:
        pl.seed_everything(5, verbose=False)
        run = trainer(tmp_path / str(to), watch, max_steps=to)
        run.fit(Classifier(norm=True), DataLoader(rows(), 16), loaders()[1], ckpt_path=resume)
        return run

    settings: dict[str, Any] = {"probes": 12, "budget": None, "every": 3}
    whole = NTKWatch(**settings)
    fit(whole, 12)
    half = NTKWatch(**settings)
    checkpoint = tmp_path / "half.ckpt"
    fit(half, 6).save_checkpoint(checkpoint)
    torch.load(checkpoint, weights_only=True)  # the user's checkpoint stays loadable without pickle
    rest = NTKWatch(**settings)
    fit(rest, 12, checkpoint)
    assert rest.record == half.record
    one, other = load_run(whole.record), load_run(rest.record)
    assert one.steps == other.steps == [0, 3, 6, 9, 12]
    columns = [c for c in one.metrics.columns if c != "overhead"]
    pd.testing.assert_frame_equal(one.metrics[columns], other.metrics[columns], check_exact=True)


def test_a_resumed_stream_is_watched_on_the_rows_it_started_with(tmp_path: Path) -> None:
    """The stream goes on elsewhere after a resume; the record keeps the rows that it began with."""
    settings: dict[str, Any] = {"probes": 12, "budget": None, "every": 1}
    half = NTKWatch(**settings)
    run = trainer(tmp_path / "half", half, max_steps=2)
    run.fit(Classifier(), DataLoader(Stream(), 16))
    run.save_checkpoint(tmp_path / "half.ckpt")
    rest = NTKWatch(**settings)
    run = trainer(tmp_path / "rest", rest, max_steps=4)
    run.fit(Classifier(), DataLoader(Stream(seed=7), 16), ckpt_path=tmp_path / "half.ckpt")
    assert rest.record == half.record
    assert steps(rest) == [0, 1, 2, 3, 4]


def test_a_lost_record_is_said_and_a_new_one_started(tmp_path: Path) -> None:
    import shutil

    half = NTKWatch(probes=12, budget=None, every=1)
    run = trainer(tmp_path / "half", half, max_steps=2)
    run.fit(Classifier(), *loaders())
    run.save_checkpoint(tmp_path / "half.ckpt")
    shutil.rmtree(half.record)
    rest = NTKWatch(probes=12, budget=None, every=1)
    with pytest.warns(UserWarning, match="cannot be continued.*a new one starts at step 2"):
        trainer(tmp_path / "rest", rest, max_steps=4).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "half.ckpt")
    assert steps(rest) == [2, 3, 4]
    assert "angle" in rest.summary()


def test_the_progress_bar_has_two_short_columns_and_gets_its_own_back(tmp_path: Path) -> None:
    class Bar(pl.callbacks.TQDMProgressBar):
        seen: list[set[str]] = []  # noqa: RUF012  of the test alone

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append(set(self.get_metrics(trainer, pl_module)))

    bar = Bar(refresh_rate=0)
    trainer(tmp_path, NTKWatch(probes=12, budget=None), bar, enable_progress_bar=True).fit(Classifier(), *loaders())
    assert {"ntk_angle", "ntk_rho"} <= bar.seen[-1]
    assert "get_metrics" not in vars(bar)


def test_a_slow_probe_is_said_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.watching.session.SLOW_PROBE", 0.0)
    with pytest.warns(UserWarning, match="one probe of 12 examples may take some.*smaller number as probes="):
        watched(tmp_path)


# ── trouble ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class Gate:
    """outputs= that fails on demand."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self.broken:
            raise RuntimeError("the gate is shut")
        return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


class Breaks(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        GATE.broken = self.trainer.global_step >= 2


GATE = Gate()


def test_a_probe_that_fails_in_mid_run_warns_and_training_goes_on(tmp_path: Path) -> None:
    GATE.broken = False
    with pytest.warns(UserWarning, match="step 3 failed.*the gate is shut.*training goes on"):
        watch = watched(tmp_path, Breaks(), watch_outputs=GATE, watch_every=1, max_steps=9)
    assert watch.last.step == 2


class Flickers(Classifier):
    """Its probes fail at steps 3 and 4, and from step 6 on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        GATE.broken = self.trainer.global_step in (2, 3, 5, 6, 7)


def test_the_record_says_when_the_watch_was_switched_off_and_why(tmp_path: Path) -> None:
    from ntkwatch.report import render

    GATE.broken = False
    with pytest.warns(UserWarning, match="switched off") as caught:
        watch = watched(tmp_path, Flickers(), watch_outputs=GATE, watch_every=1)
    manifest = load_run(watch.record).manifest
    warning = next(str(w.message) for w in caught if "switched off" in str(w.message))
    assert manifest["switched_off"] == {"step": 8, "why": warning.removeprefix("NTKWatch: switched off: ")}
    assert manifest["failed_probes"] == [3, 4, 6, 7, 8]
    assert manifest["finished"]
    for told in (" ".join(watch.summary().split()), " ".join(render([watch.record]).split())):
        assert "Switched off at step 8" in told
        assert "the gate is shut" in told
        assert "5 probes failed, the first at step 3, the last at step 8." in told


def test_probes_that_failed_and_recovered_are_counted_in_the_record(tmp_path: Path) -> None:
    GATE.broken = False
    with pytest.warns(UserWarning, match="the gate is shut"):
        watch = watched(tmp_path, Flickers(), watch_outputs=GATE, watch_every=1, max_steps=5)
    assert load_run(watch.record).manifest["failed_probes"] == [3, 4]
    assert "switched_off" not in load_run(watch.record).manifest
    assert "Watch      2 probes failed, the first at step 3, the last at step 4." in watch.summary()


def test_a_resumed_run_that_measures_again_is_switched_on_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"outputs": GATE, "every": 1, "probes": 12, "budget": None}
    GATE.broken = False
    first, rest = NTKWatch(**settings), NTKWatch(**settings)
    run = trainer(tmp_path, first, max_steps=8)
    with pytest.warns(UserWarning, match="switched off"):
        run.fit(Flickers(), *loaders())
    run.save_checkpoint(tmp_path / "a.ckpt")
    GATE.broken = False
    trainer(tmp_path, rest).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "a.ckpt")
    assert rest.record == first.record
    manifest = load_run(rest.record).manifest
    assert (manifest["switched_off"], manifest["failed_probes"]) == (None, [3, 4, 6, 7, 8])
    assert steps(rest) == [0, 1, 2, 5, 9, 10, 11, 12]
    assert "Switched off" not in rest.summary()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("no more")], ids=["disk", "RAM"])
def test_a_switch_off_that_cannot_be_written_harms_nobody(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ntkwatch.record import RecordWriter

    whole = RecordWriter.update_manifest

    def full(writer: RecordWriter, **changes: Any) -> None:
        if "theta0" in changes:
            return whole(writer, **changes)
        raise error

    monkeypatch.setattr(RecordWriter, "update_manifest", full)
    GATE.broken = False
    with pytest.warns(UserWarning, match="a failure") as caught:
        watch = watched(tmp_path, Flickers(), watch_outputs=GATE, watch_every=1)
    said = " ".join(str(w.message) for w in caught)
    assert type(error).__name__ in said
    assert "switched off: the probe at step 8 failed" in said
    assert steps(watch) == [0, 1, 2, 5]


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Starved(Classifier):
    """In evaluation memory runs out: at the first pass over the probes, or at a later one."""

    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= not self.training
        if self.left < 0:
            raise self.error
        return self.net(x)


OUT_OF_MEMORY: dict[str, Exception] = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "Python": MemoryError("no more"),
}
GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "outputs": {"watch_outputs": lambda model, batch: model(batch[0])},
    "targets": {"watch_targets": lambda batch: batch[1]},
    "probes": {"watch_probes": rows(12).tensors},
}


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
@pytest.mark.parametrize("given", GIVEN)
def test_memory_that_runs_out_at_the_start_is_a_warning_whatever_was_passed(
    given: str, kind: str, after: int, tmp_path: Path
) -> None:
    model = Starved(OUT_OF_MEMORY[kind], after)
    wanted = r"switched off: .* ran out of memory \(.*: pass fewer probes to NTKWatch"
    with pytest.warns(UserWarning, match=wanted):
        watch = watched(tmp_path, model, **GIVEN[given], max_steps=3)
    assert watch.last is None, (given, kind)
    assert "ran out of memory" in watch.summary()


def test_memory_that_runs_out_raises_where_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match=r"one forward pass of the probes.*fewer probes"):
        watched(tmp_path, Starved(OUT_OF_MEMORY["GPU"], 0), watch_on_error="raise")


class Ends(pl.Callback):
    """The job is told to end at the third step: Lightning notes that, and ends the run after the batch."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer._signal_connector.received_sigterm |= trainer.global_step == 3


def test_no_probe_begins_once_the_job_was_told_to_end(tmp_path: Path) -> None:
    watch = NTKWatch(probes=12, budget=None, every=1)
    with pytest.raises(SystemExit):
        trainer(tmp_path, Ends(), watch).fit(Classifier(), *loaders())
    assert steps(watch) == [0, 1, 2]


def test_on_error_raise_raises(tmp_path: Path) -> None:
    GATE.broken = False
    with pytest.raises(RuntimeError, match="the gate is shut"):
        watched(tmp_path, Breaks(), watch_outputs=GATE, watch_every=1, watch_on_error="raise")


def test_warnings_as_errors_do_not_stop_training(tmp_path: Path) -> None:
    GATE.broken = False
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="NTKWatch.*")
        assert watched(tmp_path, Breaks(), watch_outputs=GATE, watch_every=1).last.step == 2


def test_a_full_disk_costs_the_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkwatch.record import RecordWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "append", full)
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="step 4 is not in the record.*No space left"):
        watch = watched(tmp_path, logger=logger, watch_every=4)
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert list(logged["step"][logged["ntk/kernel_angle"].notna()]) == [0, 4, 8, 12]
    assert watch.last.step == 12


def test_a_schedule_that_raises_is_a_warning(tmp_path: Path) -> None:
    def every(step: int) -> bool:
        return bool(1 / (step - 4)) and step % 2 == 0

    with pytest.warns(UserWarning, match="every= at step 4.*ZeroDivisionError"):
        watch = watched(tmp_path, watch_every=every)
    assert steps(watch) == [0, 2, 6, 8, 10, 12], "one step's failure is that step's alone"


class Unfreezes(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(self.trainer.global_step >= 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_parameters_that_are_unfrozen_in_mid_run_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 parameters train now that did not.*net.0.weight") as caught:
        watch = watched(tmp_path, Unfreezes(), watch_every=3)
    assert sum("train now" in str(w.message) for w in caught) == 1
    assert "train now" in watch.last.reasons["taylor_ratio"]
    assert load_run(watch.record).metrics["taylor_ratio"].notna().tolist() == [False, True, False, False, False]


class Prunes(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 4:
            nn.utils.prune.l1_unstructured(self.net[0], "weight", 0.5)


def test_parameters_that_are_pruned_in_mid_run_end_the_watch_by_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="net.0.weight is no longer the parameter that was there"):
        watch = watched(tmp_path, Prunes(), watch_every=3)
    assert steps(watch) == [0, 3]


def test_a_streamed_validation_set(tmp_path: Path) -> None:
    watch = watched(tmp_path, data=[DataLoader(rows(), 16), DataLoader(Stream(), 16)])
    assert watch.last.step == 12


def test_a_library_that_warns_in_a_probe_does_not_end_it_where_warnings_are_errors(tmp_path: Path) -> None:
    def outputs(model: nn.Module, batch: Any) -> Tensor:
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return model(batch[0])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="old")
        assert watched(tmp_path, watch_outputs=outputs).last.step == 12


class Diverges(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 4:
            with torch.no_grad():
                self.net[0].weight.fill_(torch.nan)


def test_a_diverged_run_is_recorded_as_undefined(tmp_path: Path) -> None:
    last = watched(tmp_path, Diverges(), max_steps=8).last
    assert last.step == 8
    assert last.metrics["kernel_angle"] is None
    assert "not finite" in last.reasons["kernel_angle"]


class Wrong(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, None, :]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()


class Untrained(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


CONSTRUCTION: dict[str, tuple[dict[str, Any], str]] = {
    "reduction": ({"reduction": "frace"}, "reduction='frace'.*'trace'"),
    "engine": ({"engine": "quick"}, "engine='quick'.*'auto'"),
    "diagnostics": ({"diagnostics": ["kernel_angel"]}, "kernel_angel.*kernel_angle"),
    "every": ({"every": "often"}, "every"),
    "budget": ({"budget": -1.0}, "budget"),
    "on_error": ({"on_error": "ignore"}, "on_error"),
    "probes": ({"probes": "test"}, "probes"),
    "no diagnostics": ({"diagnostics": []}, r"diagnostics=\[\] would record no number: name at least one"),
    "no diagnostics' names": ({"diagnostics": ()}, "leave it out for the default"),
    "diagnostics' kind": ({"diagnostics": 3}, "diagnostics=3 is not understood"),
    "outputs": ({"outputs": "logits"}, "outputs='logits'.*a callable"),
    "loss": ({"loss": "cross_entropy"}, "loss='cross_entropy'.*a callable"),
    "targets": ({"targets": "labels"}, "targets='labels'.*lambda batch"),
    "hparams": ({"hparams": 3}, "hparams=3.*a mapping"),
    "loggers": ({"loggers": CSVLogger("nowhere")}, "loggers=.*a list of Lightning loggers"),
    "seed": ({"seed": "one"}, "seed='one'.*a whole number"),
    "a seed that no generator takes": ({"seed": 2**64}, "seed=18446744073709551616.*64 bits"),
    "a number as targets": ({"targets": 5}, "targets=5.*a tensor.*lambda batch"),
    "a flag as targets": ({"targets": True}, "targets=True.*a tensor"),
    "a mapping as targets": ({"targets": {}}, "targets={}.*a tensor"),
    "a single number as targets": ({"targets": torch.tensor(5)}, r"targets=tensor\(5\).*a tensor \[n"),
    "no step": ({"every": []}, r"every=\[\] holds no step.*every=\[0\]"),
    "an empty range": ({"every": range(0)}, "holds no step"),
    "resample": ({"resample": "yes"}, "resample='yes'.*True or False"),
    "resample is None": ({"resample": None}, "resample=None.*True or False"),
    "save_kernels": ({"save_kernels": "no"}, "save_kernels='no'.*True or False"),
    "a logger's name": ({"loggers": ["tb"]}, r"loggers=\['tb'\].*a list of Lightning loggers"),
    "a logger's class": ({"loggers": [CSVLogger]}, "loggers=.*a list of Lightning loggers"),
    "loggers by name": ({"loggers": {}}, "loggers={}.*a list of Lightning loggers"),
    "reductions": ({"reduction": ["trace"]}, r"reduction=\['trace'\] is unknown"),
    "resampled tensors": ({"probes": torch.zeros(3, 6), "resample": True}, "resample"),
}


TAKEN: dict[str, dict[str, Any]] = {
    "0-d every": {"every": torch.tensor(5)},
    "numpy's flags": {"resample": np.bool_(True), "save_kernels": np.bool_(False)},
    "targets in a list": {"targets": [0, 1]},
    "targets in an array": {"targets": np.zeros(3)},
    "no loggers": {"loggers": []},
    "a tuple of loggers": {"loggers": (CSVLogger("nowhere"),)},
    "no hparams": {"hparams": {}},
    "a negative seed": {"seed": -1},
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_can_be_read_is_taken_at_construction(case: str) -> None:
    NTKWatch(**TAKEN[case])


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_wrong_arguments_raise_at_construction(case: str) -> None:
    arguments, message = CONSTRUCTION[case]
    with pytest.raises(ValueError, match=message):
        NTKWatch(**arguments)


EXPLICIT: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "probe shape": (
        Classifier,
        {"watch_probes": torch.zeros(4, 5)},
        ValueError,
        "do not fit the model.*last dimension of 6, got.*give probes",
    ),
    "outputs shape": (Wrong, {"watch_probes": torch.zeros(4, 6)}, UnsupportedModel, "outputs="),
    "NaN outputs": (Classifier, {"watch_probes": torch.full((4, 6), torch.nan)}, ValueError, "not finite"),
    "no trained parameters": (Untrained, {"watch_probes": torch.zeros(4, 6)}, UnsupportedModel, "parameter"),
    "targets": (Classifier, {"watch_targets": torch.zeros(5)}, ValueError, "targets"),
}


@pytest.mark.parametrize("case", EXPLICIT)
def test_what_was_passed_explicitly_and_does_not_fit_raises_at_the_start(case: str, tmp_path: Path) -> None:
    model, settings, error, message = EXPLICIT[case]
    with pytest.raises(error, match=message):
        watched(tmp_path, model(), **settings)


@pytest.mark.parametrize("model", [Wrong, Untrained])
def test_zero_configuration_warns_once_and_switches_off(model: Any, tmp_path: Path) -> None:
    watch = NTKWatch()
    with pytest.warns(UserWarning, match="NTKWatch") as caught:
        trainer(tmp_path, watch, max_steps=-1, max_epochs=1).fit(model(), *loaders())
    assert watch.last is None
    assert sum("NTKWatch" in str(w.message) for w in caught) == 1


# ── resampled probes ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_resampling_compares_two_parameters_on_the_same_fresh_inputs(tmp_path: Path) -> None:
    watch = watched(tmp_path, watch_resample=True, watch_every=4)
    run = load_run(watch.record)
    assert run.metrics["kernel_angle"][12] < 0.5, "two draws at one θ would be .5 apart"
    assert watch.last.metrics["kernel_velocity"] is None
    assert "resample" in watch.last.reasons["kernel_velocity"]


# ── BatchNorm ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_batchnorm_gets_a_calibrated_baseline_and_its_statistics_reported_apart(tmp_path: Path) -> None:
    watch = watched(tmp_path, Classifier(norm=True))
    run = load_run(watch.record)
    assert "calibrated" in run.manifest["baseline"]
    assert watch.last.metrics["statistics_angle"] > 0
    assert watch.last.metrics["statistics_shift"] > 0
    assert run.metrics["taylor_ratio"].dropna().between(0, 1).all()


# ── nothing to sum up ─────────────────────────────────────────────────────────────────────────────────────────────────
def _file(path: Path) -> Path:
    (path / "a file").touch()
    return path / "a file" / "below it"


NO_RECORD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "a model that is not measured": ({}, Wrong, "switched off"),
    "fast_dev_run": ({"fast_dev_run": True}, Classifier, "up to step 0 and keeps no record"),
    "no training": ({"limit_train_batches": 0}, Classifier, "at least one training batch"),
    "a folder that cannot be": ({"logger": False, "default_root_dir": _file}, Classifier, "up to step 12"),
}


@pytest.mark.parametrize("case", NO_RECORD)
@pytest.mark.filterwarnings("ignore:NTKWatch")
def test_a_summary_without_a_record_says_why_though_an_earlier_fit_has_one(case: str, tmp_path: Path) -> None:
    settings, model, wanted = NO_RECORD[case]
    watch = watched(tmp_path)
    settings = {k: v(tmp_path) if callable(v) else v for k, v in settings.items()}
    trainer(tmp_path, watch, **settings).fit(model(), *loaders())
    assert watch.record is None, case
    assert wanted in watch.summary(), f"{case}: {watch.summary()}"
