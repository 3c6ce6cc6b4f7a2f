"""`ntkwatch demo` where scikit-learn is not there: a sentence, a command that works, and nothing left behind."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LACKING = {
    "not installed": "sys.modules['sklearn'] = None",
    "damaged": "sys.modules['sklearn.datasets'] = None",
    "without pip": "sys.modules['sklearn'] = None; util.find_spec = lambda name: None",
}


@pytest.mark.parametrize("case", LACKING)
def test_a_demo_without_its_data_says_what_to_install(case: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the remedy is run where it has nothing to fetch")
    code = (
        f"import sys; from importlib import util; import ntkwatch.cli.demo; {LACKING[case]}\n"
        f"sys.argv = ['ntkwatch', 'demo', '-o', {str(tmp_path / 'out')!r}]\n"
        "from ntkwatch.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    *said, remedy = done.stderr.strip().splitlines()
    assert "the demo trains on scikit-learn's digits" in " ".join(said), done.stderr
    assert not (tmp_path / "out").exists(), "nothing is made"
    command = shlex.split(remedy)
    if case == "without pip":
        assert command == ["uv", "pip", "install", "--python", sys.executable, "scikit-learn"]
        return
    pasted = subprocess.run([*command, "--no-index"], capture_output=True, text=True)  # satisfied: nothing is fetched
    assert pasted.returncode == 0, pasted.stderr
