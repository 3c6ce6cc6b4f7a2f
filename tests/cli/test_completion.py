"""Completion for shells: `ntkwatch --install-completion` writes a script that lists the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHELLS = {"bash": ".bashrc", "zsh": ".zfunc/_ntkwatch", "fish": ".config/fish/completions/ntkwatch.fish"}


def ntkwatch(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", **more}
    command = [str(Path(sys.executable).parent / "ntkwatch"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("shell", SHELLS)
def test_it_installs_for_each_shell(shell: str, tmp_path: Path) -> None:
    done = ntkwatch(tmp_path, "--install-completion", shell)
    assert done.returncode == 0, done.stderr
    assert "ntkwatch" in (tmp_path / SHELLS[shell]).read_text(), shell


def test_it_completes_commands(tmp_path: Path) -> None:
    asked = {"_NTKWATCH_COMPLETE": "complete_bash", "COMP_WORDS": "ntkwatch d", "COMP_CWORD": "1"}
    assert set(ntkwatch(tmp_path, **asked).stdout.split()) >= {"demo", "diff", "doctor"}
