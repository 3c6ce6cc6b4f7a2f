"""The loggers' x axis: what ntkwatch logs of some weights stands where the module's own metrics of them stand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ntkwatch import NTKWatch, load_run
from tests.loggers.test_loggers import read_back, wandb  # noqa: F401  a fixture
from tests.support.runs import rows

CONFIGS: dict[str, dict[str, Any]] = {  # 6 batches an epoch unless rows= says otherwise
    "every batch": {},
    "accumulation of 3": {"accumulate_grad_batches": 3},
    "accumulation that leaves a rest": {"accumulate_grad_batches": 4, "rows": 80},
    "manual, every third batch": {"manual": (1, 3)},
    "manual, every fourth batch of five": {"manual": (1, 4), "rows": 80},
    "manual, two optimizers": {"manual": (2, 1)},
    "manual, two optimizers every second batch": {"manual": (2, 2)},
    "validation within the epoch": {"val_check_interval": 2},
    "stopped within an epoch": {"max_steps": 8},
}
RESUMED = ["every batch", "accumulation that leaves a rest", "manual, every third batch"]


def module_of(pl: ModuleType, manual: tuple[int, int] | None) -> Any:
    """A module that logs how far its weights have gone, as `ntk/parameter_distance` does; manual: how many optimizers,
    stepping every how many batches."""

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)
            self.automatic_optimization = manual is None
            self.start = [p.detach().clone() for p in self.parameters()]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def travelled(self) -> Tensor:
            moved = torch.cat([(p - s).flatten() for p, s in zip(self.parameters(), self.start, strict=True)])
            return moved.detach().norm() / torch.cat([s.flatten() for s in self.start]).norm()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("travelled", self.travelled(), on_step=True)
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            if manual is not None:
                self.manual_backward(loss)
                if (batch_idx + 1) % manual[1] == 0:
                    optimizers = self.optimizers()
                    for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                        optimizer.step()
                        optimizer.zero_grad()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            if manual is None or manual[0] == 1:
                return torch.optim.SGD(self.parameters(), 0.1)
            return [torch.optim.SGD([p], 0.1) for p in self.parameters()]

    return Module


def fit(pl: ModuleType, logger: Any, root: Path, config: dict[str, Any], resumed: bool) -> NTKWatch:
    """The run, in one piece or resumed from a checkpoint that is written as a batch ends."""
    settings = dict(config)
    manual, n = settings.pop("manual", None), settings.pop("rows", 96)
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": logger, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "default_root_dir": root,
    }  # fmt: skip
    data = [DataLoader(rows(n), 16), DataLoader(rows(32, seed=1), 32)]

    def run(epochs: int, *callbacks: Any, ckpt_path: Path | None = None) -> NTKWatch:
        torch.manual_seed(0)
        watch = NTKWatch(probes=8, every=1, budget=None)
        options = {**settings, "max_epochs": epochs, "enable_checkpointing": bool(callbacks)}
        trainer = pl.Trainer(callbacks=[watch, *callbacks], **quiet, **options)
        trainer.fit(module_of(pl, manual)(), *data, ckpt_path=ckpt_path)
        return watch

    if not resumed:
        return run(2)
    saves = pl.callbacks.ModelCheckpoint(root / "saved", every_n_train_steps=1, save_last=True)
    run(1, saves)
    return run(2, ckpt_path=root / "saved" / "last.ckpt")


def check(found: dict[str, dict[int, float]], watch: NTKWatch, case: str) -> None:
    theirs, ours = found["travelled"], found["ntk/parameter_distance"]
    shared = theirs.keys() & ours.keys()
    assert len(shared) >= len(ours) - 1 > 1, (
        f"{case}: all but the last, after which no batch need come, {ours}, {theirs}"
    )
    for x in shared:
        assert ours[x] == pytest.approx(theirs[x], rel=1e-5, abs=1e-9), f"{case}: other weights stand at {x}"
    recorded = load_run(watch.record).steps
    assert recorded == list(range(len(ours))), f"{case}: the record counts batches after which an optimizer stepped"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "resumed"),
    [pytest.param(case, False, id=case) for case in CONFIGS]
    + [pytest.param(case, True, id=f"{case}, resumed") for case in RESUMED],
)
def test_ours_stand_where_the_modules_own_stand(case: str, resumed: bool, tmp_path: Path) -> None:
    pl = importlib.import_module("lightning.pytorch" if resumed else "pytorch_lightning")
    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    both = [loggers.CSVLogger(tmp_path, name="csv"), loggers.TensorBoardLogger(tmp_path, name="tb")]
    watch = fit(pl, both, tmp_path, CONFIGS[case], resumed)
    for logger in both:
        check(read_back(type(logger).__name__, tmp_path, logger), watch, f"{case}, {type(logger).__name__}")


@pytest.mark.filterwarnings("ignore")
def test_ours_stand_where_the_modules_own_stand_in_wandb(wandb: ModuleType, tmp_path: Path) -> None:  # noqa: F811
    pl = importlib.import_module("lightning.pytorch")
    logger = importlib.import_module("lightning.pytorch.loggers").WandbLogger(save_dir=str(tmp_path), offline=True)
    case = "manual, every third batch"
    watch = fit(pl, logger, tmp_path, CONFIGS[case], resumed=False)
    wandb.finish()
    check(read_back("WandbLogger", tmp_path, logger), watch, f"{case}, WandbLogger")
