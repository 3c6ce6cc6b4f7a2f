"""The linear forecast's script: a linear network on two gloo processes, in every way of stepping, and with faults.

`python forecast_ddp.py LAUNCHER FOLDER CASE…` writes FOLDER/CASE/rankN.json for every case; where LAUNCHER is "alone",
one process trains on the union of the two ranks' batches.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, load_run
from ntkwatch.distributed import Joined, Ranks
from ntkwatch.linearized.forecast import LinearForecast
from tests.support.trust_configs import QUIET
from tests.support.trust_harness import quieten

LAZY = ["kernel_angle", "loss_if_lazy", "forecast_error", "forecast_start_error"]
ALONE = "alone"
STEPS = 6


class Model(pl.LightningModule):
    """Linear, in float64. Rows that are not there count as none in its loss."""

    def __init__(self, configure: Callable[[Any], Any], spare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2).double()
        self.spare = nn.Linear(4, 2).double() if spare else None
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        """Rank 1 alone uses the spare layer where there is one: only under find_unused_parameters."""
        f = self.net(x)
        return f if self.spare is None or self.global_rank == 0 else f + self.spare(x)

    def ntk_loss(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum() / max(f.numel(), 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.ntk_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


def own_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def first_rows(keep: int | None, rows: list[Any]) -> Any:
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return x[:keep], y[:keep]


@dataclass(frozen=True)
class Case:
    """A way of training; `fault` is applied in each process before the fit, told its rank."""

    optimizer: Callable[[Any], Any] = lambda ps: torch.optim.SGD(ps, 0.05)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 96
    keep: int | None = None  # of rank 1's rows in every batch
    strategy: dict[str, Any] = field(default_factory=dict)
    spare: bool = False
    fault: Callable[[int], None] | None = None
    on_error: str = "raise"
    resumed: bool = False


def scheduled(ps: Any) -> Any:
    optimizer = torch.optim.SGD(ps, 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def failing(method: str, rank: int, at: int = 3) -> Callable[[int], None]:
    """LinearForecast's method raises at its `at`-th call, on one rank."""

    def fault(mine: int) -> None:
        inner, calls = getattr(LinearForecast, method), [0]

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if mine == rank and calls[0] == at:
                raise RuntimeError("no such kernel")
            return inner(self, *args, **kwargs)

        replace(LinearForecast, method, wrapped)

    return fault


def without_the_all_reduce() -> None:
    replace(Ranks, "join", lambda self, mine, like, **said: Joined(dict(mine), (), self.size))


def replace(owner: type, name: str, by: Any) -> None:
    faulty.append((owner, name, getattr(owner, name)))
    setattr(owner, name, by)


faulty: list[tuple[type, str, Any]] = []  # what is put back after a fit
EXACT: dict[str, Case] = {
    "plain": Case(),
    "heavy ball, a schedule by step": Case(scheduled),
    "AdamW": Case(lambda ps: torch.optim.AdamW(ps, 0.02)),
    "accumulation 3": Case(settings={"accumulate_grad_batches": 3, "max_epochs": 3, "max_steps": -1}, rows=112),
    "clipped by norm": Case(settings={"gradient_clip_val": 1.0}),
    "clipped by value": Case(settings={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "the last batch short": Case(settings={"max_epochs": 2, "max_steps": -1}, rows=44),
    "ranks of different sizes": Case(keep=3),
    "a rank without rows": Case(keep=0),
    "gradients as bucket views": Case(strategy={"gradient_as_bucket_view": True}),
    "unused on one rank": Case(spare=True, strategy={"find_unused_parameters": True}),
    "resumed": Case(lambda ps: torch.optim.Adam(ps, 0.02), resumed=True),
}
UNION = ("plain", "heavy ball, a schedule by step", "AdamW", "accumulation 3", "clipped by norm")  # == one process
FAULTS: dict[str, Case] = {
    f"{method} fails on rank {rank}": Case(fault=failing(method, rank, at), on_error="warn")
    for method, at in (("__init__", 1), ("add", 3), ("apply", 3), ("stepped", 2))
    for rank in (0, 1)
}
REFUSED: dict[str, Case] = {
    "a communication hook": Case(strategy={"ddp_comm_hook": fp16_compress_hook}),
}
BLIND = {"each rank its own gradients": Case(fault=lambda rank: without_the_all_reduce())}  # the negative control
CASES = EXACT | FAULTS | REFUSED | BLIND


class Calls(pl.Callback):
    """Counts the all-reduces of gradients on the forecast's own group, and the steps."""

    def __init__(self) -> None:
        self.count = self.steps = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.inner = dist.all_reduce

        def counted(tensor: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            self.count += group not in (None, dist.group.WORLD) and tensor.is_floating_point()
            return self.inner(tensor, *args, group=group, **kwargs)

        dist.all_reduce = counted

    def on_train_end(self, trainer: Any, module: Any) -> None:
        dist.all_reduce, self.steps = self.inner, trainer.global_step


def data(case: Case, alone: bool) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.rows, 4, generator=generator).double()
    y = 3 * x[:, :2] + torch.randn(case.rows, 2, generator=generator).double()
    if alone:
        return DataLoader(TensorDataset(x, y), 16)
    mine = slice(own_rank(), None, 2)
    keep = case.keep if own_rank() == 1 else None
    return DataLoader(TensorDataset(x[mine], y[mine]), 8, collate_fn=partial(first_rows, keep))


def fit(case: Case, folder: Path, alone: bool, steps: int = STEPS, ckpt: Path | None = None) -> tuple[Any, Any, Any]:
    watch = NTKWatch(
        probes=next(iter(DataLoader(data(Case(), True).dataset, 96))),
        budget=None, every=[0, 1, 2, 4, 5], diagnostics=LAZY, on_error=case.on_error,
    )  # fmt: skip
    calls = Calls()
    strategy = {"strategy": pl.strategies.DDPStrategy(**case.strategy), "devices": 2} if not alone else {}
    arguments = {**QUIET, "max_steps": steps, "default_root_dir": folder, **strategy, **case.settings}
    module = Model(case.optimizer, case.spare)
    trainer = pl.Trainer(**arguments, use_distributed_sampler=False, callbacks=[watch, calls])
    trainer.fit(module, data(case, alone), ckpt_path=ckpt)
    return trainer, watch, calls


def run(case: Case, folder: Path, alone: bool) -> None:
    rank = own_rank()
    if case.fault is not None:
        case.fault(rank)
    ckpt = None
    if case.resumed:
        trainer, *_ = fit(case, folder, alone, steps=3)
        ckpt = folder / "half.ckpt"
        trainer.save_checkpoint(ckpt)
    trainer, watch, calls = fit(case, folder, alone, ckpt=ckpt)
    while faulty:
        setattr(*faulty.pop())
    seen: dict[str, Any] = {"global_step": trainer.global_step, "count": calls.count, "steps": calls.steps}
    seen["weights"] = [p.flatten().tolist() for p in trainer.lightning_module.parameters()]
    if rank == 0:
        record = load_run(watch.record)
        seen["metrics"] = {name: record.metrics[name].tolist() for name in [*LAZY, "loss"] if name in record.metrics}
        seen["index"], seen["reasons"] = record.steps, dict(watch.last.reasons)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


def main(launcher: str, folder: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    quieten()
    for name in names:
        run(CASES[name], Path(folder) / name, launcher == ALONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
