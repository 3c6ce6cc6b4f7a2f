"""Promise 7's script: a rank that fails, is slow, missing, of another mind, or communicates; two gloo processes.

`python trust_ranks.py FOLDER CELL…` writes FOLDER/CELL/rankN.json: how this rank trained with the callback and without,
what the callback said and what it measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import pkgutil
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, load_run
from tests.support.trust_configs import QUIET
from tests.support.trust_harness import quieten
from tests.support.trust_ranks_models import FORWARDS, REFUSED, all_reduce

STEPS = 5
EVERY = [0, 2, 3]  # and the last, 5
Fault = Callable[[], contextlib.AbstractContextManager[Any]]


class Planted(Exception):
    """What fails."""


class Model(pl.LightningModule):
    """A small classifier; after its net it does what FORWARDS has of that name, and in evaluation `slow` before it."""

    def __init__(self, forward: str, slow: Callable[[], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.after, self.slow, self.kept = FORWARDS[forward], slow, SimpleNamespace()

    def configure_model(self) -> None:
        """Sharded where the strategy has a mesh to shard over; once: Lightning calls it again."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            if mesh["data_parallel"].size() > 1:
                fully_shard(self.net, mesh=mesh["data_parallel"])
            else:
                parallelize_module(self.net, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})

    def on_fit_start(self) -> None:
        groups = [dist.new_group([each], backend="gloo") for each in (0, 1)] if self.after is FORWARDS["of_one"] else []
        self.kept = SimpleNamespace(**({"one": groups[self.global_rank]} if groups else {}))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.slow()
        return self.after(self, self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def own_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


@dataclass(frozen=True)
class Cell:
    """A watched run.

    Attributes:
        settings: of NTKWatch on a rank; None where that rank has no callback.
        fault: entered around the run, in each process.
        timeout: seconds that ranks wait for each other in our group.
    """

    settings: Callable[[int], dict[str, Any] | None] = lambda rank: {}
    fault: Fault = contextlib.nullcontext
    forward: str = "plain"
    slow: Callable[[], object] = lambda: None
    timeout: float = 60.0
    sharded: tuple[int, int] | None = None  # over how many ranks data and tensors are parallel


# ── a rank that fails in a phase ───────────────────────────────────────────────────────────────────────────────────
PHASES: dict[str, tuple[str, int, str]] = {  # on rank 0, what fails and at which call; what the ranks then do together
    "choosing probes": ("ntkwatch.frontends.session_setup.probing.choose_probes", 1, "the look at model and probes"),
    "preparing": ("ntkwatch.watching.setup.Monitor", 1, "the look at model and probes"),
    "self-check": ("ntkwatch.engines.auto.self_check", 1, "settling the baseline"),
    "baseline": ("ntkwatch.measurement.monitor.Monitor.measure", 1, "the baseline probe"),
    "a probe": ("ntkwatch.measurement.monitor.Monitor.measure", 2, "the probe at step 2"),
    "writing": ("ntkwatch.record.RecordWriter.append", 2, "the probe at step 2"),
    "logging": ("ntkwatch.loggers.group.LoggerGroup.write", 3, "the probe at step 3"),
    "the last probe": ("ntkwatch.measurement.monitor.Monitor.measure", 4, "the probe at step 5"),
}
KINDS: dict[str, Exception] = {"an error": Planted("no such thing"), "memory": MemoryError("can't allocate memory")}


def failing(name: str, at: int, error: Exception) -> contextlib.AbstractContextManager[Any]:
    """What has that name raises at its `at`-th call."""
    inner, calls = pkgutil.resolve_name(name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise error
        return inner(*args, **kwargs)

    return mock.patch(name, wrapped)


def deaf(to: str, error: Exception) -> contextlib.AbstractContextManager[Any]:
    """This rank cannot take what rank 0 sends of that."""
    inner = NTKWatch._together

    def loads(_: bytes) -> Any:
        raise error

    def wrapped(watch: NTKWatch, trainer: Any, what: str, *args: Any, **kwargs: Any) -> None:
        torn = SimpleNamespace(dumps=pickle.dumps, loads=loads)
        with mock.patch("ntkwatch.distributed.pickle", torn) if what == to else contextlib.nullcontext():
            inner(watch, trainer, what, *args, **kwargs)

    return mock.patch("ntkwatch.frontends.lightning.NTKWatch._together", wrapped)


def fails(phase: str, where: int, error: Exception) -> Cell:
    name, at, together = PHASES[phase]

    def fault() -> contextlib.AbstractContextManager[Any]:
        if own_rank() != where:
            return contextlib.nullcontext()
        return failing(name, at, error) if where == 0 else deaf(together, error)

    return Cell(fault=fault)


FAILS = {
    f"{phase}, rank {where}, {kind}": fails(phase, where, error)
    for phase in PHASES for where in (0, 1) for kind, error in KINDS.items()
}  # fmt: skip

# ── a model that communicates ──────────────────────────────────────────────────────────────────────────────────────
COLLECTIVES = {f"forward: {name}": Cell(forward=name) for name in REFUSED} | {
    "outputs=": Cell(lambda rank: {"outputs": lambda model, batch: all_reduce(model, model.net(batch[0]))}),
    "loss=": Cell(lambda rank: {"diagnostics": ["loss"], "loss": lambda f, y: all_reduce(None, f).square().mean()}),
}
LEGAL = {
    "a group of one": Cell(forward="of_one"),
    "the remedy": Cell(lambda rank: {"outputs": lambda model, batch: model.net(batch[0])}, forward="all_gather"),
    "the forecast": Cell(
        lambda rank: {"diagnostics": ["default", "loss_if_lazy"], "loss": nn.functional.cross_entropy}
    ),
}


# ── a slow probe ───────────────────────────────────────────────────────────────────────────────────────────────────
def step_by_step() -> None:
    """Three seconds in many operations."""
    for _ in range(60):
        time.sleep(0.05)
        torch.ones(1).add_(1)


def foreseen(seconds: float) -> Fault:
    return lambda: mock.patch("ntkwatch.measurement.monitor.Monitor.foreseen", return_value=seconds)


SLOW = {
    "foreseen": Cell(fault=foreseen(1000.0)),
    "in many operations": Cell(slow=step_by_step, timeout=2.0),
    "in one": Cell(slow=lambda: time.sleep(4), timeout=2.1),
}


# ── ranks of several minds ─────────────────────────────────────────────────────────────────────────────────────────
def on_rank_1(step: int) -> bool:
    if own_rank() == 1:
        raise Planted("rank 1 is asked")
    return step in EVERY


def at_step_3(step: int) -> bool:
    if step == 3:
        raise Planted("no such step")
    return step in EVERY


EVERIES: dict[str, Callable[[int], Any]] = {  # of the rank; rank 0's is EVERY
    "lists that differ": lambda rank: EVERY if rank == 0 else [0, 1, 4],
    "a list and a number": lambda rank: EVERY if rank == 0 else 1,
    "a function and a list": lambda rank: (lambda step: step in EVERY) if rank == 0 else [0, 1],
    "a list and a function": lambda rank: EVERY if rank == 0 else on_rank_1,
    "a function that fails on rank 1": lambda rank: on_rank_1,
    "a function that fails on rank 0": lambda rank: at_step_3,
    "a random function": lambda rank: lambda step: random.random() < 0.5,
}
MINDS = {f"every: {name}": Cell(lambda rank, e=every: {"every": e(rank)}) for name, every in EVERIES.items()}
MISSING = {
    "no callback on rank 1": Cell(lambda rank: {} if rank == 0 else None, timeout=1.0),
    "no callback on rank 0": Cell(lambda rank: {} if rank == 1 else None, timeout=1.1),
}
SHARDED = {"FSDP2": Cell(sharded=(2, 1)), "tensor parallel": Cell(sharded=(1, 2))}
CELLS = SHARDED | FAILS | COLLECTIVES | LEGAL | SLOW | MINDS | MISSING


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2 * 8 * STEPS, 6, generator=generator), torch.arange(2 * 8 * STEPS) % 3
    return DataLoader(TensorDataset(x, y), 8)


def fit(cell: Cell, folder: Path, callbacks: list[Any]) -> tuple[str, int]:
    """(weights and random state, steps) of this rank at the end."""
    torch.manual_seed(2), random.seed(3)
    model = Model(cell.forward, cell.slow)
    strategy: Any = pl.strategies.DDPStrategy(process_group_backend="gloo")
    if cell.sharded is not None:
        strategy = pl.strategies.ModelParallelStrategy(*cell.sharded, process_group_backend="gloo")
    arguments = {**QUIET, "devices": 2, "strategy": strategy, "max_epochs": 1, "default_root_dir": folder}
    trainer = pl.Trainer(**arguments, callbacks=callbacks)
    trainer.fit(model, data())
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    weights = pickle.dumps([*(p.detach().numpy().tobytes() for p in parts), torch.get_rng_state().numpy()])
    return hashlib.sha256(weights).hexdigest(), trainer.global_step


def run(cell: Cell, folder: Path, number: int) -> None:
    unwatched = fit(cell, folder, [])
    settings = cell.settings(own_rank())
    watches = [] if settings is None else [NTKWatch(**{"probes": 6, "every": EVERY, "budget": None, **settings})]
    timeout = mock.patch("ntkwatch.distributed.TIMEOUT", cell.timeout + number / 1000)  # a group of this cell's own
    began = time.perf_counter()
    with timeout, cell.fault(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        watched = fit(cell, folder, watches)
    seen: dict[str, Any] = {"same": unwatched == watched, "steps": watched[1], "seconds": time.perf_counter() - began}
    seen["said"] = [str(each.message) for each in said if "NTKWatch" in str(each.message)]
    record = watches[0].record if watches else None
    seen["measured"] = load_run(record).steps if record is not None and own_rank() == 0 else []
    (folder / f"rank{own_rank()}.json").write_text(json.dumps(seen))


def main(folder: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    quieten()
    for number, name in enumerate(names):
        place = Path(folder) / str(list(CELLS).index(name))
        place.mkdir(parents=True, exist_ok=True)
        run(CELLS[name], place, number)


if __name__ == "__main__":
    main(*sys.argv[1:])
