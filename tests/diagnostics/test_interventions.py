"""Output-scale twins of a LightningModule: outputs, rates, clipping and resuming follow the rules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, empirical_ntk
from ntkwatch.output_scaling import output_scale, twins
from tests.support.runs import trainer


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


# ── f and f_0 on one path ─────────────────────────────────────────────────────────────────────────────────────────────
class Tokens(nn.Module):
    """Four tokens of width 16 through `body`, which is given a padding mask where `pad`."""

    def __init__(self, body: nn.Module, pad: bool = False) -> None:
        super().__init__()
        self.body, self.pad, self.head = body, pad, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(-1, 4, 16)
        if not self.pad:
            return self.head(self.body(h).mean(1))
        mask = torch.zeros(len(h), 4, dtype=torch.bool)
        mask[:, 2:] = h[:, 2:, 0] > 0.3
        return self.head(self.body(h, src_key_padding_mask=mask).mean(1))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, h: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h, h, h, need_weights=False)[0]


class Decoder(nn.TransformerDecoder):
    def forward(self, h: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h, h.flip(1))


class States(nn.Module):
    """The hidden states of a recurrent net."""

    def __init__(self, net: nn.RNNBase) -> None:
        super().__init__()
        self.net = net

    def forward(self, h: Tensor) -> Tensor:
        return self.net(h)[0]


def encoder_layer(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, **{"dropout": 0.0, "batch_first": True, **settings})


def encoder(**settings: Any) -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2, **settings)


def decoder() -> nn.Module:
    return Decoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True), 2)


PATHS: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: Tokens(encoder_layer()),
    "GELU, norm first": lambda: Tokens(encoder_layer(activation="gelu", norm_first=True)),
    "encoder with a norm": lambda: Tokens(encoder(norm=nn.LayerNorm(16))),
    "padding, nested tensors": lambda: Tokens(encoder(), pad=True),
    "padding, no nested tensors": lambda: Tokens(encoder(enable_nested_tensor=False), pad=True),
    "attention alone": lambda: Tokens(SelfAttention(16, 2, batch_first=True)),
    "decoder": lambda: Tokens(decoder()),
    "LSTM": lambda: Tokens(States(nn.LSTM(16, 16, batch_first=True))),
    "GRU": lambda: Tokens(States(nn.GRU(16, 16, batch_first=True))),
    "BatchNorm and encoder layer": lambda: Tokens(nn.Sequential(nn.BatchNorm1d(4), encoder_layer())),
    "compiled encoder layer": lambda: Tokens(torch.compile(encoder_layer(), backend="aot_eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_outputs_start_at_zero_to_the_last_bit_in_every_mode(name: str, dtype: torch.dtype) -> None:
    """In evaluation without gradients torch takes fused paths: f and f_0 must both take them, or neither."""
    torch.manual_seed(0)
    scaled, x = output_scale(PATHS[name]().to(dtype), 0.1), torch.randn(8, 64).to(dtype)
    for training in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                largest = float(scaled.train(training)(x).abs().max())
            assert largest == 0, f"{name}: {largest:.1e} with training={training}, gradients={gradients}"
    assert torch.backends.mha.get_fastpath_enabled(), "the setting is left as it was"


@pytest.mark.parametrize("name", PATHS)
def test_the_kernel_of_a_twin_is_that_of_the_module_over_gamma_squared(name: str) -> None:
    torch.manual_seed(0)
    module, x = PATHS[name]().double().eval(), torch.randn(5, 64).double()
    kernel = empirical_ntk(module, x, reduction="full")
    for gamma in (0.01, 10.0):
        twin = empirical_ntk(output_scale(module, gamma).eval(), x, reduction="full")
        off = float((gamma**2 * twin - kernel).norm() / kernel.norm())
        assert off < 1e-14, f"{name} at gamma = {gamma}: {off:.1e}"


@pytest.mark.parametrize("moved", [0.0, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("name", PATHS)
def test_a_twin_near_its_start_is_not_taken_for_coupled(name: str, moved: float) -> None:
    """There f − f_0 is a small difference of large numbers, rounding among them."""
    torch.manual_seed(0)
    scaled, x = output_scale(PATHS[name](), 0.1).eval(), torch.randn(5, 64)
    with torch.no_grad():
        for p in scaled.parameters():
            p.add_(moved * torch.randn_like(p))
    assert bool(empirical_ntk(scaled, x).isfinite().all())


class LitTokens(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.parametrize("name", ["encoder layer", "padding, nested tensors", "attention alone", "decoder", "LSTM"])
def test_both_twins_are_measured(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(64, 64), torch.randint(0, 3, (64,))), 32)
    for twin in twins(LitTokens(PATHS[name]()), gamma=10):
        watch = NTKWatch(probes=16, budget=None, every=1, on_error="raise")
        trainer(tmp_path, watch, max_steps=2).fit(twin, loader)
        assert watch.last is not None, name
        assert watch.last.step == 2, name


def test_derivatives_by_inputs_are_those_of_the_difference() -> None:
    """Losses of physics-informed networks differentiate what forward returns: f_0 depends on x too."""
    torch.manual_seed(0)
    scaled, x = output_scale(Module(), 1.0), torch.randn(5, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(scaled(x).sum(), x)
    assert float(slope.abs().max()) == 0


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
