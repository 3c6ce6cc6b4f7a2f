"""The record: what was appended is read back bit for bit, at any time, or an error says what is wrong and where."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ntkwatch.record import (
    Measurement,
    RecordError,
    RecordWriter,
    Run,
    TensorStore,
    find_runs,
    load_run,
    load_tensors,
    safe_name,
    save_tensors,
)
from ntkwatch.record import format as record_format
from tests.support import ROOT, SUPPORT
from tests.support.record_writers import measurement

N, C = 5, 3


def case(step: int = 0, *, shape: tuple[int, ...] = (N, N), **changes: Any) -> Measurement:
    generator = torch.Generator().manual_seed(step + 7)
    kernel = torch.randn(shape, dtype=torch.float64, generator=generator)
    fields: dict[str, Any] = {
        "step": step,
        "metrics": {"kernel_angle": step / 3, "taylor_ratio": None},
        "reasons": {"taylor_ratio": "no motion yet"},
        "kernel": kernel,
        "layers": {"net.0.weight": torch.randn(N, N, dtype=torch.float64, generator=generator)},
        "eigenvalues": torch.randn(N, dtype=torch.float64, generator=generator).sort(descending=True).values,
        "seconds": 0.25,
        "layer_metrics": {"net.0": {"share": 0.1, "angle": None}},
        "context": {"reduction": "trace", "probe_hash": "ab", "noise_floor": 1e-12, "chunks": 2, "calibrated": False},
    }
    return Measurement(**(fields | changes))


CASES = {
    "trace": case(),
    "blocks": case(shape=(C, N, N)),
    "full": case(shape=(N, C, N, C)),
    "outputs": case(outputs=torch.randn(N, C)),
    "step, epoch": case(12, global_step=24, epoch=3),
    "no layers, no metrics": case(layers={}, metrics={}, reasons={}, layer_metrics={}),
    "names with dots, slashes, spaces, Greek": case(
        layers={"a.b/c ../δ": torch.eye(N).double(), "": torch.ones(N, N).double()}, layer_metrics={"": {"θ": 1.5}}
    ),
    "extreme numbers": case(
        metrics={"tiny": 5e-324, "huge": 1.7e308, "negative zero": -0.0, "third": 1 / 3}, reasons={}
    ),
    "a kernel that shares memory with its layer": case(kernel=torch.eye(N).double().expand(N, N)),
    "a kernel that is not contiguous": case(kernel=torch.arange(N * N).double().reshape(N, N).T),
    "a kernel that holds NaN": case(kernel=torch.full((N, N), math.nan).double()),
    "a step beyond eight digits": case(123_456_789),
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader sees does not depend on fsync; the processes that are killed below do call it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record of steps 0 to 5, resumed once from step 3."""
    folder = tmp_path / "version_0" / "ntkwatch"
    writer = RecordWriter.create(folder, {"hparams": {"width": 64}, "parameters": ["net.0.weight"]})
    for step in range(5):
        writer.append(case(step))
    writer = RecordWriter.resume(folder, 3)
    for step in (4, 5):
        writer.append(case(step, metrics={"kernel_angle": 10.0 + step}, reasons={}))
    return folder


def same(a: Measurement, b: Measurement) -> bool:
    return all(
        (torch.equal(x.nan_to_num(7), y.nan_to_num(7)) and x.dtype == y.dtype)
        if isinstance(x := getattr(a, field.name), Tensor) and isinstance(y := getattr(b, field.name), Tensor)
        else repr(_tensors_as_lists(x)) == repr(_tensors_as_lists(getattr(b, field.name)))
        for field in dataclasses.fields(Measurement)
    )


def _tensors_as_lists(value: Any) -> Any:
    return {k: _tensors_as_lists(v) for k, v in value.items()} if isinstance(value, dict) else value


# ── round trip ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", CASES)
def test_what_is_appended_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    RecordWriter.create(tmp_path / "r", {}).append(CASES[name])
    run = load_run(tmp_path / "r")
    assert run.steps == [CASES[name].step], name
    assert same(run.measurement(CASES[name].step), CASES[name]), name


def test_metrics_are_a_frame_by_step_with_nan_where_a_reason_stands(record: Path) -> None:
    run = load_run(record)
    assert run.metrics.index.name == "step"
    assert list(run.metrics.index) == run.steps == [0, 1, 2, 3, 4, 5]
    assert list(run.metrics["kernel_angle"]) == [0, 1 / 3, 2 / 3, 1, 14, 15]
    assert run.metrics["taylor_ratio"].isna().all()
    assert run.reasons[0] == {"taylor_ratio": "no motion yet"}
    assert run.layer_metrics["net.0"]["share"].tolist() == [0.1] * 6
    assert run.layer_metrics["net.0"]["angle"].isna().all()
    assert run.probes["seconds"].tolist() == [0.25] * 6
    assert run.context(5)["probe_hash"] == "ab"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(math.nan)])
def test_a_value_that_is_not_finite_is_written_as_null_with_a_reason(value: Any, tmp_path: Path) -> None:
    RecordWriter.create(tmp_path, {}).append(case(metrics={"bad": value, "good": 1.0}, reasons={}))
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["metrics"] == {"bad": None, "good": 1.0}
    assert "nan" in line["reasons"]["bad"] or "inf" in line["reasons"]["bad"]


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    odd = dataclasses.replace(case(metrics={"a": np.float32(0.5), "b": torch.tensor(0.25), "c": 3}), step=np.int64(3))
    RecordWriter.create(tmp_path, {"hparams": {"width": np.int64(8), "lr": torch.tensor(0.5)}}).append(odd)
    run = load_run(tmp_path)
    assert dict(run.metrics.loc[3]) == {"a": 0.5, "b": 0.25, "c": 3.0}
    assert run.manifest["hparams"] == {"width": 8, "lr": 0.5}


def test_hparams_of_any_kind_become_text(tmp_path: Path) -> None:
    odd = {"path": Path("a/b"), "inf": math.inf, "set": {1}, "nested": {"f": len, 3: (1, None)}, "yes": True}
    RecordWriter.create(tmp_path, {"hparams": odd})
    hparams = load_run(tmp_path).manifest["hparams"]
    assert hparams == {"path": "a/b", "inf": "inf", "set": [1], "nested": {"f": str(len), "3": [1, None]}, "yes": True}


def test_as_flat_holds_what_is_defined_under_the_names_that_loggers_see() -> None:
    m = case(
        metrics={"kernel_angle": 0.5, "nothing": None, "nan": math.nan, "inf": math.inf},
        layer_metrics={"net.0": {"share": 0.25, "angle": None}, "": {"share": 0.75}},
    )
    assert m.as_flat() == {"ntk/kernel_angle": 0.5, "ntk_layers/net.0/share": 0.25, "ntk_layers/model/share": 0.75}


def test_without_kernels_eigenvalues_and_outputs_remain(tmp_path: Path) -> None:
    m = case(outputs=torch.ones(N, C))
    RecordWriter.create(tmp_path, {}).append(m, save_kernels=False)
    run = load_run(tmp_path)
    assert torch.equal(run.eigenvalues(0), m.eigenvalues)
    assert torch.equal(run.outputs(0), torch.ones(N, C))
    for read in (run.kernel, run.layers, run.measurement):
        with pytest.raises(RecordError, match=r"no kernel at step 0; .*save_kernels=True"):
            read(0)


def test_a_run_has_the_width_of_its_hyperparameters(tmp_path: Path) -> None:
    table: list[tuple[Any, float | None]] = [
        ({"width": 64}, 64),
        ({"hidden_size": 128, "lr": 0.1}, 128),
        ({"model": {"d_model": 32}}, 32),
        ({"width": 16, "hidden_size": 8}, 16),
        ({"hidden": [512, 512]}, 512),
        ({"hidden": [512, 256]}, None),
        ({"width": True}, None),
        ({"width": "wide"}, None),
        ({"in_channels": 3, "depth": 2}, None),
        ({}, None),
        (None, None),
    ]
    for number, (hparams, width) in enumerate(table):
        RecordWriter.create(tmp_path / str(number), {"hparams": hparams})
        assert load_run(tmp_path / str(number)).width == width, hparams


def test_the_manifest_is_updated_whole(record: Path) -> None:
    writer = RecordWriter.resume(record, 5)
    writer.update_manifest(finished=True, hparams={"width": 128})
    manifest = load_run(record).manifest
    assert manifest["finished"] is True
    assert manifest["hparams"] == {"width": 128}
    assert manifest["parameters"] == ["net.0.weight"]
    assert manifest["schema"] == 1


# ── create, resume ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_another_runs_record_is_never_written_into(record: Path) -> None:
    before = {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="already holds the record of a run"):
        RecordWriter.create(record, {})
    assert before == {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}


def test_a_resumed_run_drops_what_came_after_its_checkpoint(record: Path) -> None:
    RecordWriter.resume(record, 1)
    assert load_run(record).steps == [0, 1]
    RecordWriter.resume(record, 0).append(case(3))
    assert load_run(record).steps == [0, 3]


def test_a_reader_that_holds_an_index_still_reads_its_kernels_after_a_resume(record: Path) -> None:
    held = load_run(record)
    kernels = {step: held.kernel(step) for step in held.steps}
    writer = RecordWriter.resume(record, 0)
    for step in range(1, 6):
        writer.append(case(step, shape=(C, N, N)))
    assert all(torch.equal(held.kernel(step), kernel) for step, kernel in kernels.items())
    assert load_run(record).kernel(5).shape == (C, N, N)


def test_a_resumed_record_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = RecordWriter.create(tmp_path / "whole", {})
    for step in range(6):
        whole.append(case(step))
    for cut in range(6):
        broken = RecordWriter.create(tmp_path / str(cut), {})
        for step in range(cut + 1):
            broken.append(case(step))
        broken = RecordWriter.resume(tmp_path / str(cut), max(cut - 1, 0))
        for step in range(max(cut - 1, 0) + 1, 6):
            broken.append(case(step))
        a, b = load_run(tmp_path / "whole"), load_run(tmp_path / str(cut))
        assert a.metrics.equals(b.metrics), cut
        assert all(same(a.measurement(step), b.measurement(step)) for step in a.steps), cut


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="counts from 0, got -1"):
        RecordWriter.create(tmp_path, {}).append(case(-1))


def test_left_over_temporary_files_are_swept_on_resume(record: Path) -> None:
    for path in (record / ".manifest.json.abc.tmp", record / "snapshots" / ".step_00000009.safetensors.x.tmp"):
        path.write_bytes(b"half")
    RecordWriter.resume(record, 5)
    assert not list(record.rglob(".*.tmp"))


def test_files_have_the_permissions_of_any_other_file(record: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    wanted = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in record.rglob("*") if path.is_file()} == {wanted}


# ── a line cut short, a disk that is full ─────────────────────────────────────────────────────────────────────────────
def test_a_last_line_cut_at_any_byte_is_passed_over_and_then_mended(record: Path) -> None:
    index = record / "metrics.jsonl"
    data = index.read_bytes()
    begin = data.rfind(b"\n", 0, -1) + 1
    for end in {*range(begin, len(data), 9), len(data) - 2, len(data) - 1}:
        index.write_bytes(data[:end])
        whole = end == len(data) - 1  # only its newline is missing
        assert load_run(record).steps == [0, 1, 2, 3, 4, *([5] if whole else [])], end
        RecordWriter.resume(record, 5).append(case(6))
        assert load_run(record).steps == [0, 1, 2, 3, 4, *([5] if whole else []), 6], end
        assert index.read_bytes().startswith(data[:begin]), end


def test_a_cut_line_is_mended_by_the_same_writer_too(record: Path) -> None:
    writer = RecordWriter.resume(record, 5)
    with (record / "metrics.jsonl").open("ab") as file:
        file.write(b'{"crc":"0000')
    writer.append(case(6))
    writer.append(case(7))
    assert load_run(record).steps == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("where", ["os.write", "os.fsync", "os.replace"])
def test_a_full_disk_raises_oserror_and_leaves_the_record_readable(
    where: str, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RecordWriter.resume(record, 5)

    def full(*args: Any) -> int:
        if where == "os.write":
            real_write(args[0], args[1][: len(args[1]) // 2])
        raise OSError(28, "No space left on device")

    real_write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(OSError, match="No space left"):
            writer.append(case(6))
    assert load_run(record).steps == [0, 1, 2, 3, 4, 5], where
    writer.append(case(7))
    assert load_run(record).steps == [0, 1, 2, 3, 4, 5, 7], where
    assert not list(record.rglob(".*.tmp")), where


def test_a_short_write_is_undone(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter.resume(record, 5)
    before = (record / "metrics.jsonl").read_bytes()
    real_write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda handle, data: real_write(handle, data[:10]))
        with pytest.raises(OSError, match=r"only \d+ of \d+ bytes were written"):
            writer.append(case(6))
    assert (record / "metrics.jsonl").read_bytes() == before


def kills(folder: Path, number: int, seed: int) -> None:
    command = [sys.executable, str(SUPPORT / "record_writers.py"), "kill", str(folder), str(number), str(seed)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert len(rows) == number
    assert not any(row["wrong"] for row in rows), "wrong numbers after a kill"
    assert all(row["steps"] for row in rows), "a step is missing"
    lost = [row for row in rows if row["last"] < row["told"]]
    assert not lost, f"{len(lost)} of {number} kills lost a step whose append had returned: {lost[:3]}"
    print(f"{number} kills, 0 corrupt, 0 lost of {rows[-1]['last']} appended")


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_kill_9_at_a_random_time_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    kills(tmp_path / "r", 8, seed=1)


@pytest.mark.soak
def test_300_kills(tmp_path: Path) -> None:
    for batch in range(6):
        kills(tmp_path / str(batch), 50, seed=batch)


# ── reading while writing ─────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    command = [sys.executable, str(SUPPORT / "record_writers.py"), "write", str(root)]
    with subprocess.Popen(command, cwd=ROOT, env=_environment()) as process:
        try:
            while not list(root.glob("*/ntkwatch/manifest.json")):
                assert process.poll() is None, "the writer has died"
            yield
            assert process.poll() is None, "the writer has died"
        finally:
            process.kill()


def reads(root: Path, number: int) -> None:
    """Read the newest record again and again; every state must be one that the writer made."""
    seen = set()
    with writing(root):
        for i in range(number):
            newest = max(
                root.glob("*/ntkwatch/manifest.json"), key=lambda path: int(path.parts[-3].split("_")[1])
            ).parent
            run = load_run(newest)
            assert run.steps == list(range(len(run.steps)))
            assert not run.steps or run.metrics["double"].tolist() == [2.0 * step for step in run.steps]
            assert run.manifest.get("written", -1) <= 59
            if run.steps and i % 10 == 0:
                assert run.kernel(run.steps[-1])[0, 0] == run.steps[-1] + 1
            seen.add((newest.parent.name, len(run.steps)))
    print(f"{number} reads of {len(seen)} states, 0 torn")
    assert len(seen) > min(number, 10_000) / 100, "the writer hardly moved: nothing was tested"


def test_a_reader_never_sees_a_torn_state(tmp_path: Path) -> None:
    reads(tmp_path, 1000)


@pytest.mark.soak
def test_30_000_reads_while_a_run_writes(tmp_path: Path) -> None:
    reads(tmp_path, 30_000)


# ── corruption ────────────────────────────────────────────────────────────────────────────────────────────────────────
def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def replace(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at + 1 :]


def delete(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 40) :]


def zero(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + b"\0" * min(512, len(data) - at) + data[at + 512 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def drop_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def double_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"".join(lines)


def digits(data: bytes, rng: random.Random) -> bytes:
    """The change that would hurt most: a digit for a digit."""
    places = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    at = rng.choice(places)
    return data[:at] + str((int(chr(data[at])) + 1) % 10).encode() + data[at + 1 :]


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip, replace, delete, zero, truncate, drop_line, double_line, digits,
]  # fmt: skip


def everything(run: Run) -> tuple[str, dict[int, str]]:
    """The manifest, and each step's measurement, as text."""
    rows = {step: repr([_listed(value) for value in vars(run.measurement(step)).values()]) for step in run.steps}
    return repr(run.manifest), rows


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def states(record: Path) -> list[dict[int, str]]:
    """What the record held after each of its lines: the states that cutting whole lines off its end may bring back."""
    index = record / "metrics.jsonl"
    data = index.read_bytes()
    held = []
    for end in [0, *(i + 1 for i, byte in enumerate(data) if byte == ord("\n"))]:
        index.write_bytes(data[:end])
        held.append(everything(load_run(record))[1])
    return held


def mutate(record: Path, number: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    manifest, _ = everything(load_run(record))
    allowed = states(record)
    files = sorted(path for path in record.rglob("*") if path.is_file())
    counts = {"error": 0, "unharmed": 0, "cut": 0}
    for i in range(number):
        path, mutation = files[i % len(files)], rng.choice(MUTATIONS)
        original = path.read_bytes()
        mutated = mutation(original, rng)
        path.write_bytes(mutated)
        name = f"{mutation.__name__} of {path.name}, number {i}"
        try:
            found, rows = everything(load_run(record))
            assert found == manifest, f"{name}: another manifest"
            assert rows in allowed, f"{name}: wrong data"
            counts["unharmed" if rows == allowed[-1] else "cut"] += 1
        except RecordError as error:
            assert_helpful(error, record)
            counts["error"] += 1
        finally:
            path.write_bytes(original)
    print(f"{number} mutations: {counts}, 0 wrong data")
    return counts


def assert_helpful(error: RecordError, folder: Path) -> None:
    """One sentence that names the place and says what to do."""
    text = str(error)
    assert str(folder) in text, text
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert any(word in text for word in ("restore", "pass ", "install", "record the run", "its steps are")), text


def test_a_changed_byte_is_an_error_and_never_a_number(record: Path) -> None:
    counts = mutate(record, 200, seed=3)
    assert counts["error"] > 120, counts


@pytest.mark.soak
def test_2000_mutations(record: Path) -> None:
    mutate(record, 2000, seed=4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: lines[:2] + lines[3:], r"metrics\.jsonl, line 3 .*lines are missing"),
        (lambda lines: lines[:2] + lines[1:], r"metrics\.jsonl, line 3 .*lines are missing or doubled"),
        (lambda lines: [*lines[:3], b"{}\n", *lines[4:]], r"metrics\.jsonl, line 4 is damaged: it does not begin"),
        (lambda lines: [*lines[:1], lines[1].replace(b"0.3", b"0.4"), *lines[2:]], r"line 2 .*checksum differs"),
    ],
)
def test_a_damaged_line_is_named_with_what_to_do(change: Callable[..., Any], match: str, record: Path) -> None:
    index = record / "metrics.jsonl"
    index.write_bytes(b"".join(change(index.read_bytes().splitlines(keepends=True))))
    with pytest.raises(RecordError, match=match + r".*; restore the file from a copy, or cut it before that line"):
        load_run(record)
    with pytest.raises(RecordError, match=match):
        RecordWriter.resume(record, 3)


FORGED = {
    "step is text": {"step": "1"},
    "step is negative": {"step": -1},
    "metrics is a list": {"metrics": [1]},
    "a metric is text": {"metrics": {"a": "1"}},
    "a metric is true": {"metrics": {"a": True}},
    "no reasons": {"reasons": None},
    "a reason is a number": {"reasons": {"a": 1}},
    "no snapshot": {"snapshot": None},
    "layer metrics are flat": {"layer_metrics": {"a": 1.0}},
    "context is missing": {"context": None},
    "seconds are text": {"seconds": "1"},
    "resumed_at is text": {"resumed_at": "x"},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_line_with_a_right_checksum_and_wrong_content_is_refused(name: str, record: Path) -> None:
    lines = (record / "metrics.jsonl").read_bytes().splitlines()
    body = record_format.decode_line(lines[0]) | FORGED[name]
    (record / "metrics.jsonl").write_bytes(record_format.encode_line(body))
    with pytest.raises(RecordError, match=r"line 1 is damaged: its \w+"):
        load_run(record)


def test_depth_and_size_that_break_parsers_are_errors(record: Path) -> None:
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"\xff\xfe", b"null", b""):
        (record / "manifest.json").write_bytes(text)
        with pytest.raises(RecordError, match=r"manifest\.json"):
            load_run(record)


def test_a_newer_schema_asks_for_its_own_version(record: Path) -> None:
    manifest = record_format.read_manifest(record)
    record_format.write_manifest(record, manifest | {"schema": 2})
    with pytest.raises(RecordError, match=r"schema 2, this ntkwatch reads 1 to 1; install the ntkwatch that wrote it"):
        load_run(record)


# ── finding records ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_record_is_found_at_its_folder_and_at_its_parents(record: Path, tmp_path: Path) -> None:
    for path in (record, record.parent, tmp_path, str(record), str(record) + "/"):
        assert load_run(path).steps == [0, 1, 2, 3, 4, 5], path


def test_runs_are_found_in_the_order_given_each_once_numbers_as_numbers(record: Path, tmp_path: Path) -> None:
    for number in (1, 2, 10):
        shutil.copytree(record.parent, tmp_path / f"version_{number}")
    (tmp_path / "version_3").mkdir()  # a run that was not watched
    folders = [tmp_path / f"version_{number}" / "ntkwatch" for number in (0, 1, 2, 10)]
    assert find_runs([tmp_path]) == folders
    assert find_runs([tmp_path / "version_2", tmp_path]) == [folders[2], folders[0], folders[1], folders[3]]
    for number in (7, 8):  # where a logger has no folder of its own: <save_dir>/ntkwatch/<id>/
        shutil.copytree(record, tmp_path / "wandb" / "ntkwatch" / f"id{number}")
    assert [folder.name for folder in find_runs([tmp_path / "wandb"])] == ["id7", "id8"]
    shutil.rmtree(tmp_path / "wandb")
    with pytest.raises(RecordError, match=r"holds 4 records .*, …\); pass one of them"):
        load_run(tmp_path)


NOT_RECORDS: dict[str, Callable[[Path], Path]] = {
    "absent": lambda folder: folder / "absent",
    "a file": lambda folder: _written(folder / "file.txt", b"x"),
    "an empty folder": lambda folder: folder,
    "another tool's manifest": lambda folder: _written(folder / "manifest.json", b"{}").parent,
    "a manifest without an index": lambda folder: _written(folder / "ntkwatch" / "manifest.json", b"{}").parent,
    "an index without a manifest": lambda folder: _written(folder / "ntkwatch" / "metrics.jsonl", b"").parent,
}


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", NOT_RECORDS)
def test_a_folder_that_is_not_a_record_is_said_to_be_none_in_one_sentence(name: str, tmp_path: Path) -> None:
    path = NOT_RECORDS[name](tmp_path)
    with pytest.raises(RecordError) as caught:
        load_run(path)
    assert_helpful(caught.value, path)


def test_a_step_that_was_not_probed_is_named_with_those_that_were(record: Path) -> None:
    with pytest.raises(RecordError, match=r"no probe at step 7; its steps are 0, 1, 2, 3, 4, 5\.") as caught:
        load_run(record).kernel(7)
    assert_helpful(caught.value, record)


def test_an_empty_record_is_a_run_without_steps(tmp_path: Path) -> None:
    RecordWriter.create(tmp_path, {})
    run = load_run(tmp_path)
    assert run.steps == []
    assert run.metrics.empty
    assert run.layer_metrics.empty
    assert run.width is None


def test_records_of_schema_1_load() -> None:
    run = load_run(SUPPORT / "golden" / "schema_1")
    assert run.manifest["hparams"] == {"width": 64}
    assert run.steps == [0, 1, 2]
    assert run.metrics["kernel_angle"].tolist() == [0.0, 1 / 3, 7.0]
    assert run.reasons[0] == {"taylor_ratio": "no motion yet"}
    assert run.kernel(2).tolist() == [[3.0, 2.0], [2.0, 3.0]]
    assert run.layers(2)["net.0.weight"].tolist() == [[3.0, 2.0], [2.0, 3.0]]
    assert run.eigenvalues(2).tolist() == [5.0, 1.0]
    assert run.outputs(1).tolist() == [[0.5], [0.25]]


# ── side files, names, untrusted records ──────────────────────────────────────────────────────────────────────────────
def test_side_tensors_are_read_back_or_refused(tmp_path: Path) -> None:
    tensors = {f"net.{i}.bias": torch.full((2,), i) for i in range(20, 0, -1)}  # in no order that sorting would give
    tensors |= {"net.0.weight": torch.randn(3, 2), "n": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)}
    sha256 = save_tensors(tmp_path, "theta0", tensors)
    back = load_tensors(tmp_path, "theta0", sha256)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    with pytest.raises(RecordError, match="has changed since it was written"):
        load_tensors(tmp_path, "theta0", "0" * 64)
    with pytest.raises(RecordError, match="cannot be read"):
        load_tensors(tmp_path, "theta1", sha256)


def hostile_names(number: int) -> list[str]:
    rng = random.Random(5)
    known = [
        "",
        ".",
        "..",
        "/",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x",
        "con",
        "NUL.txt",
        "a\0b",
        "~",
        "-rf",
        "x" * 300,
    ]
    known += [
        "..%2f",
        "a.",
        "a ",
        " a",
        ".hidden",
        "naïve",
        "日本",
        "\ud800",
        "a\nb",
        "${HOME}",
        "$(id)",
        "`id`",
        "a;b",
        "*",
        "?",
    ]
    alphabet = "ab.-_/\\ \0\n~$*:é" + chr(0x202E)
    return known + ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(number - len(known))]


def test_no_name_leaves_its_folder_and_no_two_share_a_file(tmp_path: Path) -> None:
    names = list(dict.fromkeys(hostile_names(600)))[:500]
    safe = {name: safe_name(name) for name in names}
    for name, file in safe.items():
        assert (tmp_path / file).resolve().parent == tmp_path.resolve(), repr(name)
        assert file.isascii(), repr(name)
        assert not set(file) & set('/\\\0\n:*?"<>| '), repr(name)
        assert len(file) <= 100, repr(name)
        assert safe_name(file) == file, repr(name)
    assert len({file.lower() for file in safe.values()}) == len(names), "two names share a file"
    print(f"{len(names)} names, 0 outside")


@pytest.mark.parametrize("name", ["version_0", "theta0", "step_00000008", "a-b_c.d", "A"])
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "a/../../secret", "secret\0"])
def test_a_record_that_names_a_file_outside_itself_is_refused(name: str, record: Path) -> None:
    sha256 = save_tensors(record.parent, "secret", {"kernel": torch.ones(2, 2), "eigenvalues": torch.ones(2)})
    body = record_format.decode_line((record / "metrics.jsonl").read_bytes().splitlines()[0])
    (record / "metrics.jsonl").write_bytes(
        record_format.encode_line(body | {"snapshot": {"name": name, "sha256": sha256}})
    )
    with pytest.raises(RecordError, match="cannot be read"):
        load_run(record).kernel(0)


def test_a_link_that_leads_out_of_the_record_is_refused(record: Path, tmp_path: Path) -> None:
    snapshot = record / "snapshots" / "step_00000000.safetensors"
    snapshot.rename(tmp_path / "elsewhere")
    snapshot.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="lies outside the record"):
        load_run(record).kernel(0)


def test_a_pickle_is_never_opened(record: Path) -> None:
    import hashlib
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was opened",))

    for data in (pickle.dumps(Bomb()), b""):
        (record / "snapshots" / "step_00000000.safetensors").write_bytes(data)
        body = record_format.decode_line((record / "metrics.jsonl").read_bytes().splitlines()[0])
        forged = {"name": "step_00000000", "sha256": hashlib.sha256(data).hexdigest()}
        (record / "metrics.jsonl").write_bytes(record_format.encode_line(body | {"snapshot": forged}))
        with pytest.raises(RecordError, match="is not a safetensors file"):
            load_run(record).kernel(0)


def test_the_writers_of_these_tests_write_what_the_readers_expect(tmp_path: Path) -> None:
    """Negative control of the reading tests: a number that does not follow from its step is seen."""
    writer = RecordWriter.create(tmp_path, {})
    writer.append(dataclasses.replace(measurement(1), metrics={"double": 3.0}))
    assert load_run(tmp_path).metrics.loc[1, "double"] != 2.0


# ── the store ──────────────────────────────────────────────────────────────────────────────────────────────────────


def some(value: float, size: int = 1000) -> dict[str, Tensor]:
    return {"theta/net.0.weight": torch.full((size,), float(value)), "steps": torch.tensor(3)}


def test_a_store_gives_back_every_branch_of_a_run(tmp_path: Path) -> None:
    """Resumed from step 5, the run comes by step 9 again: both are there, by their own names."""
    store = TensorStore(tmp_path)
    entries = [store.put(step, some(i)) for i, step in enumerate((5, 9, 9))]
    assert len({entry["name"] for entry in entries}) == 3
    for i, entry in enumerate(entries):
        found = TensorStore(tmp_path).get(entry)
        assert list(found) == ["theta/net.0.weight", "steps"]
        assert found["theta/net.0.weight"].unique().tolist() == [i]


@pytest.mark.parametrize(("limits", "kept"), [((20_000, 100), 4), ((10**9, 3), 3), ((1, 100), 2), ((10**9, 100), 9)])
def test_a_store_keeps_the_newest_within_its_limits_and_two_in_any_case(
    limits: tuple[int, int], kept: int, tmp_path: Path
) -> None:
    store = TensorStore(tmp_path, *limits)
    (tmp_path / ".step_00000000.safetensors.dead.tmp").write_bytes(b"of a writer that was killed")
    entries = [store.put(step, some(step)) for step in range(9)]
    assert len(list(tmp_path.iterdir())) == kept, f"{limits}"
    for entry in entries[: 9 - kept]:
        with pytest.raises(RecordError, match="resume from a later checkpoint"):
            store.get(entry)
    assert all(float(store.get(entry)["theta/net.0.weight"][0]) >= 9 - kept for entry in entries[9 - kept :])


def test_a_store_never_reads_beside_itself(tmp_path: Path) -> None:
    entry = TensorStore(tmp_path / "forecasts").put(1, some(1))
    with pytest.raises(RecordError, match="lies outside"):
        TensorStore(tmp_path / "forecasts" / "deeper").get(entry | {"name": "../step_00000001"})
