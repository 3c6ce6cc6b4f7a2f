"""Scripts that start processes of their own: run to the end in a session of theirs; a hang is ended and said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

TIMEOUT = 400  # seconds for one script; on an idle machine the longest takes about a minute
OF_A_LAUNCHER = {"WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}  # a script's launcher sets its own


def fault_of(script: str | Path, *arguments: object) -> str | None:
    """What went wrong when Python ran the script, in words: a hang or an exit code, and the last that it said."""
    environment = {k: v for k, v in os.environ.items() if k not in OF_A_LAUNCHER} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"hung for {TIMEOUT} s: {process.communicate()[0][-1500:]}"
    return None if process.returncode == 0 else f"exit code {process.returncode}: {said[-2000:]}"
