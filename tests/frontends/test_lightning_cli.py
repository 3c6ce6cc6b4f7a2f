"""`--trainer.callbacks=ntkwatch.NTKWatch`: every argument from LightningCLI's command line and configuration files."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ntkwatch import NTKWatch, load_run
from tests.support import ROOT
from tests.support.runs import Classifier, loaders

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse: pip install 'jsonargparse[signatures]'")


def even(step: int) -> bool:
    """For `every=`."""
    return step % 2 == 0


def two_outputs(model: Any, batch: Any):  # type: ignore[no-untyped-def]
    """For `outputs=`."""
    return model(batch[0])[:, :2]


def labels(batch: Any) -> Tensor:
    """For `targets=`."""
    return batch[1]


HERE = __name__


def parsed(arguments: list[str], name: str = "pytorch_lightning") -> tuple[NTKWatch, Any]:
    """The callback of a Trainer made by LightningCLI, and the CLI."""
    pl, cli = importlib.import_module(name), importlib.import_module(f"{name}.cli")

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier(width=8).net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    made = cli.LightningCLI(
        Module, run=False, save_config_callback=None, args=arguments, trainer_defaults={**quiet, "max_steps": 4}
    )
    (watch,) = (callback for callback in made.trainer.callbacks if isinstance(callback, NTKWatch))
    return watch, made


LOGGER = "{class_path: pytorch_lightning.loggers.CSVLogger, init_args: {save_dir: logs}}"
LOSS = "{class_path: torch.nn.CrossEntropyLoss, init_args: {label_smoothing: 0.1}}"
ARGUMENTS: list[tuple[str, str, Callable[[Any], bool]]] = [  # name, what is typed, what the settings must hold
    ("probes", "32", lambda s: s.wanted.n == 32),
    ("probes", "train", lambda s: s.wanted.split == "train"),
    ("every", "3", lambda s: s.every == 3),
    ("every", "log", lambda s: s.every == "log"),
    ("every", "[0, 5, 10]", lambda s: s.every == [0, 5, 10]),
    ("every", f"{HERE}.even", lambda s: [s.every(step) for step in range(3)] == [True, False, True]),
    ("budget", "0.1", lambda s: s.budget == 0.1),
    ("budget", "null", lambda s: s.budget is None),
    ("reduction", "blocks", lambda s: s.monitor["reduction"] == "blocks"),
    ("engine", "layerwise", lambda s: s.monitor["engine"] == "layerwise"),
    ("outputs", f"{HERE}.two_outputs", lambda s: s.monitor["outputs"].__name__ == "two_outputs"),
    ("targets", f"{HERE}.labels", lambda s: s.targets.__name__ == "labels"),
    ("loss", "torch.nn.functional.cross_entropy", lambda s: s.monitor["loss"] is torch.nn.functional.cross_entropy),
    ("loss", "torch.nn.CrossEntropyLoss", lambda s: isinstance(s.monitor["loss"], torch.nn.CrossEntropyLoss)),
    ("loss", LOSS, lambda s: s.monitor["loss"].label_smoothing == 0.1),
    ("diagnostics", "full", lambda s: s.monitor["diagnostics"] == "full"),
    ("diagnostics", "[default, loss]", lambda s: s.monitor["diagnostics"] == ["default", "loss"]),
    ("resample", "true", lambda s: s.resample is True),
    ("save_kernels", "false", lambda s: s.save_kernels is False),
    ("loggers", "[]", lambda s: s.loggers == []),
    ("loggers", f"[{LOGGER}]", lambda s: s.loggers[0].save_dir == "logs"),
    ("hparams", '{"width": 256}', lambda s: s.hparams == {"width": 256}),
    ("seed", "5", lambda s: s.seed == s.monitor["seed"] == 5),
]


def check_every_argument(name: str) -> None:
    for argument, typed, holds in ARGUMENTS:
        given = f"--trainer.callbacks.{argument}={typed.replace('pytorch_lightning', name)}"
        watch, _ = parsed(["--trainer.callbacks=ntkwatch.NTKWatch", given], name)
        assert holds(watch._settings), f"{given}: {watch._settings}"


@pytest.mark.filterwarnings("ignore")
def test_every_argument_from_the_command_line() -> None:
    check_every_argument("pytorch_lightning")


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_every_argument_where_both_import_names_are_loaded(name: str) -> None:
    """Which of the two `Callback`s the class is of is decided when ntkwatch is imported: of both, if both are there."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import lightning.pytorch, pytorch_lightning, tests.frontends.test_lightning_cli as test\n"
        f"test.check_every_argument({name!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore")
def test_every_argument_from_a_file(tmp_path: Path) -> None:
    last = {argument: typed for argument, typed, _ in ARGUMENTS}
    settings = {**last, "every": "2", "on_error": "raise", "resample": "false", "loggers": "[]"}
    body = "\n".join(f"      {argument}: {typed}" for argument, typed in settings.items())
    config = tmp_path / "config.yaml"
    config.write_text(f"trainer:\n  callbacks:\n  - class_path: ntkwatch.NTKWatch\n    init_args:\n{body}\n")
    watch, cli = parsed([f"--config={config}", f"--trainer.default_root_dir={tmp_path}"])
    for argument, typed, holds in ARGUMENTS:
        assert settings[argument] != typed or holds(watch._settings), argument
    cli.trainer.fit(cli.model, loaders()[0])
    run = load_run(watch.record)
    assert run.steps == [0, 2, 4]
    assert run.manifest["hparams"] == {"width": 256}, "without what the CLI keeps there for itself"
    assert run.manifest["n_outputs"] == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("every=0", "a number of steps (1 or more)"),
        ("every=often", 'use "log", a number of steps'),
        ("reduction=trac", "use one of 'trace', 'blocks', 'full', 'sum'"),
        (f"outputs={HERE}.nothing", "nothing"),
    ],
)
def test_a_wrong_argument_is_told_in_our_words(given: str, said: str) -> None:
    err = io.StringIO()
    with pytest.raises((ValueError, SystemExit)) as caught, contextlib.redirect_stderr(err):
        parsed(["--trainer.callbacks=ntkwatch.NTKWatch", f"--trainer.callbacks.{given}"])
    assert said in str(caught.value) + err.getvalue()
