"""`ntkwatch doctor`: what the callback would be given is looked at as the callback would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ntkwatch.cli import app

FACTORIES = """
import torch
from torch import nn

def rows(n):
    return torch.randn(n, 4), torch.arange(n) % 3

def few():
    return nn.Linear(4, 3), rows(6)

def exact():
    return nn.Linear(4, 3), rows(64)

def many():
    return nn.Linear(4, 3), rows(200)

def third_item():
    x, y = rows(8)
    return nn.Linear(4, 3), (x, y, torch.ones(8))

class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)[:, None].expand(-1, 5, -1)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, features, labels=None):
        return self.net(features)

def one_size():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.shift = nn.Linear(4, 3), nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return self.net(x) + self.shift
    return Table(), rows(6)

def positions():
    return Positions(), rows(8)

def mapping():
    x, y = rows(8)
    return Named(), {"features": x, "labels": y}

def bare():
    return nn.Linear(4, 3), rows(8)[0]

def first_position(model, batch):
    return model(batch[0])[:, 0]

def second_item(batch):
    return batch[1]

def short(batch):
    return batch[1][:3]

def broken(batch):
    return batch["nothing"]

values = torch.arange(8.0)
number = 3
"""


def doctor(path: Path, factory: str, *options: str) -> Any:
    result = CliRunner().invoke(app, ["doctor", f"{path}:{factory}", *options], env={"COLUMNS": "400"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "made.py").write_text(FACTORIES)
    (tmp_path / "other.py").write_text("def logits(model, batch):\n    return model(batch[0])[:, 0]\n")
    return tmp_path / "made.py"


SAID: dict[str, tuple[str, tuple[str, ...], int, tuple[str, ...]]] = {  # factory, options, exit code, what is said
    "fewer rows than probes": ("few", (), 0, ("probes     64,", "the batch's 6 rows, repeated", "64 probes a block")),
    "as many": ("exact", (), 0, ("probes     64,", "the rows of the batch")),
    "more": ("many", (), 0, ("the first of the batch's 200 rows", "[64, 3] float32")),
    "another number": ("many", ("--probes", "100"), 0, ("probes     100,", "[100, 3] float32", "100 probes a block")),
    "inputs and targets": ("few", (), 0, ("inputs: ", "float32 [6, 4]", "targets: item 2 of 2", "3 classes")),
    "a third item": ("third_item", (), 0, ("targets: item 2 of 3", "ignored: item 3 of 3")),
    "a mapping": ("mapping", (), 0, ("features float32 [8, 4]", "targets: labels")),
    "no targets": ("bare", (), 0, ("targets: none in the batch (targets= gives them)",)),
    "a model of one size": ("one_size", (), 1, ("PROBLEM", "size")),
    "positions": ("positions", (), 1, ("PROBLEM", "pass outputs=")),
    "outputs in the factory's file": ("positions", ("--outputs", "first_position"), 0, ("[8, 3] float32",)),
    "outputs in another": ("positions", ("--outputs", "{folder}/other.py:logits"), 0, ("[8, 3] float32",)),
    "targets that are called": ("third_item", ("--targets", "second_item"), 0, ("those given, int64 [8], 3 classes",)),
    "targets that are there": ("bare", ("--targets", "values"), 0, ("targets: those given, float32 [8]",)),
    "targets of another length": ("bare", ("--targets", "short"), 1, ("PROBLEM  --targets:",)),
    "targets that raise": ("bare", ("--targets", "broken"), 1, ("PROBLEM  --targets:", "line")),
    "no such outputs": ("few", ("--outputs", "logit"), 2, ("--outputs logit:", "has no logit", "give FILE:NAME")),
    "no such file": ("few", ("--outputs", "gone.py:f"), 2, ("--outputs gone.py:f: there is no file gone.py",)),
    "outputs that cannot be called": ("few", ("--outputs", "number"), 2, ("is a int: name a callable",)),
    "one probe": ("few", ("--probes", "1"), 2, ("--probes 1 is too few: use 2 or more",)),
    "a wrong reduction": ("few", ("--reduction", "trac"), 2, ("use one of trace, blocks, full, sum",)),
}


@pytest.mark.parametrize("case", SAID)
def test_what_the_doctor_says(case: str, made: Path) -> None:
    factory, options, code, parts = SAID[case]
    result = doctor(made, factory, *(option.format(folder=made.parent) for option in options))
    said = " ".join(result.output.split())
    assert result.exit_code == code, f"{case}: {result.output}"
    for part in parts:
        assert " ".join(part.split()) in said, f"{case}: {part!r} is not in {result.output}"


def test_the_same_as_json(made: Path) -> None:
    for factory, options, healthy in (
        ("few", (), True),
        ("positions", (), False),
        ("bare", ("--targets", "short"), False),
    ):
        result = doctor(made, factory, "--json", *options)
        told = json.loads(result.stdout)
        assert told["measurable"] is healthy is (result.exit_code == 0), factory
        assert bool(told["problems"]) is not healthy
    told = json.loads(doctor(made, "few", "--json").stdout)
    assert [row["name"] for row in told["plan"]["table"]][1:3] == ["weight", "bias"]
    assert told["plan"]["engine"] == "layerwise"
    assert told["plan"]["peak_bytes"] > 0
    assert "inputs" in told["facts"]["batch"]


def test_costs_are_those_of_as_many_probes_as_the_callback_takes(made: Path) -> None:
    def flops(factory: str, *options: str) -> float:
        told = json.loads(doctor(made, factory, "--json", *options).stdout)
        return sum(row["flops"] for row in told["plan"]["table"] if row["name"] in ("weight", "bias"))

    assert flops("few") == flops("exact") == flops("many"), "64 probes each"
    assert flops("few", "--probes", "6") < flops("few") / 16
