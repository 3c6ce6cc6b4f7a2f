"""Promise 3's script: the same training on two gloo processes, unwatched and then under each watcher.

`python trust_ddp.py LAUNCHER JOB FOLDER WATCHER…` writes FOLDER/WATCHER/rankN.json, "unwatched" among them.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.nn.functional import cross_entropy

from tests.support.trust_configs import QUIET, Job, streamed, task
from tests.support.trust_harness import Driver, MonitorProbe, final_state, quieten, real_kernel, seed_all
from tests.support.trust_mutants import backward
from tests.support.trust_observe import Closing, Observation, Opening

DDP_JOBS = [
    Job("plain", task()),
    Job("accumulation 3", task(), {"accumulate_grad_batches": 3}),
    Job("manual, 2 optimizers", task("manual")),
    Job("stream", task(), loaders=streamed),  # the ranks agree on when rank 0 has enough of its rows
    Job("gradients as bucket views", task()),  # .grad is a view of the reducer's bucket
]
LAUNCHERS = {"ddp": "popen", "ddp_spawn": "spawn"}
UNWATCHED = "unwatched"
NAIVE = "naive"  # a probe that leaves its gradients: the harness must see it on both ranks
FORECAST = "NTKWatch with its forecast"
WATCHERS = ["NTKWatch", FORECAST, "on_train_batch_start", "on_after_backward"]


class Report(pl.Callback):
    """Last of the callbacks, in every process: writes what this rank saw and whether its watcher recorded."""

    def __init__(self, path: Path, seen: Observation, watcher: Any) -> None:
        self.path, self.seen, self.watcher = path, seen, watcher

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.seen.final = final_state(trainer, module)
        missing = why_missing(self.watcher, trainer.global_rank)
        self.path.mkdir(parents=True, exist_ok=True)
        written = {**asdict(self.seen), "missing": missing, "world": trainer.world_size}
        (self.path / f"rank{trainer.global_rank}.json").write_text(json.dumps(written))


def why_missing(watcher: Any, rank: int) -> str | None:
    """Why this rank counts as not recorded: every rank's Monitor must measure, NTKWatch writes on rank 0 alone."""
    if isinstance(watcher, Driver) and isinstance(watcher.measure, MonitorProbe):
        return watcher.measure.missing()
    if rank != 0 or watcher is None or isinstance(watcher, Driver):
        return None
    from ntkwatch import load_run

    if watcher.record is None:
        return "rank 0 has no record"
    run = load_run(watcher.record)
    good = len(run.steps) >= 2 and all(real_kernel(run.kernel(step)) for step in run.steps)
    lazy = run.metrics.get("loss_if_lazy")
    if lazy is not None and not lazy.notna().all() and "optimiz" not in run.reasons[run.steps[-1]]["loss_if_lazy"]:
        return f"no forecast: {run.reasons[run.steps[-1]]}"
    return None if good else f"the record holds the steps {run.steps}"


def watch(name: str) -> list[Any]:
    """The watching callbacks: none, NTKWatch, or a Monitor in the hook of that name."""
    if name == UNWATCHED:
        return []
    if name == NAIVE:
        return [Driver("on_after_backward", backward)]
    if name == "NTKWatch":
        from ntkwatch import NTKWatch

        return [NTKWatch(probes=6, every=[1, 2], budget=None, on_error="raise")]
    if name == FORECAST:
        from ntkwatch import NTKWatch

        names = ["default", "loss_if_lazy", "forecast_error"]
        return [NTKWatch(6, [1, 2], None, diagnostics=names, loss=cross_entropy, on_error="raise")]
    return [Driver(name, MonitorProbe("layerwise"))]


def fit(launcher: str, job: Job, folder: Path, name: str) -> None:
    seed_all(11)
    module, (train, val) = job.build("pytorch_lightning"), job.loaders()
    callbacks = watch(name)
    opening, seen = Opening(), Observation()
    report = Report(folder / name, seen, *(callbacks or [None]))
    views = job.name == "gradients as bucket views"
    strategy = pl.strategies.DDPStrategy(start_method=LAUNCHERS[launcher], gradient_as_bucket_view=views)
    arguments = {**QUIET, "devices": 2, "strategy": strategy, "max_epochs": 2, "default_root_dir": folder / name}
    trainer = pl.Trainer(
        **{**arguments, **job.trainer}, callbacks=[opening, *callbacks, Closing(opening, seen), report]
    )
    trainer.fit(module, train, val)


def main(launcher: str, job_name: str, folder: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    quieten()
    job = next(job for job in DDP_JOBS if job.name == job_name)
    for name in [UNWATCHED, *names]:
        fit(launcher, job, Path(folder), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
