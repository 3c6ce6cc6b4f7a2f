"""What a monitor could leave in the process around a run: plots, environment, threads, files, signals, references."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from tests.support.trust_configs import QUIET, PytorchLightningTask, loader
from tests.support.trust_harness import quieten, seed_all
from tests.support.trust_observe import digest, first_differences

LOGGERS = ("", "pytorch_lightning", "lightning.pytorch", "matplotlib", "tensorboard")


def surroundings() -> dict[str, str]:
    """What belongs to the process and not to the run."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    return {
        "environment": digest(dict(os.environ)),
        "directory": os.getcwd(),
        "signals": repr([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]),
        "threads": str(threading.active_count()),
        "warning filters": repr(warnings.filters),
        "logging": repr([(log.level, log.handlers, log.disabled) for log in loggers]),
        "backend": mpl.get_backend(),
        "rc parameters": repr(dict(mpl.rcParams)),
        "figures": repr(plt.get_fignums()),
        "numpy errors": repr(np.geterr()),
        "print options": repr((np.get_printoptions(), vars(torch._tensor_str.PRINT_OPTS))),
        "garbage collection": repr((gc.isenabled(), gc.get_threshold())),
        "hooks of the interpreter": repr((sys.excepthook, sys.unraisablehook, threading.excepthook)),
    }


def fit(callback: Any, folder: Path, *more: Any, module: Any = None, **arguments: Any) -> Any:
    quieten()
    seed_all(7)
    trainer = pl.Trainer(
        **{**QUIET, "max_epochs": 2, "default_root_dir": folder, **arguments}, callbacks=[callback, *more]
    )
    trainer.fit(PytorchLightningTask() if module is None else module, loader(24, 1, True), loader(8, 2, False))
    return trainer


def watch(**arguments: Any) -> Any:
    from ntkwatch import NTKWatch

    return NTKWatch(**{"probes": 6, "every": 1, "budget": None, "on_error": "raise", **arguments})


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    """Pictures and TensorBoard included; the user has a figure of their own open."""
    fit(watch(), tmp_path / "first", logger=pl.loggers.TensorBoardLogger(tmp_path / "first"))  # imports, first uses
    plt.figure(7)
    try:
        before = surroundings()
        files = set(os.listdir(Path.cwd()))
        fit(watch(), tmp_path / "second", logger=pl.loggers.TensorBoardLogger(tmp_path / "second"))
        assert first_differences(before, surroundings()) == []
        assert plt.gcf().number == 7, "the user's current figure"
        assert set(os.listdir(Path.cwd())) == files, "a file in the working directory"
    finally:
        plt.close(7)


def reachable(root: object) -> list[Any]:
    """Everything that `root` keeps alive, but for modules, classes and what functions see as globals."""
    found, todo = {id(root): root}, [root]
    while todo:
        thing = todo.pop()
        for other in (thing.__closure__ or ()) if isinstance(thing, FunctionType) else gc.get_referents(thing):
            if id(other) not in found and not isinstance(other, type | ModuleType):
                found[id(other)] = other
                todo.append(other)
    return list(found.values())


def test_after_fit_the_callback_holds_neither_model_nor_trainer(tmp_path: Path) -> None:
    callback = watch()
    fit(callback, tmp_path)
    assert callback.last is not None
    for name in ("log", "log_dict"):
        vars(callback).pop(name, None)  # Lightning's own: it gives every callback the module's
    held = {type(thing).__name__ for thing in reachable(callback) if isinstance(thing, torch.nn.Module | pl.Trainer)}
    assert held == set()


class Raises(pl.Callback):
    """The user's own error at the third batch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            raise ZeroDivisionError("of the user's")


def test_the_users_error_comes_through(tmp_path: Path) -> None:
    callback = watch()
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        fit(callback, tmp_path, Raises())
    assert callback.record is not None
    from ntkwatch import load_run

    assert load_run(callback.record).steps == [0, 1, 2]


def test_an_interrupt_in_a_probe_ends_the_run_as_lightning_does(tmp_path: Path) -> None:
    """Not swallowed as a failing probe; what the guard protects is back."""
    callback, module = watch(engine="layerwise"), PytorchLightningTask()
    module.net.norm.eval()
    module.net.register_forward_pre_hook(lambda net, args: interrupt(net))

    def interrupt(net: Any) -> None:
        if not net.training and callback._runner.step == 3 and not net.checkpointed:
            net.checkpointed = True  # once; the guard puts it back
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(callback, tmp_path, module=module)
    assert [module.net.training, module.net.norm.training, module.net.checkpointed] == [True, False, False]


@pytest.mark.parametrize("again", ["fit", "validate"])
def test_a_second_call_of_the_trainer(tmp_path: Path, again: str) -> None:
    """One callback, one trainer, used again: the second part of training is the unwatched one's too."""

    def twice(callbacks: list[Any]) -> str:
        quieten()
        seed_all(7)
        module, folder = PytorchLightningTask(), tmp_path / f"{len(callbacks)}"
        trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "default_root_dir": folder}, callbacks=callbacks)
        trainer.fit(module, loader(24, 1, True), loader(8, 2, False))
        if again == "validate":
            trainer.validate(module, loader(8, 2, False), verbose=False)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, loader(24, 1, True), loader(8, 2, False))
        return digest(module.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state())

    callback = watch()
    assert twice([]) == twice([callback])
    assert callback.last is not None
    assert callback.last.global_step == 24


def test_the_learning_rate_finder_finds_the_same(tmp_path: Path) -> None:
    """It trains, puts the weights back from a checkpoint, and trains again, with the callback in place."""

    def found(callbacks: list[Any]) -> tuple[float, str]:
        quieten()
        seed_all(7)
        module = PytorchLightningTask()
        module.lr = 0.01
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=module.lr)
        trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "default_root_dir": tmp_path}, callbacks=callbacks)
        tuner = pl.tuner.Tuner(trainer)
        best = tuner.lr_find(module, loader(24, 1, True), loader(8, 2, False), num_training=20).suggestion()
        trainer.fit(module, loader(24, 1, True), loader(8, 2, False))
        return best, digest(module.state_dict())

    assert found([]) == found([watch()])
