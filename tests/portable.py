"""The numeric tests under other instruction sets and thread counts: what the last bits of one CPU decide, fails here.

    python -m tests.portable [--setting NAME] [--jobs N] [FILE ...]

Each setting asks a library for instructions that an older or another CPU has, in a process of its own. What it changes
is asked first: a few results of each library are compared bit by bit with those of this machine as it is, and a setting
that changes none (another make of CPU, a library that is not there) is skipped. One row a setting; the exit code is 1
where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent

# Each library by itself, then together, as on a CPU with AVX2 and no AVX-512, and on one with neither.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Prescott",
}
TWO = {"OMP_NUM_THREADS": "2"}
SETTINGS: dict[str, dict[str, str]] = {
    "two threads": TWO,
    **{f"{name}={value}": {name: value} for name, value in OLDEST.items()},
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL_ENABLE_INSTRUCTIONS=AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},  # heard by MKL on Intel's CPUs alone
    "all AVX2": AVX2,
    "all AVX2, two threads": {**AVX2, **TWO},
    "all without AVX": OLDEST,
}

NUMERIC = [
    "compare/*", "diagnostics/*", "engines/*", "frontends/test_forecast_updates.py", "guard/test_guard.py",
    "infinite/*", "linearized/*", "measurement/test_infinite_limit.py", "measurement/test_monitor.py", "metrics/*",
    "model/test_errors.py",
]  # fmt: skip
LEFT_OUT = {
    "engines/test_memory.py",
    "engines/test_contraction_costs.py",
}  # the same on any CPU

PROBE = """
import hashlib, json, torch, numpy as np
u, v = np.random.RandomState(0).uniform(-1, 1, (2, 307, 211))
a, b = torch.from_numpy(u), torch.from_numpy(v)
x, y = a.float(), b.float()
large = torch.cat([x.flatten()] * 9)
with torch.no_grad():
    results = {
        "ATen": [large.sum(), a.sum(0), x.exp(), torch.nn.functional.layer_norm(x, (211,))],
        "oneDNN": [torch.nn.functional.conv2d(x[:32, :192].reshape(4, 16, 8, 12), y[:, :144].reshape(-1, 16, 3, 3))],
        "MKL": [x @ y.T, a @ b.T, torch.linalg.eigvalsh(a.T @ a)],
        "OpenBLAS": [torch.from_numpy(r) for r in (u @ v.T, np.linalg.eigvalsh(u.T @ u))],
    }
bits = {k: hashlib.sha256(b"".join(t.numpy().tobytes() for t in v)).hexdigest() for k, v in results.items()}
print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "bits": bits}))
"""


@dataclass(frozen=True)
class Row:
    """What became of the tests under one setting."""

    setting: str
    changes: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        numbers = f"{self.passed:>7}{self.failed:>7}{self.skipped:>8}{self.seconds:>8.0f} s"
        return f"{self.setting:<30} {self.changes:<38}{numbers}"


PACKAGES = ["ntkwatch/metrics", "ntkwatch/infinite"]  # their doctests


def numeric_files() -> list[str]:
    found = {str(path.relative_to(ROOT)) for pattern in NUMERIC for path in HERE.glob(pattern)}
    kept = sorted(path for path in found if Path(path).name.startswith("test_"))
    return [path for path in kept if path.removeprefix("tests/") not in LEFT_OUT] + PACKAGES


def environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's, with one thread and none of the variables that settings set but these."""
    touched = {name for setting in SETTINGS.values() for name in setting}
    plain = {name: value for name, value in os.environ.items() if name not in touched}
    return {**plain, "OMP_NUM_THREADS": "1", **variables}


def seen(variables: dict[str, str]) -> tuple[str, dict[str, str]]:
    """What ATen says it uses, and the bits of each library's results."""
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=environment(variables), capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["capability"], found["bits"]


def changes(variables: dict[str, str]) -> str:
    """The libraries whose last bits, or whose instructions if they say so, are others; "" where all is as usual."""
    (usually, usual), (capability, bits) = seen({}), seen(variables)
    libraries = [library for library in usual if bits[library] != usual[library] and library != "ATen"]
    aten = [f"ATen ({capability})"] if (capability, bits["ATen"]) != (usually, usual["ATen"]) else []
    return ", ".join(aten + libraries)


def run(setting: str, files: list[str], jobs: int) -> Row:
    """The tests under one setting, in as many processes as there are cores for its threads."""
    variables = SETTINGS[setting]
    found, began = changes(variables), time.perf_counter()
    if not found:
        return Row(setting, "nothing on this machine: skipped", 0, 0, 0, 0.0)
    workers = max(1, jobs // int(variables.get("OMP_NUM_THREADS", 1)))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "not soak", "-p", "no:cacheprovider", f"--junitxml={report}"]
        spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
        command = [sys.executable, "-m", "pytest", *options, *spread, *files]
        done = subprocess.run(command, env=environment(variables), cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(
                f"{setting}: pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
            )
        if done.returncode:
            print(done.stdout[-20_000:])
        return counted(setting, found, report, time.perf_counter() - began)


def counted(setting: str, found: str, report: Path, seconds: float) -> Row:
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    skipped = int(suite.attrib["skipped"])
    bad = (
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    )
    names = tuple(f"{case.attrib['classname']}::{case.attrib['name']}" for case in bad)
    return Row(setting, found, int(suite.attrib["tests"]) - failed - skipped, failed, skipped, seconds, names)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="tests to run instead of all numeric ones")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="one of them; all without")
    parser.add_argument("--jobs", type=int, default=2, help="cores to use")
    asked = parser.parse_args(arguments)
    print(f"{'setting':<30} {'changes the last bits of':<38}{'passed':>7}{'failed':>7}{'skipped':>8}{'time':>10}")
    rows = []
    for setting in asked.setting or SETTINGS:
        rows.append(run(setting, asked.files or numeric_files(), asked.jobs))
        print(rows[-1], flush=True)
    for row in rows:
        for name in row.names:
            print(f"failed under {row.setting}: {name}")
    print(f"{sum(row.passed for row in rows)} passed, {sum(row.failed for row in rows)} failed")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
