"""Promise 21's script: a real signal in every phase of a probe, and in an unwatched run at the same place.

`python trust_signals.py FOLDER` runs all cells in one process and writes FOLDER/seen.json; with "ddp" after it, SIGTERM
reaches rank 0 of two processes in the middle of a probe, and FOLDER/rankN.json is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ntkwatch import NTKWatch, load_run
from tests.support.trust_configs import QUIET
from tests.support.trust_harness import quieten
from tests.support.trust_observe import digest
from tests.support.trust_ranks import EVERY, PHASES, data, own_rank

BEFORE = "before a probe"  # in a hook of the run's own, so that a probe that is due must not begin
# In which of the run's hooks a phase is, and at which batch: where the unwatched run gets the signal.
PLACES = {
    "choosing probes": ("on_train_start", 0), "preparing": ("on_train_start", 0),
    "self-check": ("on_train_batch_start", 0), "baseline": ("on_train_batch_start", 0),
    "a probe": ("on_train_batch_end", 1), "writing": ("on_train_batch_end", 1), "logging": ("on_train_batch_end", 2),
    "the last probe": ("on_train_end", 0), BEFORE: ("on_train_batch_end", 1),
}  # fmt: skip
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class Model(pl.LightningModule):
    """Notes the passes in evaluation mode that begin once a signal has been sent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and sent:
            late.append("a pass")
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


sent: list[str] = []
late: list[str] = []


def send(name: str) -> None:
    sent.append(name)
    os.kill(os.getpid(), getattr(signal, name))


class Sends(pl.Callback):
    """The signal in the run's own hooks, where the watched run has its probe."""

    def __init__(self, place: tuple[str, int], name: str) -> None:
        self.hook, self.batch, self.name = *place, name

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._send("on_train_start", 0)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._send("on_train_batch_start", batch_idx)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._send("on_train_batch_end", batch_idx)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._send("on_train_end", 0)

    def _send(self, hook: str, batch: int) -> None:
        if (hook, batch) == (self.hook, self.batch):
            send(self.name)


@contextlib.contextmanager
def sending(phase: str, name: str) -> Iterator[None]:
    """The signal comes as the phase begins."""
    function, at, _ = PHASES[phase]
    inner, calls = pkgutil.resolve_name(function), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            send(name)
        return inner(*args, **kwargs)

    with mock.patch(function, wrapped):
        yield


@contextlib.contextmanager
def handlers(model: Model, seen: dict[str, Any]) -> Iterator[None]:
    """A user's own handler of SIGUSR1, as one that saves a checkpoint; all as before afterwards."""

    def note(*_: Any) -> None:
        modes = [module.training for module in model.modules()]
        seen["handled"] = {"training": all(modes), "grad": torch.is_grad_enabled()}

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)}
    signal.signal(signal.SIGUSR1, note)
    try:
        yield
        seen["handlers"] = signal.getsignal(signal.SIGUSR1) is note
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(phase: str, name: str, folder: Path, watched: bool, **settings: Any) -> dict[str, Any]:
    sent.clear(), late.clear()
    torch.manual_seed(2)
    model, seen = Model(), {"error": "none"}
    watch = NTKWatch(probes=6, every=EVERY, budget=None)
    sends = [Sends(PLACES[phase], name)] if not watched or phase == BEFORE else []
    callbacks = [*sends, watch] if watched else sends
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "default_root_dir": folder, **settings}, callbacks=callbacks)
    with handlers(model, seen), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with sending(phase, name) if watched and not sends else contextlib.nullcontext():
                trainer.fit(model, data())
        except BaseException as error:
            seen["error"] = type(error).__name__
    seen |= {"weights": digest(model.state_dict()), "steps": trainer.global_step, "training": model.net.training}
    seen |= {"sent": list(sent), "late": len(late), "random": digest(torch.get_rng_state())}
    seen["said"] = [str(each.message) for each in said if "NTKWatch" in str(each.message)]
    seen["measured"] = load_run(watch.record).steps if watched and watch.record is not None else []
    return seen


def main(folder: str, *ddp: str) -> None:
    warnings.simplefilter("ignore")
    quieten()
    place = Path(folder)
    if ddp:
        strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
        name = "SIGTERM" if own_rank() == 0 else "SIGCONT"  # rank 1's comes from Lightning, on rank 0's behalf
        seen = run("a probe", name, place, ddp == ("watched",), devices=2, strategy=strategy)
        (place / f"{ddp[0]}{own_rank()}.json").write_text(json.dumps(seen))
        return
    cells: dict[str, list[dict[str, Any]]] = {}
    for phase in PLACES:
        for name in SIGNALS:
            cells[f"{phase}, {name}"] = [run(phase, name, place / phase / name, watched) for watched in (False, True)]
    (place / "seen.json").write_text(json.dumps(cells))


if __name__ == "__main__":
    main(*sys.argv[1:])
