"""The linear forecast: exact where the network is linear, under every optimizer; honest about what it is not given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor
from ntkwatch.linearized.forecast import LinearForecast

mse = nn.functional.mse_loss
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "SGD, heavy ball, decay": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01),
    "SGD, Nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9, nesterov=True),
    "SGD, dampening": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5, dampening=0.2),
    "SGD, groups": lambda m: torch.optim.SGD([{"params": [m.weight], "lr": 0.1}, {"params": [m.bias]}], lr=0.01),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.02),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.02),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
    "RMSprop, centred, momentum": lambda m: torch.optim.RMSprop(m.parameters(), 0.005, centered=True, momentum=0.5),
    "Adam, amsgrad, decay": lambda m: torch.optim.Adam(m.parameters(), 0.02, amsgrad=True, weight_decay=0.1),
    "Adam, its rate a tensor": lambda m: torch.optim.Adam(m.parameters(), torch.tensor(0.02)),
    "Adam, fused": lambda m: torch.optim.Adam(m.parameters(), 0.02, fused=True),
    "Adam, foreach": lambda m: torch.optim.Adam(m.parameters(), 0.02, foreach=True),
    "Adam of named parameters": lambda m: torch.optim.Adam(m.named_parameters(), 0.02),
    "SGD, maximizing": lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, maximize=True),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), 0.02),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), 0.05),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters(), 10.0),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), 0.01),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), 0.05),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), 0.05),
    "Muon": lambda m: torch.optim.Muon([m.weight], 0.02),
}
TOO_NEW = {"Muon", "Adafactor"}  # for some versions of torch
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if name not in TOO_NEW or hasattr(torch.optim, name)}


def batches(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 4).double(), torch.randn(8, 2).double()) for _ in range(count)]


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, forecast: LinearForecast, data: list) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    for batch in data:
        optimizer.zero_grad()
        mse(model(batch[0]), batch[1]).backward()
        optimizer.step()
        forecast.step(batch)
        schedule.step()


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_linear_network_does_what_is_forecast(case: str) -> None:
    model = nn.Linear(4, 2).double()
    optimizer, data, x = OPTIMIZERS[case](model), batches(), torch.randn(5, 4).double()
    forecast = LinearForecast(model, optimizer, mse)
    before = model(x).detach()
    follow(model, optimizer, forecast, data)
    assert float((model(x) - before).norm()) > 0.05, "the run moves"
    torch.testing.assert_close(forecast.outputs(x), model(x).detach(), rtol=1e-9, atol=1e-10)


def test_a_forecast_without_the_momentum_is_far_off_even_there() -> None:
    """The negative control: df/dt = −ηΘ∇𝓛 alone under heavy ball."""
    model = nn.Linear(4, 2).double()
    optimizer, data, x = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), batches(40), batches(1)[0][0]
    before = model(x).detach()
    forecast = LinearForecast(model, torch.optim.SGD(model.parameters(), lr=0.01), mse)
    follow(model, optimizer, forecast, data)
    error = float((forecast.outputs(x) - model(x)).norm() / (model(x) - before).norm())
    assert error > 0.3, error


def test_a_wide_network_follows_its_forecast_and_a_rich_one_does_not() -> None:
    """Large output scale keeps the network by its linearisation; small scale drives it away: both axes see it."""
    found = {}
    for name, scale in (("lazy", 30.0), ("rich", 0.3)):
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)).double()
        start = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)).double()
        start.load_state_dict(body.state_dict())
        outputs = lambda m, b, s=scale, f0=start: s * (m(b[0]) - f0(b[0]).detach())  # noqa: E731
        data = batches(1) * 60
        optimizer = torch.optim.SGD(body.parameters(), lr=0.2 / scale**2)
        forecast = LinearForecast(body, optimizer, mse, outputs=outputs)
        names = ["taylor_ratio", "forecast_error", "loss", "loss_if_lazy"]
        monitor = Monitor(body, data[0], outputs=outputs, loss=mse, diagnostics=names)
        monitor.forecast = forecast
        first = monitor.measure(0).metrics
        assert first["loss_if_lazy"] == pytest.approx(first["loss"])
        for batch in data:
            optimizer.zero_grad()
            mse(outputs(body, batch), batch[1]).backward()
            optimizer.step()
            forecast.step(batch)
        found[name] = monitor.measure(60).metrics
    assert found["lazy"]["forecast_error"] < 0.02 < 0.1 < found["rich"]["forecast_error"], found
    assert found["lazy"]["loss_if_lazy"] == pytest.approx(found["lazy"]["loss"], rel=0.02)


def test_the_forecast_leaves_the_run_as_it_is() -> None:
    """One run with a forecast beside it, one without: the same weights, bit for bit."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2)).double()
        data, optimizer = batches(6), torch.optim.Adam(model.parameters(), lr=0.01)
        forecast = LinearForecast(model, optimizer, mse) if watched else None
        torch.manual_seed(5)
        for batch in data:
            optimizer.zero_grad()
            mse(model(batch[0]), batch[1]).backward()
            optimizer.step()
            if forecast is not None:
                forecast.step(batch)
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(1, 4).double()).sum().backward()
    optimizer.step()
    return optimizer


def test_sparse_gradients_are_followed() -> None:
    model = nn.EmbeddingBag(10, 2, sparse=True).double()
    optimizer = torch.optim.SparseAdam(model.parameters(), 0.05)
    forecast = LinearForecast(model, optimizer, mse)
    data = [(torch.randint(0, 10, (8, 3)), torch.randn(8, 2).double()) for _ in range(6)]
    follow(model, optimizer, forecast, data)
    torch.testing.assert_close(forecast.outputs(data[0]), model(data[0][0]).detach(), rtol=1e-9, atol=1e-10)


def test_tied_weights_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 2 * self.b(x.flip(1))

    model = Tied().double()
    optimizer, data = torch.optim.Adam(model.parameters(), 0.02, weight_decay=0.1), batches()
    forecast = LinearForecast(model, optimizer, mse)
    follow(model, optimizer, forecast, data)
    torch.testing.assert_close(forecast.outputs(data[0][0]), model(data[0][0]).detach(), rtol=1e-9, atol=1e-10)


def test_a_step_that_the_forecast_was_not_told_of_makes_it_undefined() -> None:
    model, data = nn.Linear(4, 2).double(), batches(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    monitor = Monitor(model, data[0], loss=mse, diagnostics=["forecast_error", "loss_if_lazy"])
    monitor.measure(0)
    monitor.forecast = forecast = LinearForecast(model, optimizer, mse)
    follow(model, optimizer, forecast, data[:2])
    assert monitor.measure(2).metrics["forecast_error"] == pytest.approx(0, abs=1e-9)
    mse(model(data[2][0]), data[2][1]).backward()
    optimizer.step()
    found = monitor.measure(3)
    assert found.metrics["loss_if_lazy"] is None
    assert "not those that the optimizer left" in found.reasons["loss_if_lazy"]


REFUSED: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], object, str]] = {
    "no loss": (lambda m: torch.optim.SGD(m.parameters(), lr=1.0), None, "pass loss="),
    "closure": (lambda m: torch.optim.LBFGS(m.parameters()), mse, "closure"),
    "late": (stepped, mse, "stepped already"),
    "foreign": (lambda m: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0), mse, "trains none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(case: str) -> None:
    make, loss, reason = REFUSED[case]
    model = nn.Linear(4, 2).double()
    with pytest.raises(ValueError, match=reason):
        LinearForecast(model, make(model), loss)


def test_a_forecast_diverges_where_the_run_is_a_catapult() -> None:
    """Beyond the largest stable rate the kernel shrinks until the rate is stable; the linear model's cannot."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256, bias=False), nn.Linear(256, 1, bias=False))
    batch = (torch.randn(20, 16), torch.randn(20, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    monitor = Monitor(model, batch, loss=mse, diagnostics=["loss", "loss_if_lazy", "max_stable_lr", "forecast_error"])
    limit = monitor.measure(0, optimizer=optimizer).metrics["max_stable_lr"]
    assert limit is not None
    optimizer.param_groups[0]["lr"] = 1.75 * limit
    monitor.forecast = forecast = LinearForecast(model, optimizer, mse)
    for _ in range(160):
        optimizer.zero_grad()
        mse(model(batch[0]), batch[1]).backward()
        optimizer.step()
        forecast.step(batch)
    found = monitor.measure(160, optimizer=optimizer)
    assert found.metrics["loss"] is not None
    assert found.metrics["loss"] < 1
    assert found.metrics["loss_if_lazy"] is None
    assert "the linearised network diverged" in found.reasons["loss_if_lazy"]
    assert "the linearised network diverged" in found.reasons["forecast_error"]


def test_without_a_forecast_the_curve_says_what_it_needs() -> None:
    found = Monitor(nn.Linear(4, 2).double(), batches(1)[0], loss=mse, diagnostics=["loss_if_lazy"]).measure(0)
    assert "LinearForecast" in found.reasons["loss_if_lazy"]
