"""Output-scale twins of a LightningModule: outputs, rates, clipping and resuming follow the rules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch
from ntkwatch.interventions import output_scale, twins
from tests.runs import trainer


class Module(pl.LightningModule):
    """A regression net whose optimizer and scheduler a test chooses."""

    def __init__(self, optimizer: str = "SGD", **settings: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
        self.optimizer, self.settings = optimizer, {"lr": 0.05, **settings}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        made = getattr(torch.optim, self.optimizer)(self.parameters(), **self.settings)
        return {"optimizer": made, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(made, 50, eta_min=0.01)}


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), 32)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 7.0])
def test_the_outputs_start_at_zero_and_move_by_a_gammath(gamma: float) -> None:
    module, x = Module(), torch.randn(5, 4)
    scaled = output_scale(module, gamma)
    assert torch.equal(scaled(x), torch.zeros(5, 1))
    before = module(x).detach()
    for a in (module, scaled):
        with torch.no_grad():
            a.net[0].weight += 0.1
    torch.testing.assert_close(scaled(x), (module(x) - before) / gamma)
    assert [name for name, _ in scaled.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert set(scaled.state_dict()) == set(module.state_dict())
    assert type(scaled).__name__ == "Module"


RULES: dict[str, tuple[dict[str, Any], float]] = {
    "SGD": ({"weight_decay": 0.1, "momentum": 0.9}, 2),
    "Adam": ({"weight_decay": 0.1, "eps": 1e-6}, 1),
    "AdamW": ({"weight_decay": 0.1}, 1),
}


@pytest.mark.parametrize("gamma", [0.1, 7.0])
@pytest.mark.parametrize("case", RULES)
def test_rates_follow_the_optimizers_rule(case: str, gamma: float) -> None:
    settings, power = RULES[case]
    module = Module(case, **settings)
    plain, scaled = module.configure_optimizers(), output_scale(module, gamma).configure_optimizers()
    a, b = plain["optimizer"].param_groups[0], scaled["optimizer"].param_groups[0]
    factor = gamma**power
    assert b["lr"] == pytest.approx(a["lr"] * factor)
    assert b["lr"] * b["weight_decay"] == pytest.approx(a["lr"] * a["weight_decay"]), "lr·decay is kept"
    if "eps" in a:
        assert b["eps"] == pytest.approx(a["eps"] / gamma)
    for each in (plain, scaled):
        for _ in range(20):
            each["optimizer"].step()
            each["lr_scheduler"].step()
    assert b["lr"] == pytest.approx(a["lr"] * factor), "the schedule follows"


@pytest.mark.parametrize("case", ["SGD", "Adam"])
def test_a_linear_network_learns_the_same_function_at_every_scale(case: str, tmp_path: Path) -> None:
    """Where nothing can be rich, γ is invisible: outputs after training agree."""
    ends = []
    for gamma in (0.25, 1.0, 4.0):
        torch.manual_seed(0)
        module = Module(case, **({"eps": 1e-12} if case == "Adam" else {}))
        module.net = nn.Linear(4, 1).double()
        scaled = output_scale(module.double(), gamma)
        loader = DataLoader(TensorDataset(*(t.double() for t in data().dataset.tensors)), 32)
        trainer(tmp_path, max_steps=20).fit(scaled, loader)
        ends.append(scaled(loader.dataset.tensors[0]).detach())
    for end in ends:
        torch.testing.assert_close(end, ends[1], rtol=1e-6, atol=1e-8)
    assert float(ends[1].norm()) > 0.1


def test_one_line_gives_a_lazy_and_a_rich_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module(lr=0.02)
    kept = copy.deepcopy(module.state_dict())
    found = []
    for twin in twins(module, gamma=8.0):
        watch = NTKWatch(probes="train", budget=None, every=[0, 60])
        trainer(tmp_path, watch, max_steps=60).fit(twin, data())
        assert watch.last is not None
        found.append(watch.last.metrics)
    lazy, rich = found
    assert lazy["taylor_ratio"] < 0.1 * rich["taylor_ratio"], found
    assert lazy["kernel_angle"] < 0.1 * rich["kernel_angle"], found
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items()), "the original is left"


def test_clipping_thresholds_shrink_with_the_gradients(tmp_path: Path) -> None:
    """A threshold that halves every gradient halves it at every scale: one step moves the outputs alike."""
    ends = []
    for gamma in (1.0, 5.0):
        torch.manual_seed(0)
        scaled = output_scale(Module(), gamma)
        trainer(tmp_path, max_steps=1, gradient_clip_val=0.05).fit(scaled, data())
        ends.append(scaled(data().dataset.tensors[0]).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0.05, atol=1e-4)


def test_a_resumed_run_subtracts_the_same_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scaled, x = output_scale(Module(), 2.0), torch.randn(5, 4)
    run = trainer(tmp_path, max_steps=4)
    run.fit(scaled, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(9)
    other = output_scale(Module(), 2.0)
    trainer(tmp_path, max_steps=5).fit(other, data(), ckpt_path=tmp_path / "a.ckpt")
    again = trainer(tmp_path, max_steps=5)
    again.fit(scaled, data(), ckpt_path=tmp_path / "a.ckpt")
    torch.testing.assert_close(other(x), scaled(x))


def test_batchnorm_and_dropout_start_at_zero_outputs_where_they_can() -> None:
    module = Module()
    module.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    scaled, x = output_scale(module, 0.01), torch.randn(6, 4)
    for mode in (True, False):
        assert float(scaled.train(mode)(x).detach().abs().max()) == 0, f"training={mode}"


class Tuple(Module):
    def forward(self, x: Tensor) -> Any:
        return self.net(x), x


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma must be positive; got 0"):
        output_scale(Module(), 0)
    with pytest.raises(ValueError, match="gamma must be above 1"):
        twins(Module(), 0.5)
    with pytest.raises(TypeError, match="got tuple"):
        output_scale(Tuple(), 2)(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="got RMSprop"):
        output_scale(Module("RMSprop"), 2).configure_optimizers()
