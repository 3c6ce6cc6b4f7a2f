"""What compares outputs under rounding: right to a factor of two, or undefined because the motion is below rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Measurement, Monitor
from ntkwatch.linearized.forecast import LinearForecast
from ntkwatch.output_scaling import output_scale

SCALES = (1e-4, 1e-3, 1e-2, 1e-1, 0.5)
RATIOS = ["taylor_ratio", "linearization_error", "taylor_ratio_se", "parameter_distance", "kernel_angle"]


class Inside(nn.Module):
    """`net` under autocast, as the Trainer of Hugging Face puts it; or in the type of its weights, as "bf16-true"."""

    def __init__(self, net: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.net, self.autocast = net, autocast

    def forward(self, x: Tensor) -> Tensor:
        if self.autocast is None:
            return self.net(x.to(next(self.net.parameters()).dtype))
        with torch.autocast(x.device.type, self.autocast):
            return self.net(x).float()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(8, 16), nn.Linear(16, 3)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.up(x.view(-1, 3, 8))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 128), nn.GELU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))


def cnn() -> nn.Module:
    """BatchNorm with statistics of its own."""
    first = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8), nn.Tanh()
    net = nn.Sequential(nn.Unflatten(1, (1, 4, 6)), *first, nn.Flatten(), nn.Linear(24, 3))
    for _ in range(20):
        net(torch.randn(32, 24))
    return net.eval()


NETS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "transformer": Tokens, "CNN": cnn}
MODES: dict[str, tuple[torch.dtype | None, torch.dtype]] = {  # autocast, the weights' type
    "autocast bfloat16": (torch.bfloat16, torch.float32),
    "autocast float16": (torch.float16, torch.float32),
    "bfloat16 throughout": (None, torch.bfloat16),
    "float16 throughout": (None, torch.float16),
}


def probes() -> tuple[Tensor, Tensor]:
    return torch.randn(24, 24), torch.randint(0, 3, (24,))


def loss_of(net: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(rows[0]), rows[1])


def noise(net: nn.Module, rows: tuple[Tensor, Tensor], scale: float) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p) * p.square().mean().sqrt())


def sgd(net: nn.Module, rows: tuple[Tensor, Tensor], scale: float) -> None:
    gradients = torch.autograd.grad(loss_of(net, rows), list(net.parameters()))
    size = math.hypot(*(float(p.detach().norm()) for p in net.parameters()))
    rate = 0.2 * scale * size / math.hypot(*(float(g.norm()) for g in gradients))
    with torch.no_grad():
        for p, g in zip(net.parameters(), gradients, strict=True):
            p.sub_(rate * g)


def adam(net: nn.Module, rows: tuple[Tensor, Tensor], scale: float) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02 * scale)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net, rows).backward()
        optimizer.step()


MOVES: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor], float], None]] = {"noise": noise, "SGD": sgd, "Adam": adam}


def places(net: nn.Module, rows: tuple[Tensor, Tensor], move: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The weights of the net before and after each move, in float32 arithmetic, then rounded to `dtype`."""
    found = [copy.deepcopy(net.to(dtype).float().state_dict())]
    for scale in SCALES:
        moved = copy.deepcopy(net)
        MOVES[move](moved, rows, scale)
        found.append(moved.to(dtype).float().state_dict())
    return found


def measured(
    net: nn.Module, autocast: torch.dtype | None, at: list[dict[str, Tensor]], rows: tuple[Tensor, Tensor]
) -> list[Measurement]:
    monitor = Monitor(Inside(net, autocast), rows, diagnostics=RATIOS)
    found = []
    for step, weights in enumerate(at):
        net.load_state_dict(weights)
        found.append(monitor.measure(step))
    return found[1:]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETS)
def test_ratios_are_right_to_a_factor_of_two_or_below_rounding(name: str, mode: str, move: str) -> None:
    torch.manual_seed(0)
    autocast, dtype = MODES[mode]
    net, rows = NETS[name](), probes()
    at = places(net, rows, move, dtype)
    exact = measured(copy.deepcopy(net).double(), None, at, rows)
    found = measured(net.to(dtype), autocast, at, rows)
    for scale, one, right in zip(SCALES, found, exact, strict=True):
        case = f"{name}, {mode}, {move} of {scale}"
        for ratio in ("taylor_ratio", "linearization_error"):
            value, expected = one.metrics[ratio], right.metrics[ratio]
            if value is None:
                assert "below rounding" in one.reasons[ratio], f"{case}: {one.reasons[ratio]}"
                assert str(autocast or dtype).removeprefix("torch.") in one.reasons[ratio], case
            else:
                assert expected is not None, f"{case}: {right.reasons[ratio]}"
                assert expected / 2 <= value <= 2 * expected, f"{case}: {ratio} {value:.2e}, exactly {expected:.2e}"
        assert (one.metrics["taylor_ratio_se"] is None) == (one.metrics["taylor_ratio"] is None), case
    assert found[-1].metrics["taylor_ratio"] is not None, f"{name}, {mode}, {move}: {found[-1].reasons}"
    assert found[0].metrics["taylor_ratio"] is None, f"{name}, {mode}, {move}: the smallest motion is rounding"


@pytest.mark.parametrize("name", NETS)
def test_a_kernel_that_turned_is_not_no_motion(name: str) -> None:
    torch.manual_seed(0)
    rows = probes()
    net = NETS[name]().bfloat16()
    at = places(copy.deepcopy(net).float(), rows, "noise", torch.bfloat16)
    for one in measured(net, None, at, rows):
        assert one.metrics["kernel_angle"] is not None
        assert one.metrics["kernel_angle"] > 0, name
        assert "no motion" not in one.reasons.get("taylor_ratio", ""), f"{name}: {one.reasons}"


def test_no_motion_is_said_where_nothing_moved() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        monitor = Monitor(Inside(mlp().to(dtype), None), probes(), diagnostics=RATIOS)
        monitor.measure(0)
        assert monitor.measure(1).reasons["taylor_ratio"].startswith("no motion yet"), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_linear_network_has_a_ratio_near_zero(dtype: torch.dtype) -> None:
    """Rounding makes all of it there, and is negligible: the ratio is defined."""
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(24, 3).to(dtype), probes()
    rows = (x.to(dtype), y)
    monitor = Monitor(net, rows, diagnostics=RATIOS)
    monitor.measure(0)
    sgd(net, rows, 0.1)
    value = monitor.measure(1).metrics["taylor_ratio"]
    assert value is not None
    assert value < 1e-5


@pytest.mark.parametrize("gamma", [0.01, 1.0, 100.0])
def test_the_rounding_of_a_difference_is_that_of_its_parts(gamma: float) -> None:
    """Near the start (f − f_0)/γ is as small as its motion, and its rounding is that of f."""
    torch.manual_seed(0)
    net, rows = mlp(), probes()
    ratios = []
    for scale in (1e-6, 1e-2):
        scaled = output_scale(net, gamma)
        monitor = Monitor(scaled, rows, diagnostics=RATIOS)
        monitor.measure(0)
        noise(scaled, rows, scale)
        ratios.append(monitor.measure(1))
    assert "below rounding" in ratios[0].reasons["taylor_ratio"], f"gamma {gamma}: {ratios[0].metrics}"
    assert ratios[1].metrics["taylor_ratio"] is not None, f"gamma {gamma}: {ratios[1].reasons}"


class Halves(nn.Module):
    """A frozen backbone under autocast and a trained head outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = mlp().requires_grad_(False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            h = self.backbone(x)
        return self.head(h.float())


def test_the_rounding_of_a_frozen_part_is_in_both_outputs_and_cancels() -> None:
    torch.manual_seed(0)
    net, rows = Halves(), probes()
    monitor = Monitor(net, rows[0], diagnostics=RATIOS)
    monitor.measure(0)
    noise(net.head, rows, 0.1)
    value = monitor.measure(1).metrics["taylor_ratio"]
    assert value is not None
    assert value < 1e-5


# ── what else compares outputs ────────────────────────────────────────────────────────────────────────────────────────
def agree(case: str, one: Measurement, right: Mapping[str, float | None], names: list[str]) -> int:
    """How many of the names are defined; those that are must be within a factor of two."""
    for name in names:
        value, expected = one.metrics[name], right[name]
        if value is None:
            assert "rounding" in one.reasons[name], f"{case}: {name}: {one.reasons[name]}"
        else:
            assert expected is not None, f"{case}: {name}"
            assert expected / 2 <= value <= 2 * expected, f"{case}: {name} {value:.2e}, in float32 {expected:.2e}"
    return sum(one.metrics[name] is not None for name in names)


def followed(autocast: torch.dtype | None, rate: float) -> Measurement:
    torch.manual_seed(0)
    model, rows = Inside(mlp(), autocast), probes()
    mse = nn.functional.mse_loss
    rows = (rows[0], nn.functional.one_hot(rows[1], 3).float())
    names = ["forecast_error", "flow_error", "taylor_ratio"]
    monitor = Monitor(model, rows, loss=mse, diagnostics=names)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    monitor.forecast = LinearForecast(model, optimizer, mse)
    monitor.measure(0, optimizer=optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        mse(model(rows[0]), rows[1]).backward()
        optimizer.step()
        monitor.forecast.step(rows)
    return monitor.measure(4, optimizer=optimizer)


def test_forecasts_are_compared_above_rounding() -> None:
    names, defined = ["forecast_error", "flow_error", "taylor_ratio"], []
    for rate in (1e-5, 1e-3, 0.1, 2.0):
        right = followed(None, rate).metrics
        for autocast in (torch.bfloat16, torch.float16):
            defined.append(agree(f"{autocast} at rate {rate}", followed(autocast, rate), right, names))
    assert defined[0] == 0, "at the smallest rate all is rounding"
    assert defined[-1] == 3, "at the largest nothing is"


def shifted(autocast: torch.dtype | None, rows: Tensor) -> Measurement:
    """BatchNorm's statistics alone move, by what one batch does at that momentum."""
    torch.manual_seed(0)
    net = cnn()
    monitor = Monitor(Inside(net, autocast), probes()[0], diagnostics=["statistics_shift"])
    monitor.measure(0)
    net.train()(rows)
    return monitor.measure(1)


def test_shifts_of_statistics_are_told_above_rounding() -> None:
    defined = []
    for spread in (1.0, 1.02, 3.0):
        torch.manual_seed(1)
        rows = spread * torch.randn(4096, 24)
        right = shifted(None, rows).metrics
        one = shifted(torch.bfloat16, rows)
        defined.append(agree(f"rows × {spread}", one, right, ["statistics_shift"]))
    assert defined[-1] == 1, "a large shift is told"


SELF_TEST = ["one_step_error", "one_step_halving"]


def self_test(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Measurement:
    return Monitor(model, rows, loss=nn.functional.cross_entropy, diagnostics=SELF_TEST).measure(0)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_self_test_of_a_twin_does_not_halve_into_rounding(dtype: torch.dtype, gamma: float) -> None:
    """Its outputs are zero at the start, and their rounding is not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)
    rows = probes()
    found = self_test(output_scale(net, gamma), (rows[0].to(dtype), rows[1]))
    assert found.metrics["one_step_halving"] == pytest.approx(0.5, abs=0.1), f"gamma {gamma}: {found.metrics}"


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_the_self_test_under_autocast_accuses_nobody(autocast: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = probes()
    found = self_test(Inside(nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 3)), autocast), rows)
    halving = found.metrics["one_step_halving"]
    assert halving is None or halving < 0.8, found.metrics
