"""The linear forecast through the callback: exact where the network is linear, in every way a Trainer may step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, load_run
from ntkwatch.frontends.forecast_updates import NOT_NAMED
from tests.support.runs import Classifier, loaders, trainer

mse = nn.functional.mse_loss
LAZY = ["kernel_angle", "loss_if_lazy", "forecast_error", "forecast_start_error"]


class Linear(pl.LightningModule):
    """A linear model in float64: its forecast is the run itself. `configure` makes its optimizer."""

    def __init__(self, configure: Callable[[Linear], Any], skip: int | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2).double()
        self.configure, self.skip = configure, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def ntk_loss(self, f: Tensor, y: Tensor) -> Tensor:
        return mse(f, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == self.skip else mse(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def data(n: int = 40) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator).double()
    return DataLoader(TensorDataset(x, 3 * x[:, :2] + torch.randn(n, 2, generator=generator).double()), 8)


def sgd(module: Linear, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), **{"lr": 0.05, **settings})


def scheduled(module: Linear) -> Any:
    """A rate that changes at every step: the forecast must step with the one that the run stepped with."""
    optimizer = sgd(module, momentum=0.9, lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


CASES: dict[str, tuple[Callable[[Linear], Any], dict[str, Any], int | None]] = {
    "SGD": (sgd, {}, None),
    "heavy ball, decay": (lambda m: sgd(m, momentum=0.9, weight_decay=0.01), {}, None),
    "a schedule by step": (scheduled, {}, None),
    "one cycle of AdamW": (
        lambda m: (
            [o := torch.optim.AdamW(m.parameters(), lr=0.02)],
            [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20), "interval": "step"}],
        ),
        {},
        None,
    ),
    "groups": (
        lambda m: torch.optim.SGD([{"params": [m.net.weight], "lr": 0.1}, {"params": [m.net.bias]}], 0.01),
        {},
        None,
    ),
    "accumulation, the last window short": (sgd, {"accumulate_grad_batches": 3}, None),
    "accumulation under Adam": (lambda m: torch.optim.Adam(m.parameters(), 0.02), {"accumulate_grad_batches": 2}, None),
    "clipped by norm": (sgd, {"gradient_clip_val": 1.0}, None),
    "clipped by value": (sgd, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, None),
    "a skipped batch": (lambda m: sgd(m, momentum=0.9), {}, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_linear_network_does_what_the_callback_forecasts(case: str, tmp_path: Path) -> None:
    configure, settings, skip = CASES[case]
    watch = NTKWatch(probes="train", budget=None, every=[0, 1, 5, 9], diagnostics=LAZY, on_error="raise")
    run = trainer(tmp_path, watch, **{"max_steps": 9, **settings})
    run.fit(Linear(configure, skip), data())
    metrics = load_run(watch.record).metrics
    assert metrics["forecast_error"].iloc[1:].max() < 1e-9, metrics
    assert (metrics["loss_if_lazy"] - metrics["loss"]).abs().max() < 1e-9, metrics
    assert metrics["loss"].iloc[-1] < 0.99 * metrics["loss"].iloc[0], "the run moves"
    if skip is None:
        assert metrics["forecast_start_error"].iloc[-1] < 1e-9


def test_a_forecast_at_the_rate_after_the_schedule_would_be_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: rates read when the batch ends, not when the optimizer steps."""
    from ntkwatch.frontends.forecast_updates import ForecastUpdates

    monkeypatch.setattr(ForecastUpdates, "_apply", lambda self, forecast, *_: forecast.apply())
    watch = NTKWatch(probes="train", budget=None, every=[0, 9], diagnostics=LAZY, on_error="raise")
    trainer(tmp_path, watch, max_steps=9).fit(Linear(scheduled), data())
    assert watch.last.metrics["forecast_error"] > 0.05


class Deep(Linear):
    """Not linear: its forecast is something else than the run, so that a resumed one can be told from it."""

    def __init__(self, configure: Callable[[Linear], Any]) -> None:
        super().__init__(configure)
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


RESUMED: dict[str, tuple[Callable[[Linear], Any], dict[str, Any]]] = {
    "heavy ball": (lambda m: sgd(m, momentum=0.9), {}),
    "AdamW, accumulation": (lambda m: torch.optim.AdamW(m.parameters(), lr=0.02), {"accumulate_grad_batches": 2}),
    "a schedule by step": (scheduled, {}),
}


def course(folder: Path, case: str, epochs: int, ckpt: Path | None = None) -> NTKWatch:
    """Train Deep, saving after every epoch."""
    configure, settings = RESUMED[case]
    watch = NTKWatch(probes="train", budget=None, every=1, diagnostics=LAZY, on_error="raise")
    saves = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    arguments = {"max_epochs": epochs, "max_steps": -1, "enable_checkpointing": True, **settings}
    trainer(folder, watch, saves, **arguments).fit(Deep(configure), data(), ckpt_path=ckpt)
    return watch


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_forecast_is_the_uninterrupted_one_from_any_checkpoint(case: str, tmp_path: Path) -> None:
    whole = load_run(course(tmp_path / "whole", case, 3).record).metrics[LAZY]
    assert whole["forecast_error"].iloc[-1] > 1e-3, "the run leaves its forecast"
    course(tmp_path / "cut", case, 2)
    newest, older = tmp_path / "cut" / "epoch=1.ckpt", tmp_path / "cut" / "epoch=0.ckpt"
    for name, ckpt in (("newest", newest), ("older", older), ("the newest again", newest)):
        found = load_run(course(tmp_path / name, case, 3, ckpt).record).metrics[LAZY]
        rows = found.loc[found.index > found.index[-1] // 3 * (2 if ckpt == newest else 1)]
        assert len(rows) >= 3, f"{case}, {name}"
        assert rows.equals(whole.loc[rows.index]), f"{case}, from the {name}: {rows} and not {whole}"


LOST: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "changed": (lambda file, saved: file.write_bytes(b"other"), "has changed since it was written"),
    "let go": (lambda file, saved: file.unlink(), "resume from a later checkpoint"),
    "absent": (lambda file, saved: saved["callbacks"]["NTKWatch"]["session"].pop("forecast"), "not in the checkpoint"),
    "other weights": (
        lambda file, saved: saved["state_dict"]["net.weight"].mul_(2), "not those that the checkpoint's forecast"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_a_forecast_that_the_checkpoint_lost_is_undefined(case: str, tmp_path: Path) -> None:
    lose, reason = LOST[case]
    settings = {"probes": "train", "budget": None, "every": [0, 4, 9], "diagnostics": LAZY}
    first = trainer(tmp_path, watch := NTKWatch(**settings), max_steps=4)
    first.fit(Linear(sgd), data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (file,) = (watch.record / "forecasts").glob("*.safetensors")
    lose(file, saved)
    torch.save(saved, tmp_path / "a.ckpt")
    watch = NTKWatch(**settings)
    trainer(tmp_path, watch, max_steps=9).fit(Linear(sgd), data(), ckpt_path=tmp_path / "a.ckpt")
    assert watch.last.metrics["forecast_error"] is None
    assert reason in watch.last.reasons["forecast_error"], watch.last.reasons["forecast_error"]
    assert watch.last.metrics["kernel_angle"] is not None


def test_a_checkpoint_in_the_middle_of_a_batch_has_no_forecast(tmp_path: Path) -> None:
    """The weights have stepped and the forecast has not: resumed, it would lag a step behind for ever."""

    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    settings = {"probes": "train", "budget": None, "every": [0, 4, 9], "diagnostics": LAZY}
    trainer(tmp_path, Early(), NTKWatch(**settings), max_steps=5).fit(Linear(sgd), data())
    watch = NTKWatch(**settings)
    trainer(tmp_path, watch, max_steps=9).fit(Linear(sgd), data(), ckpt_path=tmp_path / "a.ckpt")
    assert "not in the checkpoint" in watch.last.reasons["forecast_error"]


class Manual(Linear):
    def __init__(self) -> None:
        super().__init__(sgd)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(mse(self(batch[0]), batch[1]))
        self.optimizers().step()


class Clipping(Linear):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...


class Unlabelled(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()


def two(module: Linear) -> Any:
    return [torch.optim.SGD([module.net.weight], 0.1), torch.optim.SGD([module.net.bias], 0.1)]


class TwoOptimizers(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = mse(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return two(self)


class NoLoss(Linear):
    ntk_loss = None  # type: ignore[assignment]


REFUSED: dict[str, tuple[Callable[[], Linear], str]] = {
    "manual optimization": (Manual, "manual optimization"),
    "two optimizers": (TwoOptimizers, "manual optimization"),
    "LBFGS": (lambda: Linear(lambda m: torch.optim.LBFGS(m.parameters())), "steps with a closure"),
    "own clipping": (lambda: Clipping(sgd), "Clipping.configure_gradient_clipping"),
    "no loss": (lambda: NoLoss(sgd), "pass loss="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_says_why_and_the_rest_is_measured(case: str, tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    watch = NTKWatch(probes="train", budget=None, every=[0, 2, 4], diagnostics=LAZY)
    trainer(tmp_path, watch, max_steps=4).fit(make(), data())
    assert watch.last.step >= 2, case
    assert watch.last.metrics["kernel_angle"] is not None
    for name in LAZY[1:]:
        assert reason in watch.last.reasons[name], watch.last.reasons


def test_the_full_preset_does_not_train_a_second_model_silently(tmp_path: Path) -> None:
    watch = NTKWatch(probes="train", budget=None, every=[0, 3], diagnostics="full")
    trainer(tmp_path, watch, max_steps=3).fit(Linear(sgd), data())
    assert watch.last.reasons["loss_if_lazy"] == NOT_NAMED
    watch = NTKWatch(probes="train", budget=None, every=[0, 3], diagnostics=["full", "loss_if_lazy"])
    trainer(tmp_path, watch, max_steps=3).fit(Linear(sgd), data())
    assert watch.last.metrics["loss_if_lazy"] == pytest.approx(watch.last.metrics["loss"])
    assert watch.last.metrics["effective_rank"] is not None


@pytest.mark.parametrize("method", ["add", "apply", "stepped", "rates", "weights"])
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_forecast_that_fails_ends_with_a_reason_and_the_run_goes_on(
    on_error: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails, also inside the optimizer's own step, whose hooks must not be touched there."""
    from ntkwatch.linearized.forecast import LinearForecast

    inner, calls = getattr(LinearForecast, method), iter(range(1000))

    def failing(self: LinearForecast, *args: Any, **kwargs: Any) -> Any:
        if next(calls) < 3:
            return inner(self, *args, **kwargs)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(LinearForecast, method, failing)
    watch = NTKWatch(probes="train", budget=None, every=[0, 5], diagnostics=LAZY, on_error=on_error)
    run = trainer(tmp_path, watch, max_steps=5)
    module = Linear(sgd)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    if on_error == "raise":
        with pytest.raises(RuntimeError, match="no such kernel"):
            run.fit(module, data())
        return
    with pytest.warns(UserWarning, match="the linear forecast failed"):
        run.fit(module, data())
    assert run.global_step == 5
    assert "RuntimeError: no such kernel" in watch.last.reasons["forecast_error"]
    assert watch.last.metrics["kernel_angle"] is not None
    plain = Linear(sgd)
    plain.load_state_dict(start)
    trainer(tmp_path, max_steps=5).fit(plain, data())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    for hooks in (run.optimizers[0]._optimizer_step_pre_hooks, run.optimizers[0]._optimizer_step_post_hooks):
        assert not hooks


def test_a_rank_that_does_not_come_ends_the_forecast_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ntkwatch.distributed import Ranks, RanksError

    def absent(self: Ranks, *args: Any, **kwargs: Any) -> None:
        raise RanksError("rank 0 waited to add up gradients with 2 ranks and one did not come within 300 s")

    monkeypatch.setattr(Ranks, "join", absent)
    watch = NTKWatch(probes="train", budget=None, every=[0, 4], diagnostics=LAZY)
    run = trainer(tmp_path, watch, max_steps=4)
    run.fit(Linear(sgd), data())
    assert run.global_step == 4
    assert "one did not come within 300 s" in watch.last.reasons["loss_if_lazy"]


def test_a_second_fit_has_a_forecast_of_its_own(tmp_path: Path) -> None:
    module = Deep(lambda m: sgd(m, momentum=0.9))
    errors = []
    for _ in range(2):
        watch = NTKWatch(probes="train", budget=None, every=[0, 1, 5], diagnostics=LAZY, on_error="raise")
        trainer(tmp_path, watch, max_epochs=1, max_steps=-1).fit(module, data())
        metrics = load_run(watch.record).metrics
        assert metrics["loss_if_lazy"].iloc[0] == pytest.approx(metrics["loss"].iloc[0]), "from its own start"
        errors.append(metrics["forecast_error"].iloc[-1])
        assert metrics["forecast_start_error"].iloc[-1] < 1e-9
    assert errors[0] != errors[1]


def test_another_loss_than_the_runs_is_seen_at_the_first_step(tmp_path: Path) -> None:
    watch = NTKWatch(probes="train", budget=None, every=[0, 2], diagnostics=LAZY)
    trainer(tmp_path, watch, max_steps=2).fit(Unlabelled(sgd), data())
    assert watch.last.metrics["forecast_start_error"] > 0.3


def test_its_time_is_overhead_and_no_probes(tmp_path: Path) -> None:
    """What that does to the grid and to ntk/overhead: test_time_aside_is_overhead_and_takes_no_probe_away."""
    found = {}
    for names in (["kernel_angle"], LAZY):
        watch = NTKWatch(probes=12, budget=None, every=[0], diagnostics=names, loss=nn.functional.cross_entropy)
        trainer(tmp_path, watch, max_steps=4).fit(Classifier(), *loaders())
        found[len(names)] = watch.schedule.state_dict()
        assert 0 < watch.last.metrics["overhead"] <= 1
    assert found[1]["aside"] == 0
    assert found[len(LAZY)]["aside"] > 0, "each batch of the forecast is timed"


def test_a_rich_run_leaves_its_forecast_and_the_two_losses_stand_side_by_side(tmp_path: Path) -> None:
    from ntkwatch.loggers.memory import Memory

    memory = Memory()
    watch = NTKWatch(
        probes=12, budget=None, every=[0, 10, 60], diagnostics=["forecast_error", "loss_if_lazy"],
        loss=nn.functional.cross_entropy, loggers=[memory],
    )  # fmt: skip
    trainer(tmp_path, watch, max_steps=60).fit(Classifier(), *loaders())
    loss, lazy = memory.curve("ntk/loss"), memory.curve("ntk/loss_if_lazy")
    assert list(loss) == list(lazy) == [0, 10, 60]
    assert loss[0] == pytest.approx(lazy[0], rel=1e-6)
    assert loss[60] != pytest.approx(lazy[60], rel=1e-3)
    assert 0.01 < watch.last.metrics["forecast_error"] < 1
    assert "the linearised network" in watch.summary()


def test_the_losses_share_a_chart_and_a_picture_of_the_report(tmp_path: Path) -> None:
    from ntkwatch.loggers.tensorboard import layout
    from ntkwatch.report import render

    watch = NTKWatch(probes="train", budget=None, every=[0, 3, 6], diagnostics=["default", "loss_if_lazy"])
    trainer(tmp_path, watch, max_steps=6).fit(Linear(sgd), data())
    charts = layout(watch.last)["NTK"]
    tags = charts["loss on the probes, and had the network stayed linear"][1]
    assert tags == ["ntk/loss$", "ntk/loss_if_lazy$"]
    assert "loss if lazy" in render([watch.record])
