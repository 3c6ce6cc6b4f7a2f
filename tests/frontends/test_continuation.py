"""More fits than one: of one Trainer, of one callback, in one log, from one checkpoint.

No curve begins anew unsaid, and no record is written by two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, load_run
from ntkwatch.record import acquire
from tests.support.runs import Classifier, loaders, trainer

SETTINGS: dict[str, Any] = {"probes": 8, "every": 1, "budget": None}


def log(root: Path, version: int = 0) -> CSVLogger:
    return CSVLogger(root, name="", version=version)


def trained(root: Path, watch: NTKWatch, to: int, module: Any = None, **settings: Any) -> tuple[pl.Trainer, Any]:
    torch.manual_seed(0)
    module = Classifier() if module is None else module
    fitted = trainer(root, watch, max_steps=to, **{"logger": log(root), **settings})
    fitted.fit(module, *loaders())
    return fitted, module


def again(fitted: pl.Trainer, module: Any, by: int = 3, data: Any = None) -> list[str]:
    """Another fit of the Trainer, some steps on; what was warned of."""
    fitted.fit_loop.epoch_loop.max_steps = fitted.global_step + by
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fitted.fit(module, *(loaders() if data is None else (data,)))
    return [str(each.message) for each in said if "NTKWatch" in str(each.message)]


def steps(record: Path | None) -> list[int]:
    assert record is not None
    return load_run(record).steps


def shown(folder: Path) -> str:
    command = [sys.executable, "-m", "ntkwatch", "show", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "400"})
    return done.stdout


# ── a second fit that continues ───────────────────────────────────────────────────────────────────────────────────────
class Stumbles(pl.Callback):
    """Raises once, after so many steps."""

    def __init__(self, at: int) -> None:
        self.at: int | None = at

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            self.at = None
            raise ZeroDivisionError


def at_once(fitted: pl.Trainer, module: Any, root: Path) -> None:
    pass


def validated_and_tested(fitted: pl.Trainer, module: Any, root: Path) -> None:
    module.test_step = module.validation_step
    fitted.validate(module, loaders()[1], verbose=False)
    fitted.test(module, loaders()[1], verbose=False)


def saved(fitted: pl.Trainer, module: Any, root: Path) -> None:
    fitted.save_checkpoint(root / "between.ckpt")


def searched_for_a_rate(fitted: pl.Trainer, module: Any, root: Path) -> None:
    module.lr = 0.1
    pl.tuner.Tuner(fitted).lr_find(module, *loaders(), num_training=5, update_attr=False)


def searched_for_a_batch(fitted: pl.Trainer, module: Any, root: Path) -> None:
    module.batch_size = 16
    module.train_dataloader, module.val_dataloader = lambda: loaders(module.batch_size)[0], lambda: loaders()[1]
    pl.tuner.Tuner(fitted).scale_batch_size(module, max_trials=1, steps_per_trial=1)


BETWEEN = [at_once, validated_and_tested, saved, searched_for_a_rate, searched_for_a_batch]


@pytest.mark.parametrize("between", BETWEEN, ids=[each.__name__ for each in BETWEEN])
def test_a_second_fit_continues_the_record(between: Callable[..., None], tmp_path: Path) -> None:
    watch = NTKWatch(**SETTINGS)
    fitted, module = trained(tmp_path, watch, 3)
    first, angle = watch.record, load_run(watch.record).metrics["kernel_angle"]
    between(fitted, module, tmp_path)
    assert again(fitted, module) == []
    run = load_run(tmp_path / "version_0")
    assert (watch.record, run.folder, run.others) == (first, first, [])
    assert run.steps == [0, 1, 2, 3, 4, 5, 6]
    assert run.metrics["kernel_angle"].loc[:3].equals(angle)
    assert run.metrics["kernel_angle"].loc[4] > angle.loc[3] / 2, "against the first K_0"


def test_a_fit_after_an_exception_continues_the_record(tmp_path: Path) -> None:
    watch, module = NTKWatch(**SETTINGS), Classifier()
    fitted = trainer(tmp_path, watch, Stumbles(4), max_steps=9, logger=log(tmp_path))
    with pytest.raises(ZeroDivisionError):
        fitted.fit(module, *loaders())
    fitted.fit(module, *loaders())
    assert steps(tmp_path / "version_0") == list(range(10))


def test_a_second_trainer_in_another_log_begins_with_the_shared_part(tmp_path: Path) -> None:
    watch = NTKWatch(**SETTINGS)
    _, module = trained(tmp_path, watch, 3)
    first = watch.record
    trained(tmp_path, watch, 3, module, logger=log(tmp_path, version=1))
    assert steps(first) == [0, 1, 2, 3]
    run = load_run(tmp_path / "version_1")
    assert run.steps == [0, 1, 2, 3, 4, 5, 6]
    assert run.manifest["parent"] == {"record": os.path.join("..", "..", "version_0", "ntkwatch"), "step": 3}


# ── a second fit that cannot ──────────────────────────────────────────────────────────────────────────────────────────
def frozen(fitted: pl.Trainer, module: Any) -> list[str]:
    module.net[0].requires_grad_(False)
    return again(fitted, module)


def another_model(fitted: pl.Trainer, module: Any) -> list[str]:
    return again(fitted, Classifier())


def another_width(fitted: pl.Trainer, module: Any) -> list[str]:
    module.net[0], module.net[2] = nn.Linear(6, 5), nn.Linear(5, 3)
    return again(fitted, module)


def a_further_layer(fitted: pl.Trainer, module: Any) -> list[str]:
    module.net.append(nn.Linear(3, 3))
    return again(fitted, module)


def other_data(fitted: pl.Trainer, module: Any) -> list[str]:
    data = TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(5)), torch.arange(48) % 3)
    return again(fitted, module, data=DataLoader(data, 16))


OTHERS = {
    frozen: "of other trained parameters",
    another_model: "of another model",
    another_width: "of other trained parameters",
    a_further_layer: "of other trained parameters",
    other_data: "the probes are not those",
}


@pytest.mark.parametrize("other", OTHERS, ids=[each.__name__ for each in OTHERS])
def test_a_fit_of_something_else_has_a_record_of_its_own(other: Callable[..., list[str]], tmp_path: Path) -> None:
    watch = NTKWatch(**SETTINGS)
    fitted, module = trained(tmp_path, watch, 3)
    first = watch.record
    (said,) = other(fitted, module)
    assert watch.record == tmp_path / "version_0" / "ntkwatch-2"
    assert OTHERS[other] in said
    assert str(watch.record) in said
    assert (steps(first), steps(watch.record)) == ([0, 1, 2, 3], [3, 4, 5, 6])
    run = load_run(tmp_path / "version_0")
    assert (run.folder, run.others) == (watch.record, [first])


def test_show_of_a_log_tells_the_newest_record_and_names_the_earlier(tmp_path: Path) -> None:
    watch = NTKWatch(**SETTINGS)
    fitted, module = trained(tmp_path, watch, 3)
    frozen(fitted, module)
    told = shown(tmp_path / "version_0")
    assert "steps 3 to 6" in told
    assert f"The newest of 2 records of this log; earlier: {tmp_path / 'version_0' / 'ntkwatch'}" in told
    assert "steps 0 to 3" in shown(tmp_path / "version_0" / "ntkwatch")
    assert len(load_run(tmp_path).others) == 1, "the log is found from above too"


def test_a_new_callback_in_a_log_that_has_a_record_says_where_its_own_is(tmp_path: Path) -> None:
    trained(tmp_path, NTKWatch(**SETTINGS), 2)
    watch = NTKWatch(**SETTINGS)
    with pytest.warns(UserWarning, match="holds the record of another run .*ntkwatch-2"):
        trained(tmp_path, watch, 3)
    assert (steps(tmp_path / "version_0" / "ntkwatch"), steps(watch.record)) == ([0, 1, 2], [0, 1, 2, 3])


def test_a_fit_in_a_log_of_its_own_warns_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Negative control: folds of a cross-validation, each with a callback and a log."""
    for version in range(2):
        trained(tmp_path, NTKWatch(**SETTINGS), 2, logger=log(tmp_path, version))
    assert [str(each.message) for each in recwarn if "NTKWatch" in str(each.message)] == []


def test_a_callback_that_has_fitted_is_copied_without_its_model(tmp_path: Path) -> None:
    import copy
    import pickle

    watch = NTKWatch(**SETTINGS)
    trained(tmp_path, watch, 2)
    for other in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert other.record == watch.record
        assert other.state_dict()["session"] == {}


# ── resumed from a checkpoint ─────────────────────────────────────────────────────────────────────────────────────────
def resumed(root: Path, checkpoint: Path, to: int, **settings: Any) -> NTKWatch:
    watch = NTKWatch(**SETTINGS)
    torch.manual_seed(1)
    fitted = trainer(root, watch, max_steps=to, **{"logger": log(root), **settings})
    fitted.fit(Classifier(), *loaders(), ckpt_path=checkpoint)
    return watch


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A run of three steps in `base/version_0`, and its checkpoint `a.ckpt`."""
    fitted, _ = trained(tmp_path / "base", NTKWatch(**SETTINGS), 3)
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "base" / "version_0" / "ntkwatch"


def test_two_branches_of_a_checkpoint_share_its_part_and_no_more(base: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    a, b = resumed(tmp_path / "A", tmp_path / "a.ckpt", 8), resumed(tmp_path / "B", tmp_path / "a.ckpt", 5)
    for name, watch, last in (("A", a, 8), ("B", b, 5)):
        run = load_run(watch.record)
        assert run.folder == tmp_path / name / "version_0" / "ntkwatch"
        assert run.steps == list(range(last + 1))
        assert run.metrics.loc[:3].equals(load_run(base).metrics)
        assert (run.folder / run.manifest["parent"]["record"]).resolve() == base.resolve()
        assert run.manifest["parent"]["step"] == 3
    assert before == {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}


def test_the_next_version_of_a_log_holds_the_whole_course(base: Path, tmp_path: Path) -> None:
    watch = resumed(tmp_path / "base", tmp_path / "a.ckpt", 5, logger=log(tmp_path / "base", version=1))
    assert steps(tmp_path / "base" / "version_1") == [0, 1, 2, 3, 4, 5]
    assert watch.record == tmp_path / "base" / "version_1" / "ntkwatch"
    assert steps(base) == [0, 1, 2, 3]


def test_the_same_log_continues_its_record(base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert resumed(tmp_path / "base", tmp_path / "a.ckpt", 5).record == base
    assert steps(base) == [0, 1, 2, 3, 4, 5]
    assert "parent" not in load_run(base).manifest
    assert [str(each.message) for each in recwarn if "NTKWatch" in str(each.message)] == []


def test_a_run_that_came_to_its_end_is_not_shortened(base: Path, tmp_path: Path) -> None:
    resumed(tmp_path / "base", tmp_path / "a.ckpt", 7)
    with pytest.warns(UserWarning, match="went on to step 7 and ended: this run goes on from step 3 in a record"):
        watch = resumed(tmp_path / "base", tmp_path / "a.ckpt", 5)
    assert steps(base) == list(range(8))
    assert watch.record == base.with_name("ntkwatch-2")
    assert steps(watch.record) == [0, 1, 2, 3, 4, 5]


def test_a_record_that_another_run_is_writing_is_branched(base: Path, tmp_path: Path) -> None:
    owner = acquire(base)
    with pytest.warns(UserWarning, match="being written by another run: this run goes on from step 3 in a record"):
        watch = resumed(tmp_path / "base", tmp_path / "a.ckpt", 5)
    owner.release()
    assert (steps(base), steps(watch.record)) == ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5])


def test_a_record_that_was_taken_over_is_not_written_any_more(tmp_path: Path) -> None:
    """As by another machine, after this one was silent for too long."""

    class TakenOver(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                (tmp_path / "version_0" / "ntkwatch" / ".owner.json").write_text(
                    '{"machine": "another", "pid": 1, "token": "theirs", "renewed": 0}'
                )

    watch = NTKWatch(**SETTINGS)
    with pytest.warns(UserWarning, match="another run has taken over .* not recorded from here on") as said:
        trainer(tmp_path, watch, TakenOver(), max_steps=5, logger=log(tmp_path)).fit(Classifier(), *loaders())
    assert steps(tmp_path / "version_0") == [0, 1, 2]
    assert watch.last.step == 5, "the loggers go on"
    assert len([each for each in said if "taken over" in str(each.message)]) == 1


class Meets(pl.Callback):
    """Waits until two runs have a record in the log."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        until = time.monotonic() + 100
        while len(list(self.root.glob("version_0/ntkwatch*/manifest.json"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)


def one_of_two(root: Path) -> None:
    """A run that meets another; prints how many warnings of ours there were, and its record."""
    torch.set_num_threads(1)
    watch = NTKWatch(**SETTINGS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logger = TensorBoardLogger(root, name="", version=0)  # of which two may share a folder
        trainer(root, watch, Meets(root), max_steps=4, logger=logger).fit(Classifier(), *loaders())
    ours = [str(each.message) for each in said if "NTKWatch" in str(each.message)]
    print(*ours, sep="\n", file=sys.stderr)
    print("OUT", len(ours), watch.record)


def test_two_processes_at_once_in_one_log_have_a_record_each(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = sorted(process.communicate(timeout=200)[0].split("OUT ")[1].split() for process in both)
    folder = tmp_path / "version_0" / "ntkwatch"
    assert told == [["0", str(folder)], ["1", str(folder.with_name("ntkwatch-2"))]]
    for _, record in told:
        run = load_run(record)
        assert run.steps == [0, 1, 2, 3, 4]
        assert all(len(run.kernel(step)) == 8 for step in run.steps)


def test_tensorboard_of_one_log_never_falls_back_unsaid(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = NTKWatch(**SETTINGS)
    logger = TensorBoardLogger(tmp_path, name="", version=0)
    fitted, module = trained(tmp_path, watch, 3, logger=logger)
    again(fitted, module)
    events = EventAccumulator(str(tmp_path / "version_0")).Reload().Scalars("ntk/kernel_angle")
    assert [event.step for event in events] == [0, 1, 2, 3, 4, 5, 6]
    assert [event.value == 0 for event in events] == [True] + [False] * 6


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
