"""The planted bugs of `make mutants`: all can be planted, a sample is planted, and the harness itself can see."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from tests.mutants.planting import Bug, PlantingError, Source
from tests.mutants.running import ROOT, Workspace
from tests.mutants.table import BUGS

SAMPLE = random.Random(0).sample(BUGS, 5)
SOURCE = Source(ROOT / "ntkwatch")
HALF = Bug(
    "half a distance",
    "a control: nothing is changed",
    "nothing",
    old="ANY ** 2 / 2",
    new="ANY ** 2 / 2",
    within="kernel_distance",
    tests="metrics/test_distance.py::test_distance_of_identity_and_identity_plus_ones",
)


def _fault(bug: Bug) -> str | None:
    """Why a bug cannot be planted or seen, None where it can."""
    try:
        path, text = SOURCE.planted(bug)
    except PlantingError as error:
        return str(error)
    if ast.unparse(ast.parse(SOURCE.texts[path])) == text:
        return f"{bug.name}: it changes nothing"
    for test in bug.selection:
        file, _, name = test.partition("::")
        if f"def {name.partition('[')[0]}(" not in (ROOT / file).read_text():
            return f"{bug.name}: there is no test {test}"
    return None


def test_every_bug_can_be_planted() -> None:
    """A bug whose pattern was rewritten, moved apart or doubled needs a new one in tests/mutants."""
    assert [fault for bug in BUGS if (fault := _fault(bug)) is not None] == []
    assert len({bug.name for bug in BUGS}) == len(BUGS), "two bugs share a name"


@pytest.mark.parametrize("bug", SAMPLE, ids=lambda bug: bug.name)
def test_a_sample_is_caught(bug: Bug, tmp_path: Path) -> None:
    outcome = Workspace(tmp_path).run(bug)
    assert outcome.caught, f"{bug.what}: {outcome.said}"


def test_what_changes_nothing_survives(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    outcome = workspace.run(HALF)
    assert not outcome.caught
    assert outcome.said == "SURVIVES"


@pytest.mark.parametrize("old", ["kernel_that_nobody_wrote(k)", "return None"], ids=["nowhere", "in many places"])
def test_a_pattern_that_is_not_found_once_is_an_error(old: str) -> None:
    bug = Bug("lost", "", "", old=old, new="pass", tests="")
    with pytest.raises(PlantingError, match="must occur once"):
        SOURCE.planted(bug)


@pytest.mark.parametrize(
    ("old", "new", "code", "wanted"),
    [
        ("f(ANY, 2)", "g(ANY)", "x = f( a.b,\n  2 )  # a comment", "x = g(a.b)"),
        ("ANY < ANY", "True", "if a < b: pass\nif c < c: pass", "if a < b:\n    pass\nif True:\n    pass"),
        ("a = 1; b = ANY", "b = 2", "def f():\n  x = 0\n  a = 1\n  b = y", "def f():\n    x = 0\n    b = 2"),
        ("1", "2", "def f(): return 1\ndef g(): return 1", "def f():\n    return 1\n\ndef g():\n    return 2"),
    ],
    ids=["layout", "the same twice", "statements", "within"],
)  # fmt: skip
def test_patterns_are_of_syntax(old: str, new: str, code: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "somewhere.py").write_text(code)
    within = "g" if "def g" in code else None
    assert Source(tmp_path).planted(Bug("", "", "", old=old, new=new, tests="", within=within))[1] == wanted
