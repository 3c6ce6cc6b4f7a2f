"""What a person sees: no line wider than the terminal, no name folded, nothing said twice, whatever the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from torch import nn
from typer.testing import CliRunner

from ntkwatch import Monitor, plan
from ntkwatch.cli import app
from ntkwatch.cli.tables import Column, shorten_middle, stacked, table
from ntkwatch.cli.terminal import console
from ntkwatch.diagnostics import DIAGNOSTICS, SECTIONS, select
from ntkwatch.engines.plan import Plan, Row
from ntkwatch.record import load_run
from ntkwatch.summary import never_defined, undefined

WIDTHS = (60, 80, 120)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_first_module_with_a_long_name = nn.ModuleDict({"of_its_own": nn.Linear(6, 8)})
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.norm(self.a_first_module_with_a_long_name["of_its_own"](x)).relu())

def made():
    torch.manual_seed(0)
    return Net(), (torch.randn(12, 6), torch.arange(12) % 3)

def wrong():
    return made()[0], torch.randn(12, 7).double()

def fails():
    raise ValueError("a long story\\nin lines " + "and words " * 30)
"""


class Net(nn.Module):
    """An MLP whose modules have names as long as real ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layers_0_self_attention_output_projection": nn.Linear(6, width)})
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder["layers_0_self_attention_output_projection"](x).relu())


def watch(folder: Path, width: int, seed: int) -> None:
    """A short training with every diagnostic; the loss is known, so that few of them are undefined."""
    torch.manual_seed(seed)
    model, x, y = Net(width), torch.randn(24, 6), torch.arange(24) % 3
    loss, hparams = nn.functional.cross_entropy, {"width": width, "seed": seed}
    monitor = Monitor(model, (x, y), loss=loss, diagnostics="full", record=folder / "ntkwatch", hparams=hparams)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(5):
        monitor.measure(step, optimizer=optimizer)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for width in (8, 16, 32):
        watch(root / f"an_experiment_with_a_name_of_some_length_width_{width}", width, seed=0)
    (root / "made.py").write_text(FACTORY)
    return root


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.compare.Comparison.figures", lambda self: {})


COMMANDS: dict[str, tuple[str, ...]] = {
    "show": ("show", "{a}"),
    "widths": ("widths", "{a}", "{b}", "{c}", "-o", "{tmp}"),
    "diff": ("diff", "{a}", "{b}"),
    "explain": ("explain",),
    "explain a metric": ("explain", "kernel_angle"),
    "explain a long one": ("explain", "neural_feature_correlation_update"),
    "explain an unknown one": ("explain", "kernel_angel"),
    "doctor": ("doctor", "{factory}:made"),
    "doctor, full": ("doctor", "{factory}:made", "--diagnostics", "full"),
    "doctor, forecast": ("doctor", "{factory}:made", "--diagnostics", "default,loss_if_lazy"),
    "doctor, unknown diagnostics": ("doctor", "{factory}:made", "--diagnostics", "foo,,kernel_angel"),
    "doctor, probes that do not fit": ("doctor", "{factory}:wrong"),
    "doctor, a factory that fails": ("doctor", "{factory}:fails"),
    "help": ("--help",),
    "help of doctor": ("doctor", "--help"),
}


def call(name: str, runs: Path, tmp: Path, **env: str) -> list[str]:
    """Every line that a command prints, on both streams, without colours; paths that it names are left out."""
    a, b, c = (f"{runs}/an_experiment_with_a_name_of_some_length_width_{width}" for width in (8, 16, 32))
    given = {"a": a, "b": b, "c": c, "tmp": str(tmp), "factory": f"{runs}/made.py"}
    result: Any = CliRunner().invoke(app, [arg.format(**given) for arg in COMMANDS[name]], env=env)
    assert result.exit_code in (0, 1, 2), f"{name}: {result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{name}: {result.exception!r}"
    lines = [ANSI.sub("", line) for line in result.output.splitlines()]
    return [line for line in lines if not line.startswith("wrote ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_wider_than_the_terminal(name: str, runs: Path, tmp_path: Path) -> None:
    for width in WIDTHS if "help" not in name else (80,):  # typer's test runner sets the width of help to 80
        for terminal in ({}, {"FORCE_COLOR": "1"}):
            lines = call(name, runs, tmp_path, COLUMNS=str(width), **terminal)
            assert lines, name
            wide = [line for line in lines if cell_len(line) > width]
            assert not wide, f"{name} at {width} columns {terminal}: {wide}"


@pytest.mark.parametrize("width", WIDTHS)
def test_show_names_every_metric_once_and_whole(width: int, runs: Path, tmp_path: Path) -> None:
    run = load_run(runs / "an_experiment_with_a_name_of_some_length_width_8")
    lines = call("show", runs, tmp_path, COLUMNS=str(width))
    never = never_defined(run.metrics)
    assert {"loss_if_flow", "preconditioned_alignment"} <= set(never), "of cross-entropy, of SGD"
    for name in run.metrics.columns:
        rows = [line for line in lines if re.match(rf"{re.escape(name)}  ", line)]
        assert len(rows) == (name not in never), f"{name} at {width} columns: {rows}"
    start = next(i for i, line in enumerate(lines) if line.startswith("Undefined"))
    told = " ".join(" ".join(lines[start:]).split())
    assert not any(line.startswith("Undefined") for line in lines[:start]), "told twice"
    for name in never:
        assert re.search(rf"\b{name}[,:]", told), f"{name} is not told to be undefined"
    for why in {why for reasons in run.reasons.values() for why in reasons.values()}:
        assert told.count(why) <= 2, f"said {told.count(why)} times: {why}"  # once of some names, once of others


def test_as_many_steps_as_fit_and_the_last_always(runs: Path, tmp_path: Path) -> None:
    counts = {}
    for width in (44, 60, 80, 120):
        head = next(line for line in call("show", runs, tmp_path, COLUMNS=str(width)) if line.startswith("metric "))
        assert "step 4" in head, width
        counts[width] = head.count("step")
    assert list(counts.values()) == sorted(counts.values())
    assert counts[120] == 4


def test_piped_output_is_one_table_with_whole_names(runs: Path, tmp_path: Path) -> None:
    lines = call("show", runs, tmp_path)
    assert any(line.startswith("encoder.layers_0_self_attention_output_projection ") for line in lines)
    assert sum("share" in line for line in lines if line.startswith("layer")) == 1


def test_every_diagnostic_has_a_section() -> None:
    placed = [name for names in SECTIONS.values() for name in names]
    assert sorted(placed) == sorted(DIAGNOSTICS)


def test_unknown_names_get_close_ones_and_no_list() -> None:
    for make in (select, lambda names: Monitor(nn.Linear(2, 2), torch.randn(4, 2), diagnostics=names)):
        with pytest.raises(ValueError, match="unknown diagnostics") as caught:
            make(["kernel_angel", "taylor", "nothing like it", "default"])
        said = str(caught.value)
        assert "'kernel_angel' (did you mean kernel_angle" in said
        assert "'taylor' (did you mean taylor_ratio?)" in said
        assert "'nothing like it'" in said
        assert "`ntkwatch explain`" in said
        assert len(said) < 300


def test_stacked_tables_hold_every_cell_at_any_width() -> None:
    names = ["a", "a.module.with.a.name.that.is.longer.than.any.terminal.of.sixty.columns.can.hold"]
    columns = [Column(f"column {i} with words", [f"{i}.5", f"{10**i}"]) for i in range(7)]
    for width in range(30, 140, 7):
        printer = console()
        printer.width = width
        with printer.capture() as captured:
            for each in stacked("name", names, columns, width):
                printer.print(each)
        shown = captured.get()
        assert max(map(cell_len, shown.splitlines())) <= width, width
        for column in columns:
            assert all(re.search(rf"(^|\s){re.escape(cell)}(\s|$)", shown) for cell in column.cells), (width, column)


def test_sections_stand_above_their_rows() -> None:
    made = table([Column("a name", ["a", "b"]), Column("value", ["1", "2"])], 40, [(0, "first"), (1, "second")])
    printer = console()
    with printer.capture() as captured:
        printer.print(made)
    assert [line.split() for line in captured.get().splitlines()][2:] == [
        ["first"], ["a", "1"], [], ["second"], ["b", "2"],
    ]  # fmt: skip


def test_a_long_name_keeps_both_its_ends() -> None:
    for width in range(3, 40):
        short = shorten_middle("encoder.layers.10.attention.weight", width)
        assert len(short) <= width
        assert short[0] == "e"
        assert short[-1] == "t" or width < 3


def test_reasons_that_differ_in_numbers_are_one() -> None:
    import pandas as pd

    metrics = pd.DataFrame({"a": [None, None], "b": [None, 1.0]}, index=[0, 7])
    reasons = {0: {"a": "3 zero modes at 1.5e-3", "b": "no motion"}, 7: {"a": "12 zero modes at 2e-4"}}
    assert undefined(metrics, reasons) == (["a: 12 zero modes at 2e-4"], ["b at step 0: no motion"])
    many = {f"m{i}": "the kernel is not finite" for i in range(20)}
    _, partly = undefined(pd.DataFrame({name: [1.0, None] for name in many}, index=[0, 7]), {7: many})
    assert partly == ["m0, m1, m2 and 17 more at step 7: the kernel is not finite"]


@pytest.mark.parametrize("width", [40, 60, 71, 72, 80, 100, 160])
def test_a_plan_fits_its_width(width: int) -> None:
    rows = (
        Row("forward and backward", "autograd", 1e12, 1e12, 1e4),
        Row("a.module.with.a.name.longer.than.any.column.weight", "jacobian: layer norm weight + more", 1, 1, 1e-9),
        Row("+ a cost told in a sentence that is longer than all the columns of a table of ninety", "a and 3", 1, 1, 1),
    )  # fmt: skip
    text = Plan("layerwise", "layerwise: " + "agrees " * 20, 10, 4, rows, ("a note that " * 12,)).text(width)
    assert max(map(cell_len, text.splitlines())) <= max(width, 60), text
    assert "weight " in text, "the end of a name tells it from its neighbours"
    assert "167 min" in text, "10,000 s"


def test_the_printed_plan_fits_eighty_columns() -> None:
    for diagnostics in (None, "default", "full"):
        text = str(plan(Net(8), torch.randn(12, 6), diagnostics=diagnostics))
        assert max(map(cell_len, text.splitlines())) <= 80, text
