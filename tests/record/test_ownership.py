"""A record has one owner at a time; a dead process owns nothing; a branch is whole and leaves its parent as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ntkwatch.record import (
    DamagedRecord,
    RecordInUse,
    RecordWriter,
    acquire,
    acquire_free,
    branch,
    load_run,
    save_tensors,
)
from ntkwatch.record import ownership as module
from tests.support.record_writers import measurement

FOREIGN = {"machine": "another", "pid": 7, "token": "00", "renewed": 0.0}


def process(folder: Path, then: str = "time.sleep(60)") -> subprocess.Popen[str]:
    """Another process that owns the folder, says so, and then does something."""
    code = "import os, sys, time; from pathlib import Path; from ntkwatch.record import acquire; "
    code += f"owner = acquire(Path({str(folder)!r})); print('owned', flush=True); {then}"
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "owned\n"
    return started


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    started = process(tmp_path / "r")
    yield started
    started.kill()
    started.wait()


def lease(folder: Path, ago: float = 0.0, **changes: Any) -> Path:
    """A lease that another machine has renewed so many seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / module.LEASE).write_text(json.dumps(FOREIGN | {"renewed": time.time() - ago} | changes))
    return folder


def test_a_record_that_a_living_process_owns_is_refused_until_it_is_killed(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(RecordInUse, match="is being written by another run"):
        acquire(tmp_path / "r")
    other.kill()
    other.wait()
    acquire(tmp_path / "r").release()


def test_a_fork_that_outlives_its_parent_owns_nothing(tmp_path: Path) -> None:
    """As the workers of a DataLoader may, for some seconds after kill -9."""
    started = process(tmp_path / "r", "pid = os.fork(); pid and print(pid, flush=True); time.sleep(60)")
    assert started.stdout is not None
    child = int(started.stdout.readline())
    try:
        with pytest.raises(RecordInUse):
            acquire(tmp_path / "r")
        started.kill()
        started.wait()
        acquire(tmp_path / "r").release()
    finally:
        os.kill(child, 9)
        started.stdout.close()


def test_an_owner_gives_back_what_it_owned(tmp_path: Path) -> None:
    first = acquire(tmp_path / "r")
    with pytest.raises(RecordInUse):
        acquire(tmp_path / "r")
    first.release()
    first.release()
    assert not (tmp_path / "r" / module.LEASE).exists()
    acquire(tmp_path / "r").release()


def test_the_first_free_folder_is_claimed(tmp_path: Path) -> None:
    RecordWriter.create(tmp_path / "r", {})
    running = acquire_free(tmp_path / "r")
    beside = acquire_free(tmp_path / "r")
    assert (running.folder.name, beside.folder.name) == ("r-2", "r-3")
    running.release()
    beside.release()
    (tmp_path / "r" / "manifest.json").unlink()
    assert acquire_free(tmp_path / "r").folder.name == "r"


# ── other machines ────────────────────────────────────────────────────────────────────────────────────────────────────
FRESH: dict[str, Any] = {
    "just renewed": {},
    "renewed a while ago": {"ago": module.STALE_SECONDS / 2},
    "a clock that is ahead": {"ago": -module.STALE_SECONDS / 2},
    "another pid": {"pid": os.getpid()},
}
STALE: dict[str, Any] = {
    "not renewed for long": {"ago": 2 * module.STALE_SECONDS},
    "a clock that is far ahead": {"ago": -10 * module.STALE_SECONDS},
    "at the beginning of time": {"renewed": 0.0},
    "this machine, whose lock is free": {"machine": module._machine()},
    "no time": {"renewed": "now"},
    "a time that no float holds": {"renewed": 10**400},
    "no token": {"token": None},
    "no machine": {"machine": ["x"]},
    "a pid that is a flag": {"pid": True},
}


@pytest.mark.parametrize("name", FRESH)
def test_a_lease_that_is_fresh_holds(name: str, tmp_path: Path) -> None:
    folder = lease(tmp_path / "r", **FRESH[name])
    with pytest.raises(RecordInUse, match="another machine"):
        acquire(folder)
    assert acquire_free(folder).folder.name == "r-2", name
    assert json.loads((folder / module.LEASE).read_text())["machine"] == "another", "it was written over"


@pytest.mark.parametrize("name", STALE)
def test_a_lease_that_is_stale_or_makes_no_sense_is_nobodys(name: str, tmp_path: Path) -> None:
    owner = acquire(lease(tmp_path / "r", **STALE[name]))
    assert owner.holds(), name
    owner.release()


@pytest.mark.parametrize("data", [b"", b"[", b"[]", b"\xff", b"[" * 100_000, b"x" * 10_000, b"null"])
def test_a_lease_that_is_no_json_is_nobodys(data: bytes, tmp_path: Path) -> None:
    (tmp_path / module.LEASE).write_bytes(data)
    acquire(tmp_path).release()


def test_a_lease_is_renewed_by_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = acquire(tmp_path)
    begun = json.loads((tmp_path / module.LEASE).read_text())
    owner.renew()
    assert json.loads((tmp_path / module.LEASE).read_text()) == begun, "at most every 30 s"
    clock, wall = time.monotonic(), time.time()
    monkeypatch.setattr(time, "monotonic", lambda: clock + 2 * module.RENEWAL_SECONDS)
    monkeypatch.setattr(time, "time", lambda: wall + 2 * module.RENEWAL_SECONDS)
    owner.renew()
    assert json.loads((tmp_path / module.LEASE).read_text())["renewed"] > begun["renewed"] + module.RENEWAL_SECONDS
    lease(tmp_path)
    monkeypatch.setattr(time, "monotonic", lambda: clock + 4 * module.RENEWAL_SECONDS)
    owner.renew()
    assert not owner.holds()
    owner.release()
    assert json.loads((tmp_path / module.LEASE).read_text())["machine"] == "another", "it is the other's now"


@pytest.mark.parametrize("error", sorted(module.LOCK_UNSUPPORTED))
def test_without_locks_the_lease_alone_decides(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(self: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(module.FileLock, "acquire", no_locks)
    owner = acquire(tmp_path)
    with pytest.raises(RecordInUse, match="on another machine"):
        acquire(tmp_path)
    owner.release()
    acquire(tmp_path).release()


def test_a_disk_that_is_full_is_not_taken_for_one_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.FileLock, "acquire", full)
    with pytest.raises(OSError, match="No space left"):
        acquire(tmp_path)


# ── branches ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Steps 0 to 5, resumed once at 3, with two side files."""
    folder = tmp_path / "a" / "ntkwatch"
    writer = RecordWriter.create(folder, {"hparams": {"lr": 0.1}, "reduction": "trace"})
    for step in range(5):
        writer.append(measurement(step))
    writer = RecordWriter.resume(folder, 3)
    for step in (4, 5):
        writer.append(measurement(step))
    save_tensors(folder, "baseline", {"kernel": measurement(0).kernel})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 9])
def test_a_branch_begins_with_the_shared_part_and_goes_on_alone(step: int, parent: Path, tmp_path: Path) -> None:
    before, whole = files(parent), load_run(parent)
    shared = [s for s in range(6) if s <= step]
    writer = branch(tmp_path / "b" / "ntkwatch", parent, step, {"hparams": {"lr": 0.5}}, ["baseline"])
    run = load_run(tmp_path / "b")
    assert run.steps == shared
    assert run.metrics.equals(whole.metrics.loc[shared])
    assert all(run.kernel(s).equal(whole.kernel(s)) for s in shared)
    assert (run.manifest["hparams"], run.manifest["reduction"]) == ({"lr": 0.5}, "trace")
    assert run.manifest["parent"] == {"record": os.path.join("..", "..", "a", "ntkwatch"), "step": step}
    assert run.manifest["id"] != whole.manifest["id"]
    assert (tmp_path / "b" / "ntkwatch" / "baseline.safetensors").read_bytes() == before["baseline.safetensors"]
    writer.append(measurement(step + 1))
    assert load_run(tmp_path / "b").steps == [*shared, step + 1]
    assert files(parent) == before, "a branch reads its parent and no more"


def test_a_branch_of_a_branch_names_its_own_parent(parent: Path, tmp_path: Path) -> None:
    branch(tmp_path / "b" / "ntkwatch", parent, 4, {}).append(measurement(7))
    branch(tmp_path / "c" / "ntkwatch", tmp_path / "b" / "ntkwatch", 7, {})
    run = load_run(tmp_path / "c")
    assert run.steps == [0, 1, 2, 3, 4, 7]
    assert run.manifest["parent"]["record"] == os.path.join("..", "..", "b", "ntkwatch")


def test_a_branch_is_a_copy_where_files_cannot_be_linked(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    branch(tmp_path / "b", parent, 3, {})
    assert load_run(tmp_path / "b").kernel(3).equal(load_run(parent).kernel(3))


def test_a_branch_that_was_killed_before_its_manifest_is_made_anew(parent: Path, tmp_path: Path) -> None:
    for name in ("snapshots/step_00000000.safetensors", "metrics.jsonl"):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(b"half")
    branch(tmp_path / "b", parent, 2, {})
    assert load_run(tmp_path / "b").steps == [0, 1, 2]


def test_a_damaged_parent_has_no_branches(parent: Path, tmp_path: Path) -> None:
    (parent / "metrics.jsonl").write_bytes((parent / "metrics.jsonl").read_bytes().replace(b"double", b"doubie", 1))
    with pytest.raises(DamagedRecord):
        branch(tmp_path / "b", parent, 2, {})
    assert not (tmp_path / "b" / "manifest.json").exists()


# ── what outlives a power cut ─────────────────────────────────────────────────────────────────────────────────────────
def test_every_byte_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per append: the snapshot before its name is there, its folder, and the index before `append` returns."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name if sys.platform == "linux" else "?"
        done.append("sync " + ("temporary" if name.endswith(".tmp") else name))
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        done.append(f"rename {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    writer = RecordWriter.create(tmp_path / "r", {})
    created, done[:] = list(done), []
    writer.append(measurement(0))
    snapshot = ["sync temporary", "rename step_00000000.safetensors", "sync snapshots", "sync metrics.jsonl"]
    files = ["sync temporary", "rename metrics.jsonl", "sync r", "sync temporary", "rename manifest.json", "sync r"]
    if sys.platform != "linux":  # handles have no names there
        snapshot, files = ([line if line.startswith("rename") else "sync ?" for line in of] for of in (snapshot, files))
    assert done == snapshot
    assert created == files
