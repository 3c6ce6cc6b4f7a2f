"""The command line: what is printed, what is written, exit codes, and one-sentence errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from ntkwatch import metrics
from ntkwatch.cli import app
from ntkwatch.compare import compare_runs
from ntkwatch.record import RecordWriter, load_run
from tests.support.synthetic import write_run, write_sweep

COMMANDS = ("show", "widths", "diff", "report", "explain", "doctor", "demo")
ANSI = re.compile(r"\x1b\[")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root, widths=(32, 64, 128), seeds=2)
    return root


def run(*args: object, **env: str) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env or None)


def test_help_names_every_command_in_one_line_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ntkwatch.cli import main\nsys.argv = ['ntkwatch', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'pandas', 'matplotlib', 'numpy', 'scipy', 'lightning'} & set(sys.modules)))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "", f"--help loads {lines[-1]}"
    for command in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {command} ")]
        assert not line.endswith("..."), line


def test_show_says_words_numbers_courses_layers_and_reasons(sweep: Path) -> None:
    result = run("show", sweep / "version_0")
    assert result.exit_code == 0
    for part in (
        "Linearity  Taylor ratio",
        "step 256",
        "▁",
        "█",
        "net.2",
        "share",
        "taylor_ratio at step 0: no motion",
    ):
        assert part in result.stdout, part
    assert not ANSI.search(result.stdout), "colour in a pipe"


def test_show_json_is_the_record(sweep: Path) -> None:
    answer = json.loads(run("show", sweep / "version_0", "--json").stdout)
    recorded = load_run(sweep / "version_0").metrics
    assert [row["step"] for row in answer["metrics"]] == list(recorded.index)
    assert answer["metrics"][-1]["kernel_angle"] == recorded["kernel_angle"][256]
    assert answer["metrics"][0]["taylor_ratio"] is None
    assert answer["layers"]["256"]["net.2"]["share"] == 0.3
    assert answer["reasons"]["0"]["taylor_ratio"].startswith("no motion")


@pytest.mark.parametrize("command", ["show", "widths", "diff"])
def test_80_columns_hold_every_line_and_no_number_is_cut(
    command: str, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntkwatch.compare.Comparison.figures", lambda self: {})
    args = {
        "show": [sweep / "version_0"],
        "widths": [sweep, "-o", tmp_path],
        "diff": [sweep / "version_0", sweep / "version_5"],
    }
    narrow, wide = run(command, *args[command], COLUMNS="80"), run(command, *args[command], COLUMNS="200")
    lines = [line for line in narrow.stdout.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, lines)) <= 80
    number = re.compile(r"[−+]?\d+\.\d+")
    assert sorted(number.findall(narrow.stdout)) == sorted(number.findall(wide.stdout)), "a number was cut or folded"


def test_widths_prints_slopes_and_writes_tables_and_figures(sweep: Path, tmp_path: Path) -> None:
    result = run("widths", sweep, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "6 runs (SGD) at step 256, the last they share" in result.stdout
    assert re.search(r"kernel_angle +−1\.000 +−1\.000 +−1\.000 +1 +6 +4", result.stdout)
    assert "nearer −1" in result.stdout
    written = [Path(line.removeprefix("wrote ")) for line in result.stdout.splitlines() if line.startswith("wrote ")]
    assert all(path.stat().st_size > 0 for path in written)
    assert {p.name for p in written} >= {"table.csv", "history.csv", "slopes.csv", "slope_kernel_angle.png"}
    slopes = pd.read_csv(tmp_path / "out" / "slopes.csv", index_col="metric")
    assert slopes["value"]["kernel_angle"] == pytest.approx(-1)
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert list(table["kernel_angle"]) == pytest.approx(list(compare_runs(sweep).table["kernel_angle"]))


def test_widths_json_is_json_and_writes_only_when_asked(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = json.loads(run("widths", sweep, "--json").stdout)
    assert answer["slopes"]["kernel_angle"]["dof"] == 4
    assert answer["files"] == []
    assert list(tmp_path.iterdir()) == []


def test_widths_passes_its_options_on(sweep: Path, tmp_path: Path) -> None:
    answer = json.loads(run("widths", sweep, "--json", "--min-width", "50").stdout)
    assert sorted({row["width"] for row in answer["runs"]}) == [64, 128]
    write_run(tmp_path / "a", width=32)
    write_run(tmp_path / "b", width=64, reduction="sum")
    refused = run("widths", tmp_path, "--json")
    assert refused.exit_code == 2
    assert "reduction: trace in a against sum in b" in refused.stderr
    assert "reduction" in json.loads(run("widths", tmp_path, "--json", "--allow-mismatch").stdout)["mismatch"]
    by_rate = run("widths", tmp_path, "--json", "--allow-mismatch", "--x", "lr")
    assert by_rate.exit_code == 2
    assert "2 runs with one lr (0.1)" in by_rate.stderr


def test_diff_prints_and_speaks_json(sweep: Path) -> None:
    result = run("diff", sweep / "version_0", sweep / "version_5")
    assert result.exit_code == 0
    assert "angle (rad)" in result.stdout
    assert "net.0.weight" in result.stdout
    answer = json.loads(run("diff", sweep / "version_0", sweep / "version_5", "--json", "--step", 8).stdout)
    assert answer["step"] == 8
    assert len(answer["layers"]) == 3


def test_report_writes_one_page(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.report.MAX_RUNS_WITH_FIGURES", 0)
    result = run("report", sweep / "version_0", "-o", tmp_path / "new" / "page.html")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"wrote {tmp_path / 'new' / 'page.html'}"
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["kernel_angle", "ntk/taylor_ratio"])
def test_explain_says_the_docstring_of_the_function_itself(name: str) -> None:
    result = run("explain", name)
    assert result.exit_code == 0
    first = (getattr(metrics, name.removeprefix("ntk/")).__doc__ or "").splitlines()[0]
    assert first in result.stdout
    assert "Pitfalls" in result.stdout
    assert ">>>" not in result.stdout


def test_explain_knows_every_logged_name(sweep: Path) -> None:
    from ntkwatch.cli.glossary import entry
    from ntkwatch.diagnostics import DIAGNOSTICS

    for name in [*DIAGNOSTICS, "overhead"]:
        assert len(entry(name) or "") > 30, name
    listed = run("explain").stdout
    assert all(name in listed for name in DIAGNOSTICS)


def test_explain_of_an_unknown_name_suggests() -> None:
    result = run("explain", "kernel_angel")
    assert result.exit_code == 2
    assert "did you mean kernel_angle" in result.stderr
    unheard = run("explain", "zzz").stderr
    assert "`ntkwatch explain` lists the names" in unheard
    assert len(unheard) < 100


BAD = {
    "no such folder": (["show", "{tmp}/nothing"], "is not a folder"),
    "a folder that is no run": (["show", "{tmp}"], "holds no record"),
    "several runs where one is asked for": (["show", "{sweep}"], "holds 6 records"),
    "one run where several are asked for": (["widths", "{sweep}/version_0"], "1 run with one width"),
    "unknown x": (["widths", "{sweep}", "--x", "depth"], "no hyperparameter 'depth'"),
    "unknown step": (["diff", "{sweep}/version_0", "{sweep}/version_1", "--step", "5"], "step 5 is not one"),
    "report of nothing": (["report", "{tmp}", "-o", "{tmp}/r.html"], "holds no record"),
    "unwritable page": (["report", "{sweep}/version_0", "-o", "/dev/null/r.html"], "/dev/null"),
    "follow and json": (["show", "{sweep}/version_0", "--follow", "--json"], "exclude each other"),
    "unknown command": (["shwo"], "No such command"),
    "unknown option": (["show", "--what"], "No such option"),
    "missing run": (["show"], "Missing argument"),
    "min-width is no number": (["widths", "{sweep}", "--min-width", "wide"], "Invalid value for '--min-width'"),
    "no factory": (["doctor", "nothing.py:make"], "does not name a factory: there is no file nothing.py"),
    "factory without a name": (["doctor", "{tmp}"], "does not name a factory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(
    case: str, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntkwatch.report.MAX_RUNS_WITH_FIGURES", 0)
    args, message = BAD[case]
    result = run(*(arg.format(tmp=tmp_path, sweep=sweep) for arg in args))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_damaged_record_is_one_sentence(tmp_path: Path) -> None:
    index = write_run(tmp_path / "a") / "ntkwatch" / "metrics.jsonl"
    index.write_bytes(index.read_bytes().replace(b"kernel_angle", b"kernel_tilt_", 1))
    result = run("show", tmp_path / "a")
    assert result.exit_code == 1
    assert "damaged" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_defect_of_ours_keeps_its_traceback(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("ntkwatch.cli.terminal.metrics_table", broken)
    broken.__module__ = "numpy"
    result = run("show", sweep / "version_0")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_exit_codes_of_the_real_process(sweep: Path) -> None:
    for args, code in (
        (["show", str(sweep / "version_0")], 0),
        (["show", "nothing"], 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ntkwatch", *args], capture_output=True, text=True, env=_ascii_terminal()
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert (done.stderr == "") == (code == 0)


def _ascii_terminal() -> dict[str, str]:
    """A terminal that knows no bars and arrows costs characters, not the answer."""
    return os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.compare.Comparison.figures", lambda self: {})
    run_folder = write_run(tmp_path / "a\x1b[31m", model="\x1b]0;owned\x07", undefined={"x\x1b": "y\x1b"})
    write_run(tmp_path / "b", width=32)
    for args in (["show", run_folder], ["widths", tmp_path, "-o", tmp_path / "o"], ["show", tmp_path / "c\x1b[31m"]):
        assert "\x1b" not in run(*args).output.replace(str(tmp_path / "o"), "")


def test_follow_ends_with_the_run_and_prints_each_probe_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.cli.follow.POLL", 0.05)
    whole = load_run(write_run(tmp_path / "whole", steps=(0, 1, 2, 4)))
    writer = RecordWriter.create(tmp_path / "live" / "ntkwatch", whole.manifest)
    writer.append(whole.measurement(0))

    def train() -> None:
        for step in (1, 2, 4):
            time.sleep(0.15)
            writer.append(whole.measurement(step))
        writer.update_manifest(finished="2026-01-01T00:00:00+00:00")

    trainer = threading.Thread(target=train)
    trainer.start()
    result = run("show", tmp_path / "live", "--follow")
    trainer.join()
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["0", "1", "2", "4"]
    assert "kernel_angle" in result.stdout


def test_leaving_follow_is_no_error(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ntkwatch.cli.follow.time.sleep", interrupt)
    assert run("show", sweep / "version_0", "--follow").exit_code == 0


FACTORIES = """
import torch
from torch import nn

def good():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return model, (torch.randn(6, 4), torch.arange(6) % 3)

def positions():
    return nn.Linear(4, 5), torch.randn(6, 2, 4)

def frozen():
    return nn.Linear(4, 5).requires_grad_(False), torch.randn(6, 4)

def not_finite():
    return nn.Linear(4, 1), torch.full((6, 4), torch.nan)

def three():
    return 3

def raises():
    raise KeyError("lost")

def fails():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)
        def forward(self, x):
            return self.a(x[:, :2])
    return Net(), torch.randn(6, 4)

def empty():
    return nn.Linear(4, 3), torch.randn(0, 4)

def three_lines():
    raise ValueError("first\\n  second\\n\\nthird")

def breaks():
    net = nn.Linear(4, 3)
    net.ntk_outputs = lambda x: {}["gone"]
    return net, torch.randn(6, 4)

def coupled():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return nn.Sequential(norm, nn.Linear(4, 3)), torch.randn(6, 4)

def contrastive():
    net = nn.Linear(4, 3)
    net.ntk_outputs = lambda x: net(x) @ net(x).T
    return net, torch.randn(6, 4)

def random_in_eval():
    net = nn.Linear(4, 3)
    net.ntk_outputs = lambda x: net(torch.nn.functional.dropout(x, 0.5, training=True))
    return net, torch.randn(6, 4)

def no_parameters():
    return nn.ReLU(), torch.randn(6, 4)

def lazy():
    return nn.LazyLinear(3), torch.randn(6, 4)

def detached():
    net = nn.Linear(4, 3)
    net.ntk_outputs = lambda x: net(x).detach()
    return net, torch.randn(6, 4)

def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(6, 4)

def half():
    return nn.Linear(4, 3).bfloat16(), torch.randn(6, 4).bfloat16()

def slow():
    return nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 2000)), torch.randn(512, 2048)

def loader():
    dataset = torch.utils.data.TensorDataset(torch.randn(6, 4), torch.zeros(6))
    return nn.Linear(4, 3), torch.utils.data.DataLoader(dataset, 2)

def dataset():
    return nn.Linear(4, 3), torch.utils.data.TensorDataset(torch.randn(6, 4))

def iterator():
    return nn.Linear(4, 3), iter(loader()[1])

def sparse():
    return nn.Linear(4, 3), torch.eye(4).to_sparse()

def lstm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_recurrent_layer_with_a_long_name, self.b = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)
        def forward(self, x):
            return self.b(self.a_recurrent_layer_with_a_long_name(x)[0][:, -1])
    return Net(), torch.randn(6, 7, 4)
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return path


def test_doctor_says_engine_rules_mode_cost(factories: Path) -> None:
    result = run("doctor", f"{factories}:good")
    assert result.exit_code == 0, result.output
    for part in (
        "Sequential, 83 trained parameters in 6 tensors",
        "[6, 3] float32",
        "calibrated",
        "layerwise",
        "0.weight",
    ):
        assert part in result.stdout, part


DOCTOR = {
    "positions": (1, "pass outputs="),
    "frozen": (1, "no trained parameter"),
    "not_finite": (1, "not finite"),
    "three": (2, "three() returned int: it must return (model, batch)"),
    "raises": (2, "raised KeyError: 'lost' (line 22 of factories.py)"),
    "missing": (2, "has no function missing"),
    "fails": (1, "PROBLEM  module a (Linear) takes a last dimension of 4 and gets [6, 2]"),
    "three_lines": (2, "raised ValueError: first / second / third (line"),
    "breaks": (1, "PROBLEM  the model raised KeyError: 'gone' (line"),
    "empty": (1, "PROBLEM  the probes are empty"),
    "coupled": (1, "module 0, BatchNorm1d"),
    "contrastive": (1, "depends on the other examples"),
    "random_in_eval": (1, "draws random numbers"),
    "no_parameters": (1, "no trained parameter"),
    "lazy": (1, "not initialised yet; run one batch"),
    "detached": (1, "depend on no trained parameter"),
    "dropout": (0, "1 Dropout layer is off"),
    "half": (0, "7.8e-02 of the largest"),
    "slow": (1, "PROBLEM  a probe takes about"),
    "lstm": (0, "a_recurrent_layer"),
    "loader": (1, "got DataLoader (loader): take a batch of it, next(iter(loader))"),
    "dataset": (1, "got TensorDataset (dataset): take a batch of it, next(iter(DataLoader(dataset, batch_size=64)))"),
    "iterator": (1, "(iterator): take a batch of it, next(iterator)"),
    "sparse": (1, "give probes.to_dense()"),
}


@pytest.mark.parametrize("case", DOCTOR)
def test_doctor_names_what_is_wrong(case: str, factories: Path) -> None:
    code, message = DOCTOR[case]
    result = run("doctor", f"{factories}:{case}")
    assert result.exit_code == code, result.output
    assert " ".join(message.split()) in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("case", ["good", "lstm", "coupled", "fails"])
def test_doctor_fits_eighty_columns(case: str, factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.cli.terminal.PIPED_WIDTH", 80)
    output = run("doctor", f"{factories}:{case}").output
    too_long = [line for line in output.splitlines() if len(line) > 80]
    assert too_long == [], f"{case}: {too_long}"
