"""Runs a job with and without a watcher and compares the two bit for bit.

`observe(job, import name, watch)` trains once, seeded, with the callbacks that `watch()` gives between `Opening` and
`Closing`; `reference` is the same without a watcher, trained once per job. `Driver` calls a measurement in any hook.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning
import torch
from torch import Tensor

from tests.support.trust_configs import FEATURES, IMPORT_NAMES, JOBS, QUIET, Job
from tests.support.trust_observe import Closing, Observation, Opening, digest, process, rng, state

Watch = Callable[[], list[Any]]
UNWATCHED: Watch = list
PROBES = 4
FIRES = (0, 1, 4, 9)
"""The calls of a hook at which a driver measures: the first, the next, and two later ones."""


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def quieten() -> None:
    """One thread, so that sums have one order; no chatter; undoes what Trainer(deterministic=True) leaves behind."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def observe(job: Job, import_name: str = "pytorch_lightning", watch: Watch = UNWATCHED, seed: int = 7) -> Observation:
    """Train `job` once. An exception ends the observation and is part of it."""
    quieten()
    seen = Observation()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _train(job, import_name, watch, seed, Path(folder), seen)
        except Exception as error:
            seen.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        seen.warnings = [str(warning.message) for warning in said]
    quieten()
    return seen


def _train(job: Job, import_name: str, watch: Watch, seed: int, folder: Path, seen: Observation) -> None:
    if job.compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    checkpoint = None
    if job.resumed:
        trainer = _fit(job, import_name, watch, seed, folder, seen, epochs=job.epochs // 2)
        checkpoint = folder / "first.ckpt"
        trainer.save_checkpoint(checkpoint)
        saved = torch.load(checkpoint, weights_only=True)  # a watcher's state must not make the user's file unreadable
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step")
        seen.moments.append(("checkpoint", {key: digest(saved[key]) for key in kept}))
    _fit(job, import_name, watch, seed + 1, folder, seen, epochs=job.epochs, checkpoint=checkpoint)


def _fit(
    job: Job,
    import_name: str,
    watch: Watch,
    seed: int,
    folder: Path,
    seen: Observation,
    epochs: int,
    checkpoint: Path | None = None,
) -> Any:
    pl = IMPORT_NAMES[import_name]
    seed_all(seed)
    module, (train, val) = job.build(import_name), job.loaders()
    opening = Opening()
    callbacks = [*job.callbacks(pl), opening, *watch(), Closing(opening, seen)]
    arguments = {**QUIET, "max_epochs": epochs, "default_root_dir": folder, **job.trainer}
    trainer = pl.Trainer(**arguments, callbacks=callbacks)
    fitted = torch.compile(module, backend="aot_eager") if job.compiled else module
    trainer.fit(fitted, train, val, ckpt_path=checkpoint)
    seen.final = final_state(trainer, module)
    if job.compiled:
        seen.final["compiled graphs"] = str(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return trainer


def final_state(trainer: Any, module: Any) -> dict[str, str]:
    """Everything that training leaves: model, optimizers, schedulers, logged values, progress, RNG, switches, hooks."""
    last = {**state(module), **rng(), **process()}
    for i, optimizer in enumerate(trainer.optimizers):
        last[f"optimizer/{i}"] = digest(optimizer.state_dict())
        last[f"optimizer/{i}/hooks"] = str([len(optimizer.__dict__.get(k, ())) for k in OPTIMIZER_TABLES])
    for i, config in enumerate(trainer.lr_scheduler_configs):
        last[f"scheduler/{i}"] = digest(config.scheduler.state_dict())
    for name, value in trainer.callback_metrics.items():
        if not name.startswith("ntk"):
            last[f"metric/{name}"] = digest(value)
    last["progress"] = digest([trainer.global_step, trainer.current_epoch, trainer.fit_loop.state_dict()])
    return last


OPTIMIZER_TABLES = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks")


@cache
def reference(name: str, import_name: str = "pytorch_lightning") -> Observation:
    """The unwatched run of the job called `name`, trained once."""
    return observe(job_named(name), import_name)


def job_named(name: str) -> Job:
    return next(job for job in JOBS if job.name == name)


class Driver(pytorch_lightning.Callback):
    """Calls `measure(module, step)` in one hook, at the calls in `FIRES`, and keeps what it gave."""

    def __init__(self, hook: str, measure: Callable[[Any, int], Any], fires: Sequence[int] = FIRES) -> None:
        self.measure, self.fires = measure, fires
        self.calls = 0
        self.results: list[Any] = []
        setattr(self, hook, self._fire)

    def _fire(self, trainer: Any, module: Any, *args: Any, **named: Any) -> None:
        call, self.calls = self.calls, self.calls + 1
        if call in self.fires:
            self.results.append(self.measure(module, call))


class MonitorProbe:
    """What a cell of promise 1 measures: a Monitor made in the hook, over fixed probes, then `measure(step)`."""

    def __init__(self, engine: str, **arguments: Any) -> None:
        self.engine, self.arguments = engine, arguments
        self.monitor: Any = None
        self.kernels: list[Tensor] = []
        self.refusal: str | None = None
        self.shape: tuple[int, ...] = (FEATURES,)

    def __call__(self, module: Any, step: int) -> None:
        from ntkwatch.engines import UnsupportedModel
        from ntkwatch.measurement.monitor import Monitor

        if self.refusal is not None:
            return
        try:
            if self.monitor is None:
                self.monitor = Monitor(module, fixed_probes(module, self.shape), engine=self.engine, **self.arguments)
            self.kernels.append(self.monitor.measure(step).kernel)
        except UnsupportedModel as refusal:
            self.refusal = str(refusal)

    def missing(self, at_least: int = 2) -> str | None:
        """Why this does not count as recorded; None where there are enough kernels, each finite and not all zero."""
        bad = [k for k in self.kernels if not real_kernel(k)]
        if self.refusal is not None or bad:
            return self.refusal or f"{len(bad)} of {len(self.kernels)} kernels are zero or not finite"
        return None if len(self.kernels) >= at_least else f"{len(self.kernels)} kernels"


def fixed_probes(module: Any, shape: tuple[int, ...] = (FEATURES,)) -> tuple[Tensor, Tensor]:
    """(x, y): the same few inputs and classes, drawn from an own generator, in the module's type."""
    generator = torch.Generator().manual_seed(3)
    weight = next(p for p in module.parameters() if p.is_floating_point())
    return torch.randn(PROBES, *shape, generator=generator).to(weight.dtype), torch.tensor([0, 1, 2, 1])


def real_kernel(kernel: Tensor) -> bool:
    return bool(torch.isfinite(kernel).all()) and float(kernel.abs().max()) > 0 and math.prod(kernel.shape) > 0


@dataclass
class Tally:
    """Counts over a sweep and the faults found, each a sentence that names its cell."""

    cells: int = 0
    recorded: int = 0
    refused: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)

    def compare(self, name: str, before: Observation, after: Observation) -> None:
        fault = before.difference(after) or (after.violations[0] if after.violations else None)
        if before.error or before.losses == 0:
            fault = f"the unwatched run itself did not train: {before.error}"
        self.cells += 1
        if fault:
            self.differ.append(f"{name}: {fault}")

    def line(self, promise: str, unit: str = "cells") -> str:
        refused = f" ({len(self.refused)} named refusals)" if self.refused else ""
        return f"{promise}: {self.cells} {unit}, {self.recorded} recorded, {len(self.differ)} differ{refused}"

    def faults(self) -> str:
        return "\n".join([*self.differ, *(f"not recorded: {name}" for name in self.unrecorded)])
