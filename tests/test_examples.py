"""Every example runs, small, as a person would run it, and leaves records that the commands can read."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from ntkwatch import load_run
from ntkwatch.record import find_runs

EXAMPLES = Path(__file__).parent.parent / "examples"
CASES: dict[str, tuple[list[str], int, str]] = {
    "digits_mlp.py": (["--width", "16", "--epochs", "1"], 1, "kernel"),
    "infinite_digits.py": (["--train", "30", "--test", "20", "--width", "16", "--steps", "5"], 0, "NTK"),
    "mnist_cnn.py": (["--images", "250", "--width", "4", "--epochs", "1", "--overhead"], 3, "without the callback"),
    "width_sweep.py": (["--widths", "8", "16", "--seeds", "2", "--steps", "4"], 12, "mup"),
}


@pytest.mark.parametrize("name", CASES)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, n_runs, said = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    records = find_runs([tmp_path]) if n_runs else []
    assert len(records) == n_runs, name
    assert all(load_run(record).metrics["kernel_angle"].iloc[-1] > 0 for record in records), name
    assert said in capsys.readouterr().out, name


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


def test_the_demo_trains_watches_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from ntkwatch.cli import app, demo

    for name, value in {"WIDTHS": (8, 16), "SEEDS": (0, 1), "STEPS": 3}.items():
        monkeypatch.setattr(demo, name, value)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "tensorboard --logdir" in result.output
    assert "slope" in result.output.lower()
    assert len(find_runs([tmp_path])) == 4
