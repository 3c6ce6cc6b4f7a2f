"""Held out, learning curves, posteriors and flow as diagnostics: against refitting, theory, ensembles and real runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, infinite, metrics
from ntkwatch.diagnostics import DIAGNOSTICS
from ntkwatch.diagnostics.uncertainty import UNCERTAINTY

mse = nn.functional.mse_loss
HELD_OUT = ["holdout_error", "holdout_error_ridgeless", "holdout_accuracy", "eigenlearning_error"]


class Features(nn.Module):
    """A linear model of given features: its kernel is their Gram matrix."""

    def __init__(self, dim: int, outputs: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim, outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def power_law(n: int = 64, dim: int = 200) -> tuple[Tensor, Tensor]:
    """Gaussian features of a power-law spectrum, and a target that lies along them."""
    scales = torch.arange(1, dim + 1).double() ** -0.75
    x = normal(0, n, dim) * scales
    return x, x @ (normal(1, dim, 1) * scales[:, None])


# ── held out ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_held_out_error_is_that_of_refitting() -> None:
    x, y = power_law(20)
    found = Monitor(Features(200), (x, y), targets=y, diagnostics=HELD_OUT).measure(0)
    k, target = x @ x.T, (y - y.mean()) / y.std(correction=0)
    ridge = 1e-4 * float(k.trace()) / 20
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(8):
        order = torch.randperm(20, generator=generator)
        a, b = order[:10], order[10:]
        guess = k[b][:, a] @ torch.linalg.solve(k[a][:, a] + ridge * torch.eye(10), target[a])
        errors.append((guess - target[b]).square().mean())
    assert found.metrics["holdout_error"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-9)
    assert "values, not classes" in found.reasons["holdout_accuracy"]


def test_theory_expects_the_held_out_error_that_is_seen() -> None:
    """Within a tenth, in the mean over eight draws of 64 probes, for learnable targets and for shuffled ones."""
    whole_x, whole_y = power_law(512)
    sums = {name: torch.zeros(2) for name in ("own", "shuffled")}
    for seed in range(8):
        order = torch.randperm(512, generator=torch.Generator().manual_seed(seed))[:64]
        x, y = whole_x[order], whole_y[order]
        for name, target in (("own", y), ("shuffled", y[torch.randperm(64)])):
            found = Monitor(Features(200), (x, target), diagnostics=HELD_OUT).measure(0).metrics
            sums[name] += torch.tensor([found["eigenlearning_error"], found["holdout_error"]])
    for name, (expected, seen) in sums.items():
        assert float(expected) == pytest.approx(float(seen), rel=0.1), name
    assert sums["shuffled"][1] > 3 * sums["own"][1]


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_kernel_that_knows_the_classes_is_right_about_held_out_ones(outputs: int) -> None:
    label = torch.arange(30) % max(outputs, 2)
    x = nn.functional.one_hot(label).double() + 0.01 * normal(0, 30, max(outputs, 2))
    y = nn.functional.one_hot(label).double() if outputs > 1 else 2.0 * label[:, None].double() - 1
    found = Monitor(Features(x.shape[1], outputs), (x, y), targets=label if outputs > 1 else y, diagnostics=HELD_OUT)
    found = found.measure(0)
    assert found.metrics["holdout_accuracy"] == 1.0, found.reasons
    assert found.metrics["holdout_error"] < 0.05


def test_the_learning_curve_in_one_number_is_where_it_falls_to_half() -> None:
    x, y = power_law(40)
    found = Monitor(Features(200), (x, y), diagnostics=["eigenlearning_samples"]).measure(0)
    k, target = x @ x.T, (y - y.mean()) / y.std(correction=0)
    curve = metrics.learning_curve(k, target, range(1, 21), 1e-4 * float(k.trace()) / 40)
    s = int(found.metrics["eigenlearning_samples"])
    assert s > 1
    assert curve[s - 1] <= 0.5 < curve[: s - 1].min()
    few = Monitor(Features(40), (torch.eye(40).double(), y), diagnostics=["eigenlearning_samples"]).measure(0)
    assert "not enough for half" in few.reasons["eigenlearning_samples"], "orthogonal probes tell nothing of each other"


# ── posteriors ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_net_whose_kernel_made_the_targets_is_calibrated() -> None:
    """Targets drawn from the prior, at any scale: 95 % of the held-out ones are inside; a wrong prior is worse."""
    inside, right, wrong = [], [], []
    for seed in range(6):
        x = normal(seed, 60, 80) / 80**0.5
        y = 7 * x @ normal(50 + seed, 80, 1)
        found = Monitor(Features(80), (x, y), diagnostics=["ntkgp_nll", "ntkgp_coverage"]).measure(0).metrics
        inside.append(found["ntkgp_coverage"])
        right.append(found["ntkgp_nll"])
        skewed = torch.cat([x[:, :4] * 8, x[:, 4:] / 8], 1)  # nearly all of the prior on four directions
        wrong.append(Monitor(Features(80), (skewed, y), diagnostics=["ntkgp_nll"]).measure(0).metrics["ntkgp_nll"])
    assert sum(inside) / 6 == pytest.approx(0.95, abs=0.04), inside
    assert sum(right) < sum(wrong)


def test_the_ensembles_posterior_is_the_metric_on_the_halves() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1)).double()
    x, y = normal(0, 16, 5), normal(1, 16, 1)
    s = infinite.kernel(infinite.from_module(model), x).nngp
    monitor = Monitor(model, (x, y), diagnostics=list(UNCERTAINTY))
    found = monitor.measure(0)
    k, target = found.kernel, (y - y.mean()) / y.std(correction=0)
    ridge, noise = (1e-4 * float(m.trace()) / 16 for m in (k, s))
    generator, wanted = torch.Generator().manual_seed(0), []
    for _ in range(8):
        order = torch.randperm(16, generator=generator)
        a, b = order[:8], order[8:]
        posterior = metrics.gp_posterior(
            k[a][:, a], target[a], k[b][:, a], s[a][:, a], s[b][:, a], s[b][:, b], ridge
        )  # fmt: skip
        wanted.append(metrics.gaussian_nll(posterior.mean, posterior.variance + noise, target[b]))
    assert found.metrics["gp_nll"] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-6)
    assert 0 <= found.metrics["gp_coverage"] <= 1
    monitor.nngp = s.float()
    assert monitor.measure(1).metrics["gp_nll"] == pytest.approx(found.metrics["gp_nll"], rel=1e-4), "given, in float32"
    monitor.nngp = 4 * s
    assert monitor.measure(1).metrics["gp_nll"] != pytest.approx(found.metrics["gp_nll"], rel=1e-2), (
        "what is given counts"
    )
    monitor.nngp = s[:4, :4]
    assert "must be [16, 16]" in monitor.measure(2).reasons["gp_coverage"]


# ── flow ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
Make = Callable[[nn.Module], torch.optim.Optimizer]
RUNS: dict[str, tuple[Make, Callable[..., Tensor]]] = {
    "GD": (lambda m: torch.optim.SGD(m.parameters(), 1e-3), mse),
    "heavy ball": (lambda m: torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9), mse),
    "Nesterov": (lambda m: torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9, nesterov=True), mse),
    "dampened": (lambda m: torch.optim.SGD(m.parameters(), 2e-4, momentum=0.9, dampening=0.5), mse),
    "groups": (
        lambda m: torch.optim.SGD([{"params": [m.weight], "lr": 2e-3}, {"params": [m.bias], "lr": 5e-4}]),
        mse,
    ),
    "half of the square": (
        lambda m: torch.optim.SGD(m.parameters(), 1e-3),
        lambda f, y: 0.5 * (f - y).square().sum(1).mean(),
    ),
}


def flow(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, batch: Any, steps: int) -> Any:
    monitor = Monitor(model, batch, loss=loss, diagnostics=["flow_error", "loss_if_flow", "loss"])
    monitor.measure(0, optimizer=optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return monitor.measure(steps, optimizer=optimizer)


@pytest.mark.parametrize("case", RUNS)
def test_a_linear_network_in_small_steps_flows_as_told(case: str) -> None:
    make, loss = RUNS[case]
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 2).double(), (normal(0, 10, 4), normal(1, 10, 2))
    found = flow(model, make(model), loss, batch, 800).metrics
    assert found["flow_error"] < 0.01, case
    assert found["loss_if_flow"] == pytest.approx(found["loss"], rel=0.01), case


def test_a_rich_network_leaves_the_flow_of_its_first_kernel() -> None:
    found = {}
    for name, scale in (("lazy", 30.0), ("rich", 0.3)):
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)).double()
        nn.init.zeros_(body[2].weight)
        loss = lambda f, y, s=scale: mse(s * f, y)  # noqa: E731
        optimizer = torch.optim.SGD(body.parameters(), 0.05 / scale**2)
        found[name] = flow(body, optimizer, loss, (normal(0, 10, 4), normal(1, 10, 1)), 400).metrics["flow_error"]
    assert found["lazy"] < 0.01 < 0.1 < found["rich"], found


NO_FLOW: dict[str, tuple[Make, Any, str]] = {
    "cross-entropy": (
        lambda m: torch.optim.SGD(m.parameters(), 0.1),
        nn.functional.cross_entropy,
        "squared loss alone",
    ),
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), 0.1), mse, "does not descend along the gradient"),
    "Huber": (lambda m: torch.optim.SGD(m.parameters(), 0.1), nn.functional.huber_loss, "squared loss alone"),
}


@pytest.mark.parametrize("case", NO_FLOW)
def test_what_does_not_flow_in_closed_form_says_so(case: str) -> None:
    make, loss, reason = NO_FLOW[case]
    model = nn.Linear(4, 2).double()
    y = torch.arange(10) % 2 if case == "classes" else 5 * normal(1, 10, 2)
    found = flow(model, make(model), loss, (normal(0, 10, 4), y), 3)
    assert reason in found.reasons["flow_error"], case


def test_the_flow_of_two_points_is_the_known_one() -> None:
    """Known answer 3.12 through the monitor: K = [[2, 1], [1, 2]], y = (1, 0), 𝓛 = ½‖f − y‖², t = 1."""
    half = torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
    batch = (half, torch.tensor([[1.0], [0.0]]).double())
    model = Features(2)
    found = flow(
        model, torch.optim.SGD(model.parameters(), 1e-3), lambda f, y: 0.5 * (f - y).square().sum(), batch, 1000
    )
    f = torch.tensor([[0.7911667452], [0.1590461864]], dtype=torch.float64)
    assert found.metrics["loss_if_flow"] == pytest.approx(float(0.5 * (f - batch[1]).square().sum()), abs=1e-9)


@pytest.mark.parametrize("name", [*HELD_OUT, "eigenlearning_samples", *UNCERTAINTY])
def test_too_few_probes_or_no_targets_say_so(name: str) -> None:
    x, y = power_law(6)
    monitor = Monitor(Features(200), (x, y), diagnostics=[name])
    monitor.nngp = x @ x.T
    few = monitor.measure(0).reasons.get(name, "")
    assert "too few" in few or name == "holdout_accuracy", few
    none = Monitor(Features(200), x, diagnostics=[name]).measure(0)
    assert "targets" in none.reasons[name]
    assert "targets" in DIAGNOSTICS[name].needs
