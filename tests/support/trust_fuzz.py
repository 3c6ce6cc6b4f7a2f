"""Promise 2's random configurations: `draw(seed)` gives a job, the watcher over it, and the choices in words."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.support.trust_configs import CLASSES, FEATURES, HOOKS, Augmented, Job, Net, PytorchLightningTask
from tests.support.trust_harness import Driver, MonitorProbe, real_kernel

SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (FEATURES,),
    "conv": (2, 6, 6),
    "attention": (5, 4),
    "gru": (5, 4),
    "tied": (FEATURES,),
}


class Conv(nn.Sequential):
    def __init__(self, norm: nn.Module) -> None:
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, CLASSES))
        super().__init__(nn.Conv2d(2, 4, 3, padding=1), norm, nn.ReLU(inplace=True), *pool)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.cell(x)[0][:, -1], 0.1, self.training))


class Tied(nn.Module):
    """One weight used twice, the second time transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.tanh(self.body(x)), 0.1, self.training)
        return self.head(F.linear(h, self.body.weight.t()))


MODELS: dict[str, Callable[[random.Random], nn.Module]] = {
    "mlp": lambda pick: Net(width=pick.choice([3, 8]), checkpointed=False),
    "conv": lambda pick: Conv(pick.choice([nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])),
    "attention": lambda pick: Attention(),
    "gru": lambda pick: Gru(),
    "tied": lambda pick: Tied(),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
}


@dataclass(frozen=True)
class Choices:
    """One random configuration; its `repr` is what a failure prints."""

    seed: int
    family: str
    optimizer: str
    scheduler: str
    frozen: bool
    accumulation: int
    precision: str
    clip: tuple[float | None, str]
    workers: int
    val_every: Any
    val_loaders: int
    sanity: int
    epochs: int
    max_steps: int
    logger: str
    watcher: str
    hook: str
    engine: str
    reduction: str
    probes: Any
    every: Any
    resample: bool


EVERY: dict[str, Any] = {"log": "log", "2": 2, "list": [1, 4, 5], "function": lambda step: step % 3 == 1}


def draw(seed: int) -> Choices:
    pick = random.Random(seed)
    family, val_loaders = pick.choice(list(MODELS)), pick.choice([0, 1, 1, 2])
    probes = pick.choice([3, 5, "train", "tensors", *(["val"] if val_loaders else [])])
    engines = ["auto", "layerwise"] if family == "gru" else ["auto", "layerwise", "functional"]
    return Choices(
        seed=seed,
        family=family,
        optimizer=pick.choice(list(OPTIMIZERS)),
        scheduler=pick.choice(["none", "epoch", "step"]),
        frozen=pick.random() < 0.2,
        accumulation=pick.choice([1, 1, 2, 3]),
        precision=pick.choice(["32-true", "32-true", "bf16-mixed", "64-true"]),
        clip=pick.choice([(None, "norm"), (0.5, "norm"), (0.05, "value")]),
        workers=pick.choice([0] * 9 + [1]),
        val_every=pick.choice([1.0, 0.5, 3]),
        val_loaders=val_loaders,
        sanity=pick.choice([0, 0, 1]),
        epochs=pick.choice([1, 2]),
        max_steps=pick.choice([-1, -1, 4]),
        logger=pick.choice(["none", "none", "csv"]),
        watcher=pick.choice(["NTKWatch", "NTKWatch", "Monitor"]),
        hook=pick.choice([h for h in HOOKS if val_loaders or "validation" not in h]),
        engine=pick.choice(engines),
        reduction=pick.choice(["trace", "trace", "blocks", "full", "sum"]),
        probes=probes,
        every=pick.choice(list(EVERY)),
        resample=pick.random() < 0.2 and probes != "tensors",
    )


class FuzzTask(PytorchLightningTask):
    """Logs, and is put together from the choices."""

    def __init__(self, chosen: Choices) -> None:
        super().__init__(net=MODELS[chosen.family](random.Random(chosen.seed)))
        self.chosen = chosen
        if chosen.frozen:
            next(iter(self.net.parameters())).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.chosen.optimizer]([p for p in self.parameters() if p.requires_grad])
        if self.chosen.scheduler == "none":
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return [optimizer], [{"scheduler": scheduler, "interval": self.chosen.scheduler}]


def job(chosen: Choices) -> Job:
    """The training that the choices describe."""
    shape = SHAPES[chosen.family]

    def loaders() -> tuple[Any, Any]:
        train = DataLoader(Augmented(20, 1, shape), 4, shuffle=True, num_workers=chosen.workers)
        val = [DataLoader(Augmented(6, 2 + i, shape), 3) for i in range(chosen.val_loaders)]
        return train, (val[0] if len(val) == 1 else val or None)

    trainer = {
        "accumulate_grad_batches": chosen.accumulation,
        "precision": chosen.precision,
        "gradient_clip_val": chosen.clip[0],
        "gradient_clip_algorithm": chosen.clip[1],
        "num_sanity_val_steps": chosen.sanity,
        "inference_mode": not chosen.sanity,
        "max_steps": chosen.max_steps,
        "logger": chosen.logger == "csv",
        "log_every_n_steps": 1,
    }
    trainer |= {"val_check_interval": chosen.val_every} if chosen.val_loaders else {}
    return Job(f"fuzz {chosen.seed}", lambda name: FuzzTask(chosen), trainer, loaders=loaders, epochs=chosen.epochs)


def watcher(chosen: Choices) -> tuple[Callable[[], list[Any]], Callable[[], str | None]]:
    """What watches, and afterwards: why it counts as not recorded (None where kernels are there)."""
    if chosen.watcher == "NTKWatch":
        return _callback(chosen)
    probe = MonitorProbe(chosen.engine, reduction=chosen.reduction)
    probe.shape = SHAPES[chosen.family]
    return lambda: [Driver(chosen.hook, probe, fires=range(0, 40, 3))], lambda: probe.missing(at_least=1)


def _callback(chosen: Choices) -> tuple[Callable[[], list[Any]], Callable[[], str | None]]:
    from ntkwatch import NTKWatch

    made: list[Any] = []

    def watch() -> list[pl.Callback]:
        probes = chosen.probes
        if probes == "tensors":
            probes = torch.randn(4, *SHAPES[chosen.family], generator=torch.Generator().manual_seed(5))
        arguments = {"engine": chosen.engine, "reduction": chosen.reduction, "resample": chosen.resample}
        made.append(NTKWatch(probes, EVERY[chosen.every], None, on_error="raise", **arguments))
        return made

    def missing() -> str | None:
        last = made[0].last if made else None
        return None if last is not None and real_kernel(last.kernel) else f"last measurement: {last}"

    return watch, missing
