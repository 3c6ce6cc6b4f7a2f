"""`NTKWATCH=1 python train.py`: the callback in a Trainer whose script does not know of it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ntkwatch import NTKWatch, load_run
from ntkwatch.frontends.environment import callbacks
from tests.support.runs import Classifier, loaders, trainer

SCRIPT = """
import sys
if sys.argv[1] == "lightning":
    import lightning.pytorch as pl
else:
    import pytorch_lightning as pl
made = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
loaded = "ntkwatch.frontends.lightning" in sys.modules
print("loaded" if loaded else "nothing", [type(c).__name__ for c in made.callbacks])
"""


def fitted(path: Path, *own: NTKWatch) -> tuple[torch.Tensor, list[NTKWatch]]:
    """The weights after a short run, and all watches of its Trainer."""
    torch.manual_seed(0)
    model, made = Classifier(), trainer(path, *own)
    made.fit(model, *loaders())
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return weights, [c for c in made.callbacks if isinstance(c, NTKWatch)]


@pytest.mark.parametrize(
    ("said", "steps"),
    [("1", [0, 1, 2, 3, 4]), ("every=6 probes=12", [0, 6, 12]), ("every=[0,5] budget=None", [0, 5])],
)
def test_the_variable_is_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, steps: list[int]) -> None:
    alone, none = fitted(tmp_path / "alone")
    monkeypatch.setenv("NTKWATCH", said)
    weights, (watch,) = fitted(tmp_path / "watched")
    assert not none
    assert torch.equal(weights, alone), said
    assert load_run(watch.record).steps[: len(steps)] == steps, said


@pytest.mark.parametrize("said", ["", "0", " "])
def test_without_it_there_is_nothing(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("NTKWATCH", said)
    assert callbacks() == []


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning"])
@pytest.mark.parametrize(("said", "wanted"), [("", "nothing"), ("1", "loaded")])
def test_a_script_that_does_not_know_of_it(package: str, said: str, wanted: str) -> None:
    """Both names of Lightning ask; without the variable not even the callback is imported."""
    pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, package],
        env={**os.environ, "NTKWATCH": said}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith(wanted), done.stdout
    assert ("NTKWatch" in done.stdout) is bool(said), done.stdout


class Renamed(NTKWatch):
    """A user's own kind of it."""


@pytest.mark.parametrize("kind", [NTKWatch, Renamed])
def test_a_callback_of_the_trainers_own_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[NTKWatch]
) -> None:
    monkeypatch.setenv("NTKWATCH", "1")
    own = kind(probes=12, every=6)
    with pytest.warns(UserWarning, match="an NTKWatch of its own"):
        _, watches = fitted(tmp_path, own)
    assert watches[0] is own
    assert load_run(own.record).steps == [0, 6, 12]
    assert watches[1].record is None
    assert "of its own" in watches[1].summary()


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("yes", "'yes' is no argument: say NTKWATCH=1"),
        ("everry=3", "'everry=3' is no argument"),
        ("every=often", "every"),
        ("diagnostics=['kernel_angel']", "kernel_angle"),
    ],
)
def test_what_cannot_be_understood_is_said_at_once(monkeypatch: pytest.MonkeyPatch, said: str, wanted: str) -> None:
    monkeypatch.setenv("NTKWATCH", said)
    with pytest.raises(ValueError, match="NTKWATCH") as error:
        callbacks()
    assert wanted in str(error.value), said


def test_both_names_of_lightning_find_it() -> None:
    for group in ("pytorch_lightning.callbacks_factory", "lightning.pytorch.callbacks_factory"):
        (point,) = importlib.metadata.entry_points(group=group, name="ntkwatch")
        assert point.load() is callbacks, group
