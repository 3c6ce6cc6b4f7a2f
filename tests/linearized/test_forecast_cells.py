"""The linear forecast against everything a fit may do: exact on a linear network, or undefined with the reason."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, load_run
from ntkwatch.frontends import forecast_updates as following
from ntkwatch.frontends.forecast_updates import ForecastUpdates
from ntkwatch.linearized import optimizer_copy as shadow
from ntkwatch.linearized.forecast import LinearForecast
from ntkwatch.linearized.optimizer_copy import OptimizerCopy
from tests.support.runs import trainer

LAZY = ["loss_if_lazy", "forecast_error", "forecast_start_error", "kernel_angle"]
ROUNDING = 1e-9
Configure = Callable[[Any], Any]


class Linear(pl.LightningModule):
    """Linear in its parameters, in float64: its forecast is the run itself."""

    def __init__(self, configure: Configure, loss: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3, bias=False), Shift()).to(dtype)
        self.configure, self.loss = configure, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Shift(nn.Module):
    """A bias, and a table that the batch looks up in: both linear."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.bias + 0.5 * self.scale


def sgd(m: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(m.parameters(), **{"lr": 0.05, "momentum": 0.9, **settings})


def by(interval: str, schedule: Callable[[Any], Any], **more: Any) -> Configure:
    """Heavy ball under a scheduler."""

    def configure(m: Any) -> Any:
        optimizer = sgd(m)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule(optimizer), "interval": interval, **more},
        }

    return configure


class Once(pl.Callback):
    """Does something to the run at one step, in a hook of that name."""

    def __init__(self, act: Callable[[Any, Any], Any], at: int = 4, hook: str = "on_train_batch_start") -> None:
        self.act, self.at = act, at
        setattr(self, hook, self.run)

    def run(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            self.act(trainer, module)


def swap(trainer: Any, module: Any) -> None:
    trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=0.01)]


def reset(trainer: Any, module: Any) -> None:
    trainer.optimizers[0].state = defaultdict(dict)


def forget(trainer: Any, module: Any) -> None:
    for held in trainer.optimizers[0].state.values():
        held.clear()


def reload(trainer: Any, module: Any) -> None:
    trainer.optimizers[0].load_state_dict(trainer.optimizers[0].state_dict())


def regroup(trainer: Any, module: Any) -> None:
    trainer.optimizers[0].add_param_group({"params": [module.net[1].scale]})


def freeze(trainer: Any, module: Any) -> None:
    module.net[1].bias.requires_grad_(False)


def unfreeze(trainer: Any, module: Any) -> None:
    module.net[1].bias.requires_grad_(True)


def frozen_bias(m: Any) -> Any:
    m.net[1].bias.requires_grad_(False)
    return sgd(m)


def clamp(trainer: Any, module: Any) -> None:
    with torch.no_grad():
        module.net[0].weight.clamp_(-0.2, 0.2)


class WarmsUp(Linear):
    """The documented way: rates set around the step, inside optimizer_step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=closure)


class SetsRatesLate(Linear):
    """After the callbacks' hook and before the step: unseen by a hook."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 5)


class EverySecond(Linear):
    """Skips the optimizer on every second batch, whose gradients then are dropped."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure) if batch_idx % 2 == 0 else closure()


class Twice(Linear):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)
        optimizer.step()


class TwiceBehind(Linear):
    """The second one past Lightning."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)
        self.trainer.optimizers[0].step()


class KeepsGradients(Linear):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None: ...


class ClipsItself(Linear):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **named: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


class Skips(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)


class Halved(torch.optim.SGD):
    """A class of the user's own, with an attribute that is no setting of its groups."""

    def __init__(self, params: Any, lr: float, share: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        self.share = share

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad, alpha=-group["lr"] * self.share / group["k"] ** 0.5)
        return loss


class Parental(Halved):
    """Steps by its parent's step, and a little more."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                self.nudge(p)
        return loss

    def nudge(self, p: Tensor) -> None:
        p.mul_(0.99)


class Noisy(Parental):
    def nudge(self, p: Tensor) -> None:
        p.add_(1e-3 * torch.randn_like(p))


class Slow(Halved):
    """Keeps tensors outside its state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]


class Wrapper(torch.optim.Optimizer):
    """Around another optimizer, made by another signature."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def share(m: Any, value: float = 0.5) -> torch.optim.Optimizer:
    return Halved(m.parameters(), lr=0.2, share=value)


def hooked(m: Any) -> torch.optim.Optimizer:
    optimizer = sgd(m)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def replaced(m: Any) -> torch.optim.Optimizer:
    optimizer = sgd(m)
    inner = optimizer.step
    optimizer.step = lambda closure=None: inner(closure)  # type: ignore[method-assign]
    return optimizer


def a_part(m: Any) -> torch.optim.Optimizer:
    """The bias has gradients and is not the optimizer's: not in the norm that is clipped either."""
    return torch.optim.SGD([m.net[0].weight], lr=0.05)


def outsider(m: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([*m.parameters(), nn.Parameter(torch.zeros(2))], lr=0.05)


def named(m: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": m.net[0].named_parameters()}, {"params": m.net[1].named_parameters()}], lr=0.02
    )


def groups(m: Any) -> torch.optim.Optimizer:
    body = {"params": [m.net[0].weight], "lr": 0.05, "weight_decay": 0.1}
    return torch.optim.SGD([body, {"params": [m.net[1].bias], "momentum": 0.5}, {"params": [m.net[1].scale]}], lr=0.01)


def scaled_amp(init: float = 2.0**20) -> Any:
    """Overflows at first, so that the scaler skips steps of the optimizer that the Trainer counts."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init, growth_interval=3)
    return pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)


weights = torch.tensor([0.2, 1.0, 3.0])
cross = F.cross_entropy


@dataclass(frozen=True)
class Cell:
    """One way of training. reason: why the forecast is undefined at the end; None: exact, to `rounding`."""

    configure: Configure = sgd
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], Sequence[Any]] = tuple  # callbacks before NTKWatch
    after: Callable[[], Sequence[Any]] = tuple
    kind: type[Linear] = Linear
    loss: Callable[..., Tensor] = F.mse_loss
    told: Callable[..., Tensor] | None = None  # what NTKWatch is told the loss is
    dtype: torch.dtype = torch.float64
    rounding: float = ROUNDING
    fails: bool = False  # the user's part in it raises
    off: bool = False  # the first gradient is not the run's: forecast_start_error says so


def once(act: Callable[[Any, Any], Any], **settings: Any) -> Callable[[], list[Any]]:
    return lambda: [Once(act, **settings)]


def accumulating() -> list[Any]:
    return [pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})]


def ema() -> list[Any]:
    return [pl.callbacks.EMAWeightAveraging(decay=0.5)]


def swa() -> list[Any]:
    return [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)]


LATE = "changed in its step, and not by its own rule"
LONG = {"max_epochs": 3, "max_steps": -1}
MOVED = "the weights are not those that the optimizer left"
SCHEDULES: dict[str, Cell] = {
    "cosine by step": Cell(by("step", lambda o: lr_scheduler.CosineAnnealingLR(o, 9))),
    "one cycle, rates and momentum": Cell(by("step", lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20))),
    "warmup, then exponential": Cell(
        by("step", lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
        ))
    ),
    "steps by epoch": Cell(by("epoch", lambda o: lr_scheduler.StepLR(o, 1, 0.3)), settings=LONG),
    "on a plateau": Cell(
        by("epoch", lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0, threshold=10), monitor="loss"),
        settings=LONG,
    ),
    "every second step": Cell(by("step", lambda o: lr_scheduler.ExponentialLR(o, 0.5), frequency=2)),
    "warmup in optimizer_step": Cell(kind=WarmsUp),
    "rates set after the callbacks": Cell(kind=SetsRatesLate, reason=LATE),
}  # fmt: skip
GRADIENTS: dict[str, Cell] = {
    "groups": Cell(groups),
    "groups of named parameters": Cell(named),
    "accumulation": Cell(settings={"accumulate_grad_batches": 2, **LONG}),
    "accumulation that changes": Cell(after=accumulating, settings=LONG),
    "accumulation, skipped batches": Cell(kind=Skips, settings={"accumulate_grad_batches": 2, **LONG}),
    "skipped batches": Cell(kind=Skips, settings=LONG),
    "clipped by norm": Cell(settings={"gradient_clip_val": 0.5}),
    "clipped by value": Cell(settings={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "clipped and accumulated": Cell(settings={"gradient_clip_val": 0.5, "accumulate_grad_batches": 3, **LONG}),
    "clipped, and not all trained": Cell(a_part, settings={"gradient_clip_val": 0.5}),
    "own clipping": Cell(kind=ClipsItself, reason="ClipsItself.configure_gradient_clipping"),
    "own zero_grad": Cell(kind=KeepsGradients, reason="KeepsGradients.optimizer_zero_grad"),
    "every second step skipped": Cell(kind=EverySecond),
    "two steps a batch, the second past Lightning": Cell(
        kind=TwiceBehind, reason="stepped more than once on one batch"
    ),
    "two steps a batch": Cell(kind=Twice, reason="stepped more than once on one batch"),
}
PRECISION: dict[str, Cell] = {
    "float32": Cell(dtype=torch.float32, rounding=1e-5),
    "64-true": Cell(settings={"precision": "64-true"}),
    "bf16-mixed": Cell(settings={"precision": "bf16-mixed"}, dtype=torch.float32, rounding=0.01),
    "bf16-true": Cell(settings={"precision": "bf16-true"}, dtype=torch.float32, rounding=0.02),
    "16-mixed, steps skipped by its scaler": Cell(
        settings={"plugins": "scaler", "max_steps": 20}, dtype=torch.float32, rounding=0.01
    ),
}
AVERAGES: dict[str, Cell] = {
    "EMA, measured before its weights are put in": Cell(after=ema, settings=LONG),
    "EMA, measured after": Cell(before=ema, settings=LONG, reason=MOVED),
    "SWA, measured before its weights are put in": Cell(after=swa, settings=LONG),
    "SWA, measured after": Cell(before=swa, settings=LONG, reason=MOVED),
    "weights clamped in mid-run": Cell(after=once(clamp), reason=MOVED),
    "weights clamped after a step": Cell(before=once(clamp, hook="on_train_batch_end"), reason=MOVED),
}
CHANGES: dict[str, Cell] = {
    "frozen from the start": Cell(frozen_bias),
    "frozen in mid-run": Cell(after=once(freeze)),
    "unfrozen in mid-run": Cell(frozen_bias, after=once(unfreeze), reason="did not at the baseline"),
    "another optimizer": Cell(after=once(swap), reason="replaced by another SGD"),
    "a new group": Cell(
        lambda m: torch.optim.SGD([m.net[0].weight, m.net[1].bias], lr=0.05),
        after=once(regroup),
        reason="groups have changed",
    ),
    "momentum thrown away": Cell(after=once(reset), reason="state was reset"),
    "momentum cleared in place": Cell(after=once(forget), reason="state was reset"),
    "its state loaded": Cell(after=once(reload), reason="state was reset or loaded anew"),
    "its state loaded, no momentum": Cell(
        functools.partial(sgd, momentum=0.0), after=once(reload), reason="state was reset or loaded anew"
    ),
}
CLASSES: dict[str, Cell] = {
    "an own class": Cell(share),
    "an own class that steps by its parent's step": Cell(lambda m: Parental(m.parameters(), 0.2)),
    "an own class that draws noise": Cell(lambda m: Noisy(m.parameters(), 0.1), reason="draws random numbers"),
    "an own class with tensors beside": Cell(lambda m: Slow(m.parameters(), 0.1), reason="keeps slow"),
    "a wrapper": Cell(lambda m: Wrapper(sgd(m)), reason="keeps inner"),
    "a hook on the step": Cell(hooked, reason="hooks on the optimizer's step"),
    "a replaced step": Cell(replaced, reason="was replaced on the object"),
    "parameters of others": Cell(outsider, reason="also trains 1 parameters"),
    "LBFGS": Cell(lambda m: torch.optim.LBFGS(m.parameters()), reason="steps with a closure"),
}
LOSSES: dict[str, Cell] = {
    "class weights": Cell(loss=functools.partial(cross, weight=weights.double())),
    "class weights in float32": Cell(
        loss=nn.CrossEntropyLoss(weight=weights), dtype=torch.float32, rounding=1e-4
    ),
    "label smoothing": Cell(loss=functools.partial(cross, label_smoothing=0.2)),
    "a sum": Cell(functools.partial(sgd, lr=0.002), loss=functools.partial(cross, reduction="sum")),
    "a sum, told as a mean": Cell(
        functools.partial(sgd, lr=0.002), loss=functools.partial(cross, reduction="sum"), told=cross, off=True
    ),
    "a penalty that the loss told lacks": Cell(
        loss=lambda f, y: cross(f, y) + f.square().mean(), told=cross, off=True
    ),
    "no reduction": Cell(
        loss=cross, told=functools.partial(cross, reduction="none"), reason="the loss is not one number", fails=True
    ),
    "ignored rows": Cell(loss=functools.partial(cross, ignore_index=1)),
}  # fmt: skip
CELLS = SCHEDULES | GRADIENTS | PRECISION | AVERAGES | CHANGES | CLASSES | LOSSES


def data(classes: bool, dtype: torch.dtype) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(42, 4, generator=generator).to(dtype)
    y = x[:, :3].argmax(1) if classes else 3 * x[:, :3] + torch.randn(42, 3, generator=generator).to(dtype)
    return DataLoader(TensorDataset(x, y), 8)


def fit(cell: Cell, folder: Path) -> NTKWatch:
    settings = {"max_steps": 9, **cell.settings}
    if settings.get("plugins") == "scaler":
        settings["plugins"] = [scaled_amp()]
    watch = NTKWatch(
        probes="train",
        budget=None,
        every=[0, 1, 6],
        diagnostics=[*LAZY, "loss"],
        loss=cell.told or cell.loss,
        loggers=[],
        on_error="warn" if cell.fails else "raise",  # what the run does in its own way is no error
    )
    run = trainer(folder, *cell.before(), watch, *cell.after(), **settings)
    run.fit(cell.kind(cell.configure, cell.loss, cell.dtype), data(cell.loss is not F.mse_loss, cell.dtype))
    return watch


def check(case: str, folder: Path) -> None:
    cell = CELLS[case]
    watch = fit(cell, folder)
    metrics, last = load_run(watch.record).metrics, watch.last
    assert last.metrics["kernel_angle"] is not None, case
    if cell.off:
        assert last.metrics["forecast_start_error"] > 0.1, f"{case}: {last.metrics}"
        return
    if cell.reason is not None:
        for name in ("loss_if_lazy", "forecast_error"):
            assert last.metrics[name] is None, f"{case}: {name} is {last.metrics[name]}"
            assert cell.reason in last.reasons[name], f"{case}: {last.reasons[name]}"
        return
    assert metrics["forecast_error"].iloc[-1] < cell.rounding, f"{case}: {metrics} {last.reasons}"
    gap = (metrics["loss_if_lazy"] - metrics["loss"]).abs().max()
    assert gap < 10 * cell.rounding, f"{case}: {metrics}"
    assert metrics["forecast_start_error"].iloc[-1] < 10 * cell.rounding, f"{case}: {metrics}"
    assert metrics["loss"].iloc[-1] < 0.99 * metrics["loss"].iloc[0], f"{case}: the run moves"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CELLS)
def test_exact_or_undefined_with_the_reason(case: str, tmp_path: Path) -> None:
    check(case, tmp_path)


BLIND: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "rates of the batch's end": (
        "cosine by step",
        lambda m: m.setattr(ForecastUpdates, "_apply", lambda self, forecast, *_: forecast.apply()),
    ),
    "clips what is not trained": (
        "clipped, and not all trained",
        lambda m: m.setattr(OptimizerCopy, "step", clipping_all),
    ),
    "does not clip": ("clipped by norm", lambda m: m.setattr(following, "clipping", lambda trainer: None)),
    "never looks at the optimizer": (
        "momentum thrown away",
        lambda m: m.setattr(OptimizerCopy, "changed", lambda *_: None),
    ),
    "never looks at the weights": ("EMA, measured after", lambda m: m.setattr(LinearForecast, "moved", lambda _: None)),
    "keeps what the run dropped": (
        "16-mixed, steps skipped by its scaler",
        lambda m: m.setattr(LinearForecast, "discard", lambda self: None),
    ),
    "copies no attribute": ("an own class", lambda m: m.setattr(shadow, "_own", lambda optimizer: {})),
    "trains what is frozen": ("frozen in mid-run", lambda m: m.setattr(LinearForecast, "_pull_back", thawed)),
}


def clipping_all(self: OptimizerCopy, rates: Any, after: Any, clip: Any = None) -> None:
    if clip is not None:
        clip([p for p in self._mine.values() if p.grad is not None])
    STEP(self, rates, after)


def thawed(self: LinearForecast, batch: Any, gradient: Tensor) -> None:
    frozen = [p for p in self.network.parameters.values() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    PULL_BACK(self, batch, gradient)
    for p in frozen:
        p.requires_grad_(False)


STEP, PULL_BACK = OptimizerCopy.step, LinearForecast._pull_back


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutant", BLIND)
def test_a_forecast_that_is_blind_to_it_is_caught(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, blind = BLIND[mutant]
    blind(monkeypatch)
    with pytest.raises(AssertionError, match=case):
        check(case, tmp_path)
