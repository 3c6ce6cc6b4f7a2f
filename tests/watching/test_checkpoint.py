"""A checkpoint's state: whatever it holds, training goes on; what can be continued is, also from older versions."""

from __future__ import annotations

import copy
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, load_run
from ntkwatch.watching.checkpoint import VERSION, usable
from tests.support import golden_checkpoints as golden
from tests.support.runs import Classifier, loaders, trainer
from tests.support.trust_observe import digest

SETTINGS: dict[str, Any] = {"probes": 8, "every": 2, "budget": None}
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint at step 4 in `run/a.ckpt`, its record beside it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    torch.manual_seed(0)
    fitted = trainer(folder, NTKWatch(**SETTINGS), max_steps=4)
    fitted.fit(Classifier(), *loaders())
    fitted.save_checkpoint(folder / "a.ckpt")
    return folder


def resumed(root: Path, checkpoint: Path, **settings: Any) -> tuple[NTKWatch, str, list[str]]:
    """A run to step 6 from the checkpoint: its watch, a digest of its last weights, and what was warned of."""
    watch = NTKWatch(**{**SETTINGS, **settings})
    module = Classifier()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        trainer(root, watch, max_steps=6).fit(module, *loaders(), ckpt_path=checkpoint)
    ours = [str(each.message) for each in said if "NTKWatch" in str(each.message)]
    return watch, digest(module.state_dict()), ours


def with_state(saved: Path, target: Path, change: Change) -> Path:
    """The checkpoint with another state of ours."""
    checkpoint = torch.load(saved / "a.ckpt", weights_only=True)
    state = copy.deepcopy(checkpoint["callbacks"]["NTKWatch"])
    changed = change(state)
    checkpoint["callbacks"]["NTKWatch"] = state if changed is None else changed
    torch.save(checkpoint, target)
    return target


def without(*path: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return change


def having(value: Any, *path: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return change


UNUSABLE: dict[str, Change] = {
    **{f"lacks {name}": without(name) for name in ("step", "schedule", "grid", "values", "session")},
    **{f"lacks session.{name}": without("session", name) for name in ("record", "probe_hash")},
    **{f"version {v!r}": having(v, "version") for v in (VERSION + 1, "1", True, -1, 2**70, None, 1.0)},
    **{f"step {v!r}": having(v, "step") for v in ("4", True, -1, math.nan, 2**70, None, [4])},
    **{f"is {v!r}": lambda state, v=v: v for v in ([1], "text", 7, (1, 2))},  # type: ignore[misc]
    **{f"session {v!r}": having(v, "session") for v in ([1], "text", 7, None)},
    **{f"schedule {v!r}": having(v, "schedule") for v in (None, [], "x")},
    **{f"schedule.{k} {v!r}": having(v, "schedule", k) for k, v in (
        ("costs", ["x"]), ("costs", None), ("costs", [math.nan]), ("level", 10**9), ("level", "x"), ("seen", None),
        ("elapsed", math.inf), ("spent", -1.0), ("first", "0"), ("last_fired", 2.5),
    )},
    **{f"values {v!r}": having(v, "values") for v in (None, [1], {"ntk/a": "x"}, {"ntk/a": math.nan}, {1: 1.0})},
    **{f"record {v!r:.20}": having(v, "session", "record") for v in (7, "", "a\0b", "x" * 10_000, None, ["x"])},
    **{f"probe_hash {v!r}": having(v, "session", "probe_hash") for v in (None, 7, "")},
    **{f"previous_step {v!r}": having(v, "session", "previous_step") for v in ("x", -1, True)},
    **{f"previous_kernel {name}": having(v, "session", "previous_kernel") for name, v in (
        ("list", [[1.0]]), ("whole numbers", torch.eye(8).long()), ("sparse", torch.eye(8).to_sparse()),
        ("meta", torch.empty(8, 8, device="meta")), ("NaN", torch.full((8, 8), math.nan)),
    )},
    **{f"forecast {v!r}": having(v, "session", "forecast") for v in ([1], {"name": 7}, "x")},
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_state_that_is_not_one_is_told_so_in_one_sentence(name: str, saved: Path) -> None:
    state = torch.load(saved / "a.ckpt", weights_only=True)["callbacks"]["NTKWatch"]
    changed = UNUSABLE[name](state)
    with pytest.raises(ValueError, match=r"^(it|its) ") as caught:
        usable(state if changed is None else changed)
    assert len(str(caught.value)) < 200, name


STARTS_ANEW: dict[str, Change] = {
    **{name: UNUSABLE[name] for name in (
        "lacks step", "lacks session", "version 2", "is [1]", "schedule.costs ['x']", "previous_kernel meta",
    )},
    "a kernel of another shape": having(torch.eye(3).double(), "session", "previous_kernel"),
    "a kernel that the record lacks": lambda state: state["session"].update(previous_kernel=None, previous_step=3),
    "a record that is a device": having("/dev/zero", "session", "record"),
    "a record that is a file": having(__file__, "session", "record"),
    "another run's record": having("0" * 16, "session", "id"),
    "other probes": having("0" * 64, "session", "probe_hash"),
}  # fmt: skip


def everything(record: Path) -> dict[str, bytes]:
    return {str(p.relative_to(record)): p.read_bytes() for p in sorted(record.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", STARTS_ANEW)
def test_a_run_trains_on_and_starts_anew_whatever_the_state_holds(name: str, saved: Path, tmp_path: Path) -> None:
    _, weights, _ = resumed(tmp_path / "usual", shutil.copytree(saved, tmp_path / "run") / "a.ckpt")
    before = everything(saved)
    watch, found, said = resumed(tmp_path, with_state(saved, tmp_path / "b.ckpt", STARTS_ANEW[name]))
    assert found == weights, f"{name}: another training"
    assert load_run(watch.record).steps == [4, 6], name
    assert everything(saved) == before, f"{name}: the earlier record was written into"
    assert len(said) == 1, f"{name}: {said}"
    assert "anew" in said[0] or ("cannot be continued" in said[0] and str(watch.record) in said[0]), said


def test_a_state_of_today_is_continued(saved: Path, tmp_path: Path) -> None:
    """Negative control of the tests above."""
    moved = shutil.copytree(saved, tmp_path / "run")
    watch, _, said = resumed(tmp_path / "run", moved / "a.ckpt")
    assert load_run(watch.record).steps == [0, 2, 4, 6]
    assert said == []
    state = torch.load(saved / "a.ckpt", weights_only=True)["callbacks"]["NTKWatch"]
    assert state["version"] == VERSION


# ── older versions ────────────────────────────────────────────────────────────────────────────────────────────────────
GOLDEN = sorted(golden.HERE.iterdir())


@pytest.mark.parametrize("folder", GOLDEN, ids=[folder.name for folder in GOLDEN])
def test_a_golden_checkpoint_is_continued(folder: Path, tmp_path: Path) -> None:
    """Its record was made elsewhere and lies beside the checkpoint now."""
    kept = shutil.copytree(folder, tmp_path / "kept")
    before = load_run(kept / "ntkwatch")
    checkpoint = tmp_path / "kept" / "whole.ckpt"
    golden.fit(tmp_path / "first", NTKWatch(probes=4, budget=None), golden.SAVED_AT).save_checkpoint(checkpoint)
    whole = torch.load(checkpoint, weights_only=True)
    whole["callbacks"]["NTKWatch"] = torch.load(kept / "state.ckpt", weights_only=True)["callbacks"]["NTKWatch"]
    torch.save(whole, checkpoint)
    watch = golden.watched()
    golden.fit(tmp_path / "rest", watch, golden.END, checkpoint)
    after = load_run(watch.record)
    assert watch.record == kept / "ntkwatch"
    assert (before.steps, after.steps) == ([0, 2, 4], [0, 2, 4, 6, 8])
    assert after.metrics.loc[[0, 2, 4]].equals(before.metrics)
    assert 0 < after.metrics["kernel_angle"][4] < after.metrics["kernel_angle"][8], "against the K_0 of the record"
    assert after.metrics["kernel_velocity"].loc[6] > 0, "against the last kernel of the state"


# ── a record that has moved ───────────────────────────────────────────────────────────────────────────────────────────
def moved_with_its_folder(run: Path, root: Path) -> Path:
    return shutil.move(run, root / "elsewhere") / "a.ckpt"


def copied_and_the_original_left(run: Path, root: Path) -> Path:
    return shutil.copytree(run, root / "copy") / "a.ckpt"


def checkpoint_in_a_folder_below(run: Path, root: Path) -> Path:
    moved = shutil.move(run, root / "elsewhere")
    (moved / "checkpoints").mkdir()
    return (moved / "a.ckpt").rename(moved / "checkpoints" / "a.ckpt")


def through_a_link(run: Path, root: Path) -> Path:
    shutil.move(run, root / "disk")
    (root / "link").symlink_to(root / "disk")
    return root / "link" / "a.ckpt"


MOVES = [moved_with_its_folder, copied_and_the_original_left, checkpoint_in_a_folder_below, through_a_link]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of its own, to be moved: as `saved`, at its own path."""
    folder = tmp_path / "run"
    torch.manual_seed(0)
    fitted = trainer(folder, NTKWatch(**SETTINGS), max_steps=4)
    fitted.fit(Classifier(), *loaders())
    fitted.save_checkpoint(folder / "a.ckpt")
    return folder


@pytest.mark.parametrize("move", MOVES, ids=[move.__name__ for move in MOVES])
def test_a_record_is_found_where_it_was_moved_with_its_checkpoint(
    move: Callable[[Path, Path], Path], run: Path, tmp_path: Path
) -> None:
    checkpoint = Path(move(run, tmp_path))
    before = everything(run) if run.exists() else None
    watch, _, said = resumed(tmp_path / "rest", checkpoint)
    assert load_run(watch.record).steps == [0, 2, 4, 6], said
    with_it = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    assert os.path.realpath(watch.record).startswith(os.path.realpath(with_it))
    assert before is None or everything(run) == before, "the original was written into"


def test_a_record_is_found_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path / "a")
        first = trainer(Path("runs"), NTKWatch(**SETTINGS), max_steps=4, logger=pl.loggers.CSVLogger("logs", version=0))
        first.fit(Classifier(), *loaders())
        first.save_checkpoint(tmp_path / "a.ckpt")
    watch, _, said = resumed(tmp_path / "rest", tmp_path / "a.ckpt")
    assert load_run(watch.record).steps == [0, 2, 4, 6], said


def test_a_folder_that_another_run_has_taken_is_not_written_into(run: Path, tmp_path: Path) -> None:
    """The record was thrown away, and another run has started in its place."""
    checkpoint = (run / "a.ckpt").rename(tmp_path / "a.ckpt")
    record = next((run / "ntkwatch").iterdir())
    shutil.rmtree(record)
    other = NTKWatch(**SETTINGS)
    trainer(tmp_path / "other", other, max_steps=10).fit(Classifier(), *loaders())
    shutil.move(other.record, record)
    before = everything(record)
    watch, _, said = resumed(tmp_path / "rest", checkpoint)
    assert everything(record) == before
    assert load_run(watch.record).steps == [4, 6]
    assert "holds the record of another run now" in said[0]


LOSSES = {
    "a snapshot is lost": lambda record: (record / "snapshots" / "step_00000002.safetensors").unlink(),
    "the index is lost": lambda record: (record / "metrics.jsonl").unlink(),
    "the baseline is lost": lambda record: (record / "baseline.safetensors").unlink(),
    "the baseline is another's": lambda record: shutil.copy(
        record / "snapshots" / "step_00000002.safetensors", record / "baseline.safetensors"
    ),
    "the manifest is a folder": lambda record: (
        (record / "manifest.json").unlink(),
        (record / "manifest.json").mkdir(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_damaged_record_is_left_as_it_is_and_a_whole_new_one_starts(name: str, run: Path, tmp_path: Path) -> None:
    record = next((run / "ntkwatch").iterdir())
    LOSSES[name](record)
    before = everything(record)
    watch, _, said = resumed(tmp_path / "rest", run / "a.ckpt")
    assert load_run(watch.record).steps == [4, 6], name
    assert load_run(watch.record).metrics["kernel_angle"][4] == 0, name
    assert len(said) == 1, said
    assert "cannot be continued" in said[0]
    assert everything(record) == before, name


def test_a_warning_cannot_steer_a_terminal(saved: Path, tmp_path: Path) -> None:
    def hostile(state: dict[str, Any]) -> None:
        state["session"].update(record="/tmp/\x1b]0;owned\x07\x1b[2J", id="nobody's")

    _, _, said = resumed(tmp_path, with_state(saved, tmp_path / "b.ckpt", hostile))
    assert len(said) == 1
    assert said[0].isprintable(), said


def test_other_data_is_never_compared_with_the_first_kernel(saved: Path, tmp_path: Path) -> None:
    """The probes' hash: the checkpoint's own training set is gone, the labels' classes are the same."""
    checkpoint = shutil.copytree(saved, tmp_path / "run") / "a.ckpt"
    x, y = torch.randn(96, 6, generator=torch.Generator().manual_seed(9)), torch.arange(96) % 3
    watch = NTKWatch(**SETTINGS)
    with pytest.warns(UserWarning, match="the probes are not those of .*a new one starts at step 4"):
        trainer(tmp_path, watch, max_steps=6).fit(
            Classifier(), DataLoader(TensorDataset(x, y), 16), ckpt_path=checkpoint
        )
    assert load_run(watch.record).steps == [4, 6]
    assert load_run(watch.record).metrics["kernel_angle"][4] == 0
