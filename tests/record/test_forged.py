"""Forged records: whatever they hold, a reader answers, or says in one sentence what is wrong; never a traceback."""

from __future__ import annotations

import math
import os
import random
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ntkwatch import RecordError, compare_runs, load_run
from ntkwatch.cli import app
from ntkwatch.compare import CompareError
from ntkwatch.record import DamagedRecord
from ntkwatch.report import render
from tests.support import forged_records as forged
from tests.support.synthetic import write_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and links in the file system")


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of two widths; `a` is the one that is forged."""
    root = tmp_path_factory.mktemp("templates")
    for name, width, seed in (("a", 64, 0), ("b", 64, 1), ("c", 128, 0)):
        write_run(root / name, width=width, seed=seed, steps=(0, 4, 256), undefined={"x": "why"})
    return root


def _faults(name: str, templates: Path, root: Path, commands: Sequence[tuple[str, ...]]) -> list[str]:
    """What is wrong with the answers about one forgery."""
    for run in ("a", "b", "c"):
        shutil.copytree(templates / run, root / run)
    forged.FORGERIES[name](root / "a" / "ntkwatch", random.Random(zlib.crc32(name.encode())))
    faults = [_library(root), *(_command(args, root) for args in commands)]
    shutil.rmtree(root)
    return [f"{name}: {fault}" for fault in faults if fault]


def _library(root: Path) -> str | None:
    """load_run, all that it reads, and compare_runs."""
    try:
        run = load_run(root / "a")
        _ = (run.metrics, run.layer_metrics, run.probes, run.reasons, run.width, run.hparam("seed"), run.manifest)
        for step in run.steps:
            _ = (run.context(step), run.eigenvalues(step), run.kernel(step), run.layers(step), run.outputs(step))
            run.measurement(step)
            assert 0 <= step <= 2**53
            assert all(value is None or math.isfinite(value) for value in run.measurement(step).metrics.values())
    except RecordError as error:
        if (said := _not_a_sentence(str(error))) is not None:
            return f"load_run says {said}"
    except Exception as error:
        return f"load_run raises {type(error).__name__}: {str(error)[:200]}"
    try:
        compare_runs([root / "a", root / "b", root / "c"])
    except (RecordError, CompareError):
        return None
    except Exception as error:
        return f"compare_runs raises {type(error).__name__}: {str(error)[:200]}"
    return None


COMMANDS = (
    ("show", "{root}/a"),
    ("show", "--json", "{root}/a"),
    ("diff", "{root}/a", "{root}/b"),
    ("diff", "--json", "{root}/b", "{root}/a"),
    ("widths", "--json", "{root}"),
    ("report", "{root}/a", "-o", "{root}/out.html"),
)


def _command(args: tuple[str, ...], root: Path) -> str | None:
    result: Any = CliRunner().invoke(app, [arg.format(root=root) for arg in args])
    command = " ".join(args[:2])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{command} raises {type(result.exception).__name__}: {str(result.exception)[:200]}"
    if raw := {c for c in result.output if not c.isprintable() and c != "\n"}:
        return f"{command} lets {raw} through to the terminal"
    if result.exit_code not in (0, 1, 2) or (result.exit_code and len(result.stderr.strip().splitlines()) != 1):
        return f"{command} ends with {result.exit_code}: {result.stderr[:300]!r}"
    if _is_damaged(root) and result.exit_code != 1:
        return f"{command} of a damaged record ends with {result.exit_code}"
    return None


def _is_damaged(root: Path) -> bool:
    try:
        load_run(root / "a")
    except DamagedRecord:
        return True
    except RecordError:
        pass
    return False


def _not_a_sentence(text: str) -> str | None:
    wrong = "\n" in text or not text.endswith(".") or len(text) > 1000
    return repr(text[:300]) if wrong else None


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.report.MAX_RUNS_WITH_FIGURES", 0)


def forge(number: int, seed: int, templates: Path, root: Path) -> int:
    names = forged.sample(number, seed)
    some = [(COMMANDS[0], COMMANDS[1 + i % (len(COMMANDS) - 1)]) for i in range(len(names))]
    faults = [f for name, two in zip(names, some, strict=True) for f in _faults(name, templates, root / "now", two)]
    assert not faults, f"{len(faults)} faults in {len(names)} forgeries:\n" + "\n".join(faults[:40])
    return len(names)


def test_the_true_record_is_answered(templates: Path, tmp_path: Path) -> None:
    """Negative control: where nothing is forged every command answers, and a forgery is not the true record."""
    for run in ("a", "b", "c"):
        shutil.copytree(templates / run, tmp_path / run)
    for args in COMMANDS:
        assert CliRunner().invoke(app, [arg.format(root=tmp_path) for arg in args]).exit_code == 0, args
    assert load_run(tmp_path / "a").steps == [0, 4, 256]


def test_forged_records_are_one_sentence(templates: Path, tmp_path: Path) -> None:
    """`show` and one more command of each."""
    assert forge(100, 1, templates, tmp_path) == 100


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(8))
def test_every_forgery_is_one_sentence(seed: int, templates: Path, tmp_path: Path) -> None:
    names = sorted(forged.FORGERIES)[seed::8]
    faults = [fault for name in names for fault in _faults(name, templates, tmp_path / "now", COMMANDS)]
    assert not faults, f"{len(faults)} faults in {len(names)} forgeries:\n" + "\n".join(faults[:60])


def test_a_report_of_a_forged_record_with_its_figures(
    templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntkwatch.report.MAX_RUNS_WITH_FIGURES", 6)
    for name in ("a kernel of NaN", "a kernel of zeros", "no eigenvalues at all", "outputs of other probes"):
        shutil.copytree(templates / "a", tmp_path / "a")
        forged.FORGERIES[name](tmp_path / "a" / "ntkwatch", random.Random(0))
        page = render([tmp_path / "a" / "ntkwatch"])
        assert "</html>" in page, name
        shutil.rmtree(tmp_path / "a")


def test_no_pipe_is_ever_opened(templates: Path, tmp_path: Path) -> None:
    """A reader that opened it would wait for ever; one that opened a device could read for ever."""
    shutil.copytree(templates / "a", tmp_path / "a")
    record = tmp_path / "a" / "ntkwatch"
    for file in (record / "manifest.json", record / "metrics.jsonl"):
        kept = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(DamagedRecord, match="is not a file; restore it from a copy"):
            load_run(tmp_path / "a")
        file.unlink()
        file.write_bytes(kept)
    assert load_run(tmp_path / "a").steps == [0, 4, 256]
