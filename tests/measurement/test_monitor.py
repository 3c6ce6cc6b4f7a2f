"""Monitor without a Trainer: its numbers against known answers, and what it leaves of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, UnsupportedModel, empirical_ntk, load_run, metrics
from ntkwatch.diagnostics import DIAGNOSTICS, select
from ntkwatch.summary import optimizer_name


class Chain(nn.Module):
    """f = a·b·x, known answer 3.2."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.b = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.set(a)

    def set(self, a: float) -> None:
        with torch.no_grad():
            self.a.weight.fill_(a)
            self.b.weight.fill_(a)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def relu_net(depth: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(5, 5, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(5, 2, bias=False)).to(dtype)


def test_gradient_flow_of_a_scalar_chain() -> None:
    """u from .01 to .9955: the kernel only grows, yet the outputs leave the linearisation."""
    start, end = 0.01, 0.9955255179
    model = Chain(math.sqrt(start))
    monitor = Monitor(model, torch.ones(1, 1, dtype=torch.float64))
    monitor.measure(0)
    model.set(math.sqrt(end))
    found = monitor.measure(5).metrics
    assert found["kernel_angle"] == pytest.approx(0, abs=1e-12)
    assert found["kernel_scale"] == pytest.approx(4.600685663461, abs=1e-9)
    assert found["taylor_ratio"] == pytest.approx(0.691776659228, abs=1e-9)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model=None.*an nn.Module"),
    "a model's class": ({"model": nn.Linear}, "model=.*an nn.Module, not its class"),
    "targets": ({"targets": 5}, "targets=5.*a tensor"),
    "targets by name": ({"targets": "labels"}, "targets='labels'.*lambda batch"),
    "record": ({"record": True}, "record=True.*a folder's path"),
    "seed": ({"seed": 2**64}, "seed=.*64 bits"),
    "outputs": ({"outputs": 3}, "outputs=3.*a callable"),
    "hparams": ({"hparams": 3}, "hparams=3.*a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_raise_at_construction(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Monitor(**{"model": nn.Linear(3, 2), "probes": torch.eye(3), **arguments})


@pytest.mark.parametrize(("s", "depth", "ratio"), [(0.5, 3, 5 / 19), (2.0, 3, 4 / 10), (0.5, 2, 0.25 / 1.75)])
def test_shrinking_a_relu_net_moves_scale_and_taylor_ratio_not_the_angle(s: float, depth: int, ratio: float) -> None:
    model = relu_net(depth)
    monitor = Monitor(model, torch.randn(6, 5, dtype=torch.float64))
    monitor.measure(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= s
    found = monitor.measure(1).metrics
    assert found["taylor_ratio"] == pytest.approx(ratio, abs=1e-10)
    assert found["kernel_scale"] == pytest.approx(2 * (depth - 1) * math.log(s), abs=1e-10)
    assert found["kernel_angle"] == pytest.approx(0, abs=1e-7)
    assert found["parameter_distance"] == pytest.approx(abs(s - 1), abs=1e-12)


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("reduction", ["trace", "blocks", "full", "sum"])
def test_every_reduction_is_the_public_kernel(reduction: str) -> None:
    model, x = relu_net(), torch.randn(5, 5, dtype=torch.float64)
    monitor = Monitor(model, x, torch.arange(5) % 2, reduction=reduction)
    start = monitor.measure(0)
    moved(model)
    now = monitor.measure(1)
    expected = empirical_ntk(model, x, reduction=reduction)
    torch.testing.assert_close(now.kernel, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.tensor(now.metrics["kernel_angle"]).double(), metrics.kernel_angle(expected, start.kernel)
    )
    layers = torch.stack(list(now.layers.values())).sum(dim=0)
    torch.testing.assert_close(layers, empirical_ntk(model, x), rtol=1e-12, atol=1e-12)
    assert now.metrics["centered_alignment"] is not None
    assert now.context["reduction"] == reduction


def test_the_first_probe_says_what_it_cannot_know() -> None:
    first = Monitor(relu_net(), torch.randn(5, 5, dtype=torch.float64)).measure(0)
    assert first.metrics["kernel_distance"] == 0
    for name in ("taylor_ratio", "kernel_velocity", "centered_alignment"):
        assert first.metrics[name] is None, name
        assert first.reasons[name], name
    assert set(first.reasons) == {name for name, value in first.metrics.items() if value is None}


def test_nothing_moved_is_said_not_divided() -> None:
    monitor = Monitor(relu_net(), torch.randn(5, 5, dtype=torch.float64))
    monitor.measure(0)
    again = monitor.measure(1)
    assert again.metrics["taylor_ratio"] is None
    assert "no motion yet" in again.reasons["taylor_ratio"]


def test_velocity_is_the_angle_per_step_between_probes() -> None:
    model = relu_net()
    monitor = Monitor(model, torch.randn(5, 5, dtype=torch.float64))
    before = monitor.measure(0)
    moved(model)
    after = monitor.measure(4)
    angle = float(metrics.kernel_angle(after.kernel, before.kernel))
    assert after.metrics["kernel_velocity"] == pytest.approx(angle / 4)


def test_a_linear_model_never_leaves_its_linearisation() -> None:
    model = nn.Linear(5, 2).double()
    monitor = Monitor(model, torch.randn(6, 5, dtype=torch.float64))
    monitor.measure(0)
    moved(model)
    found = monitor.measure(1).metrics
    assert found["taylor_ratio"] < 1e-14
    assert found["kernel_angle"] < 1e-12


def test_parameters_frozen_after_the_baseline_stay_in_the_kernel() -> None:
    model = relu_net()
    monitor = Monitor(model, torch.randn(5, 5, dtype=torch.float64))
    start = monitor.measure(0)
    model[0].weight.requires_grad_(False)
    later = monitor.measure(1)
    torch.testing.assert_close(later.kernel, start.kernel)
    assert not model[0].weight.requires_grad


def test_dropout_is_off_and_the_mode_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)).double().train()
    x = torch.randn(5, 5, dtype=torch.float64)
    monitor = Monitor(model, x)
    assert torch.equal(monitor.measure(0).kernel, monitor.measure(1).kernel)
    assert all(module.training for module in model.modules())


def test_batchnorm_statistics_are_frozen_at_the_baseline() -> None:
    """Running statistics that move while no parameter does leave angle and Taylor ratio alone, and show apart."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    monitor = Monitor(model, torch.randn(6, 5, dtype=torch.float64))
    monitor.measure(0)
    model.train()(3 + 2 * torch.randn(64, 5, dtype=torch.float64))
    found = monitor.measure(1).metrics
    assert found["kernel_angle"] == 0
    assert found["statistics_angle"] > 0.01
    assert found["statistics_shift"] > 0.01


def _normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))


def _trained(moves: Sequence[torch.dtype], engine: str, resumed: bool) -> dict[str, float | None]:
    """All numbers after three steps, the model moved before each of them; resumed where asked."""
    model, x, y = _normalised(), torch.linspace(-1, 1, 60).reshape(12, 5).sin(), torch.arange(12) % 3
    fits = lambda batch: batch.to(next(model.parameters()).dtype)  # noqa: E731
    arguments = {"outputs": lambda net, batch: net(fits(batch[0])), "loss": nn.functional.cross_entropy}
    monitor = Monitor(model, (x, y), engine=engine, diagnostics="full", **arguments)
    monitor.measure(0)
    for move in moves:
        model.train().to(move)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        nn.functional.cross_entropy(model(fits(x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    if resumed:
        earlier, previous = monitor.baseline, monitor.previous
        monitor = Monitor(model, (x, y), engine=engine, diagnostics="full", **arguments)
        monitor.restore(earlier, previous, 0.0)
    return {name: value for name, value in monitor.measure(3).metrics.items() if name != "overhead"}


@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
@pytest.mark.parametrize("engine", ["layerwise", "functional"])
def test_a_model_that_moves_between_probes_is_compared_with_its_baseline(engine: str, resumed: bool) -> None:
    """To another type, which this machine has, as to another device: what was kept follows, where it is used."""
    double, single = torch.float64, torch.float32
    for name, moves in {"late": [single, double, double], "there and back": [double, single, single]}.items():
        moved, there = _trained(moves, engine, resumed), _trained([moves[-1]] * 3, engine, resumed)
        assert moved.keys() == there.keys()
        for metric, value in there.items():
            close = moved[metric] is value is None or moved[metric] == pytest.approx(value, rel=1e-3, abs=1e-4)
            assert close, f"{name}, {metric}: {moved[metric]}, was to be {value}"


def test_the_record_names_the_optimizer_that_it_was_given(tmp_path: Path) -> None:
    """`ntkwatch widths` says for which optimizers its reference lines hold."""
    model = relu_net()
    for name, optimizer, expected in (
        ("given", torch.optim.Adam(model.parameters()), "Adam"),
        ("not given", None, None),
    ):
        Monitor(model, torch.eye(5).double(), record=tmp_path / name).measure(0, optimizer=optimizer)
        assert optimizer_name(load_run(tmp_path / name).manifest) == expected, name


def test_the_record_holds_what_was_measured(tmp_path: Path) -> None:
    model = relu_net()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 2
    monitor = Monitor(model, (x, y), record=tmp_path / "run", hparams={"width": 5})
    measured = []
    for step in (0, 3, 9):
        measured.append(monitor.measure(step))
        moved(model)
    run = load_run(tmp_path / "run")
    assert run.steps == [0, 3, 9]
    assert run.width == 5
    for m in measured:
        assert torch.equal(run.kernel(m.step), m.kernel)
        stored = {k: v for k, v in run.metrics.loc[m.step].items() if v == v}
        assert stored == {k: v for k, v in m.metrics.items() if v is not None}


BAD: dict[str, tuple[Callable[[], Monitor], type[Exception], str]] = {
    "reduction": (lambda: Monitor(relu_net(), torch.zeros(2, 5).double(), reduction="all"), ValueError, "'trace'"),
    "engine": (lambda: Monitor(relu_net(), torch.zeros(2, 5).double(), engine="x"), ValueError, "'auto'"),
    "diagnostic": (lambda: Monitor(relu_net(), torch.zeros(2, 5).double(), diagnostics=["x"]), ValueError, "unknown"),
    "NaN": (lambda: Monitor(relu_net(), torch.full((2, 5), torch.nan).double()), ValueError, "not finite on 2 of 2"),
    "frozen": (lambda: Monitor(relu_net().requires_grad_(False), torch.eye(5).double()), UnsupportedModel, "param"),
    "outputs": (lambda: Monitor(relu_net(), torch.eye(5).double(), outputs=3), ValueError, "outputs=3.*a callable"),
    "loss": (lambda: Monitor(relu_net(), torch.eye(5).double(), loss="mse"), ValueError, "loss='mse'.*a callable"),
    "hparams": (lambda: Monitor(relu_net(), torch.eye(5).double(), hparams=3), ValueError, "hparams=3.*a mapping"),
    "seed": (lambda: Monitor(relu_net(), torch.eye(5).double(), seed=0.5), ValueError, "seed=0.5.*a whole number"),
    "no numbers": (lambda: Monitor(relu_net().to("meta"), torch.eye(5).double()), UnsupportedModel, "meta device"),
    "full": (
        lambda: Monitor(nn.Linear(2, 2000), torch.zeros(20, 2), reduction="full"), ValueError, "12.8 GB.*'trace'"
    ),
    "image": (lambda: Monitor(nn.Conv2d(1, 2, 1), torch.zeros(2, 1, 4, 4)), UnsupportedModel, "outputs="),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case: str) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_diagnostics_can_be_chosen_by_name() -> None:
    monitor = Monitor(relu_net(), torch.randn(5, 5).double(), diagnostics=["kernel_angle", "stable_rank"])
    assert set(monitor.measure(0).metrics) == {"kernel_angle", "stable_rank", "overhead"}
    assert select("full") == tuple(name for name, diagnostic in DIAGNOSTICS.items() if not diagnostic.by_name)
