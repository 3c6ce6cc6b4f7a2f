"""`make test-portable` itself: a sample of it, and that a failure is counted and named, and decides the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import portable
from tests.portable import SETTINGS, Row, counted, main, numeric_files

SAMPLE = ["tests/metrics/test_error_bars.py", "tests/compare/test_slopes.py"]


def test_a_sample_passes_without_vector_instructions(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--setting", "all without AVX", "--jobs", "1", *SAMPLE])
    said = capsys.readouterr().out
    assert code == 0, said
    row = next(line for line in said.splitlines() if line.startswith("all without AVX"))
    assert "skipped" in row or int(row.split()[-5]) > 10, row


def test_a_failure_is_counted_named_and_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "changes", lambda variables: "ATen")
    failing = tmp_path / "test_two.py"
    failing.write_text("def test_good(): pass\ndef test_bad(): assert 0.1 + 0.2 == 0.3\n")
    row = portable.run("two threads", [str(failing)], 1)
    assert (row.passed, row.failed, row.skipped) == (1, 1, 0)
    assert [name.split("::")[-1] for name in row.names] == ["test_bad"]
    monkeypatch.setattr(portable, "run", lambda setting, files, jobs: row)
    assert main(["--setting", "two threads"]) == 1


def test_a_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="7" failures="1" errors="1" skipped="2">'
        '<testcase classname="a" name="b"><error/></testcase><testcase classname="a" name="c"/>'
        "</testsuite></testsuites>"
    )
    assert counted("s", "MKL", report, 3.0) == Row("s", "MKL", 3, 2, 2, 3.0, ("a::b",))


def test_every_numeric_file_is_in_and_every_library_is_set_alone_and_together() -> None:
    assert len(numeric_files()) > 40
    assert all((portable.ROOT / file).exists() for file in numeric_files())
    for name in {name for setting in SETTINGS.values() for name in setting}:
        assert any(set(setting) == {name} for setting in SETTINGS.values()), name
    assert set(SETTINGS["all without AVX"]) >= set(portable.OLDEST)
