"""Loss- and optimizer-aware diagnostics against matrices formed by hand and against runs that converge or do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, empirical_ntk
from ntkwatch.diagnostics.evaluations import ScaledNetwork
from ntkwatch.engines.functional import Functional
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from ntkwatch.model.loss import LossAt
from ntkwatch.model.optimizer import UpdateRule, read_rule

SPEED = ["gauss_newton_mu_max", "stability_ratio", "max_stable_lr", "time_constant_fastest", "time_constant_slowest"]
cross_entropy = nn.functional.cross_entropy
mse = nn.functional.mse_loss


def net(outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)]
    return nn.Sequential(*layers).double()


def rows(n: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Parameter name -> J [nC, P_l], a row for each (probe, output), by plain autograd."""
    named = dict(model.named_parameters())
    flat: dict[str, list[Tensor]] = {name: [] for name in named}
    for f in model(x).flatten():
        for name, g in zip(named, torch.autograd.grad(f, list(named.values()), retain_graph=True), strict=True):
            flat[name].append(g.flatten())
    return {name: torch.stack(g) for name, g in flat.items()}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[nn.Sequential], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
    "heavy ball": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "groups": lambda m: torch.optim.SGD(
        [{"params": m[0].parameters(), "lr": 0.5}, {"params": m[2:].parameters()}], 0.1
    ),
    "part": lambda m: torch.optim.SGD(m[2:].parameters(), lr=0.1),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-4, amsgrad=True),
    "Adam groups": lambda m: torch.optim.Adam(
        [{"params": m[0].parameters(), "lr": 1e-2}, {"params": m[2:].parameters()}]
    ),
}


def by_hand(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor | float]:
    """lr/D of every parameter, straight from the optimizer's state dict."""
    lrs = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    found: dict[str, Tensor | float] = {}
    for name, p in model.named_parameters():
        group, state = lrs.get(id(p)), optimizer.state.get(p, {})
        if group is None:
            found[name] = 0.0
        elif "exp_avg_sq" in state:
            v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
            found[name] = group["lr"] / ((v / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"])
        else:
            found[name] = group["lr"]
    return found


@pytest.mark.parametrize("engine", [Functional(), Layerwise()], ids=["functional", "layerwise"])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_the_preconditioned_kernel_is_the_one_formed_by_hand(case: str, engine: Any) -> None:
    model, (x, y) = net(), rows()
    optimizer = OPTIMIZERS[case](model)
    trained(model, optimizer, x, y)
    network = Network(model)
    rule = read_rule(optimizer, network.parameters)
    assert isinstance(rule, UpdateRule), rule
    wanted = sum(
        (s * torch.ones_like(p)).flatten().mul(j) @ j.T
        for (p, j, s) in zip(
            model.parameters(), jacobian(model, x).values(), by_hand(optimizer, model).values(), strict=True
        )
    )
    roots = {name: torch.as_tensor(s, dtype=torch.float64).sqrt() for name, s in rule.scales().items()}
    with leave_no_trace(model):
        kernel = engine.kernel(ScaledNetwork(network, roots), x, reduction="full", layers=None).value
    torch.testing.assert_close(kernel.reshape(wanted.shape), wanted, rtol=1e-10, atol=1e-12)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "cross-entropy": (cross_entropy, lambda y: y),
    "smoothed": (lambda f, y: cross_entropy(f, y, label_smoothing=0.1), lambda y: y),
    "weighted": (lambda f, y: cross_entropy(f, y, torch.tensor([1.0, 2.0, 3.0]).double()), lambda y: y),
    "mse": (mse, lambda y: nn.functional.one_hot(y, 3).double()),
    "several labels": (nn.functional.binary_cross_entropy_with_logits, lambda y: nn.functional.one_hot(y, 3).float()),
}


@pytest.mark.parametrize("case", LOSSES)
def test_gauss_newton_is_the_top_of_jhj(case: str) -> None:
    loss, form = LOSSES[case]
    model, (x, y) = net(), rows()
    target = form(y)
    f = model(x).detach()
    reference = torch.func.hessian(lambda g: loss(g, target.double() if target.is_floating_point() else target))(f)
    j = torch.cat(list(jacobian(model, x).values()), dim=1)
    mu = torch.linalg.eigvalsh(j.T @ reference.reshape(len(j), len(j)) @ j)[-1]
    found = Monitor(model, (x, target), loss=loss, diagnostics=SPEED).measure(0).metrics
    assert found["gauss_newton_mu_max"] == pytest.approx(float(mu), rel=1e-9)
    theta = float(torch.linalg.eigvalsh(j @ j.T)[-1])
    if case == "mse":
        assert found["gauss_newton_mu_max"] == pytest.approx(2 * theta / f.numel())
    if case == "cross-entropy":
        assert found["gauss_newton_mu_max"] <= theta / (2 * len(x)) * (1 + 1e-12)


@pytest.mark.parametrize("reduction", ["trace", "blocks", "sum", "full"])
def test_whatever_the_run_keeps_the_full_kernel_is_what_stability_is_taken_from(reduction: str) -> None:
    model, (x, y) = net(), rows()
    monitor = Monitor(model, (x, y), loss=cross_entropy, reduction=reduction, diagnostics=SPEED)
    wanted = Monitor(model, (x, y), loss=cross_entropy, reduction="full", diagnostics=SPEED).measure(0)
    found = monitor.measure(0)
    assert found.metrics["gauss_newton_mu_max"] == pytest.approx(wanted.metrics["gauss_newton_mu_max"])
    torch.testing.assert_close(found.kernel, empirical_ntk(model, x, reduction=reduction))
    assert found.context["reduction"] == reduction


GAPS: dict[str, tuple[dict[str, Any], str]] = {
    "no loss": ({"loss": None}, "pass loss="),
    "no targets": ({"targets": False}, "no targets"),
    "not a mean": ({"loss": lambda f, y: cross_entropy(f, y, reduction="none")}, "must return a mean"),
    "failing": ({"loss": lambda f, y: f.no_such_thing}, "the loss failed on the probes (AttributeError"),
    "coupled": ({"loss": lambda f, y: f.mean().square()}, "couples examples"),
    "indefinite": ({"loss": lambda f, y: f.sin().mean()}, "indefinite"),
    "constant": ({"loss": lambda f, y: torch.zeros(())}, "does not depend on the outputs"),
}


@pytest.mark.parametrize("case", GAPS)
def test_a_loss_that_gives_no_curvature_says_why(case: str) -> None:
    settings, reason = GAPS[case]
    x, y = rows()
    probes = (x, y) if settings.pop("targets", True) else x
    found = Monitor(net(), probes, diagnostics=SPEED, **{"loss": cross_entropy, **settings}).measure(0)
    assert found.metrics["gauss_newton_mu_max"] is None, case
    assert reason in found.reasons["gauss_newton_mu_max"], case


def test_the_modules_own_loss_is_used_and_a_given_one_comes_first() -> None:
    model, (x, y) = net(), rows()
    model.ntk_loss = lambda f, y: 2 * cross_entropy(f, y)  # type: ignore[assignment]
    own = Monitor(model, (x, y), diagnostics=["loss"]).measure(0).metrics["loss"]
    given = Monitor(model, (x, y), loss=cross_entropy, diagnostics=["loss"]).measure(0).metrics["loss"]
    assert own == pytest.approx(2 * given)


FLAT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse of a column": mse,
    "mse of a flat output": lambda f, y: mse(f[:, 0], y),
    "differences of columns": lambda f, y: (f - y).square().mean(),
    "differences of flat outputs": lambda f, y: (f.squeeze(-1) - y).square().mean(),
    "a sum": lambda f, y: (f.squeeze(-1) - y).square().sum() / 5,
}


@pytest.mark.parametrize("case", FLAT)
def test_one_output_and_flat_targets_do_not_broadcast(case: str) -> None:
    """[n, 1] against [n] is [n, n] in most losses, and silently so: the pairing is that of the loss's own rows."""
    f, y = torch.randn(5, 1, dtype=torch.float64), torch.randn(5)
    at = LossAt(FLAT[case], f, y)
    assert at.value == pytest.approx(float((f[:, 0] - y).square().mean())), case
    torch.testing.assert_close(at.hessian, torch.full((5, 1, 1), 0.4, dtype=torch.float64))
    assert float(at.at(f + 1)) == pytest.approx(float((f[:, 0] + 1 - y).square().mean()))


def test_one_logit_and_flat_classes_meet() -> None:
    f, y = torch.randn(5, 1, dtype=torch.float64), torch.arange(5) % 2
    bce = nn.functional.binary_cross_entropy_with_logits
    wanted = float(bce(f[:, 0], y.double()))
    for loss in (lambda f, y: bce(f, y.to(f)), lambda f, y: bce(f[:, 0], y.to(f))):
        assert LossAt(loss, f, y).value == pytest.approx(wanted)


UNKNOWN: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "none": (lambda m: None, "give measure(step, optimizer=...)"),
    "RMSprop": (lambda m: torch.optim.RMSprop(m.parameters()), "RMSprop is not SGD, Adam or AdamW"),
    "new Adam": (lambda m: torch.optim.Adam(m.parameters()), "no step yet"),
    "foreign": (lambda m: torch.optim.SGD(net().parameters(), lr=1.0), "trains none"),
    "still": (lambda m: torch.optim.SGD(m.parameters(), lr=0.0), "learning rate is 0"),
    "upwards": (lambda m: torch.optim.SGD(m.parameters(), lr=1.0, maximize=True), "maximizes"),
    "two momenta": (
        lambda m: torch.optim.SGD([{"params": m[0].parameters(), "momentum": 0.5}, {"params": m[2].parameters()}], 0.1),
        "different momentum",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_optimizer_without_a_known_rule_says_why(case: str) -> None:
    make, reason = UNKNOWN[case]
    model, (x, y) = net(), rows()
    found = Monitor(model, (x, y), loss=cross_entropy, diagnostics=SPEED).measure(0, optimizer=make(model))
    assert found.metrics["gauss_newton_mu_max"] is not None, "the curvature needs no optimizer"
    assert found.metrics["stability_ratio"] is None
    assert reason in found.reasons["stability_ratio"], case


# ── runs that converge and runs that do not ───────────────────────────────────────────────────────────────────────────
class Quadratic(nn.Module):
    """f = diag(s) w for one-hot inputs: under mean squared error a quadratic with known curvatures."""

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.scales = scales
        self.w = nn.Parameter(torch.zeros(len(scales), 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scales) @ self.w


RULES: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "GD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "heavy ball": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "damped": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, dampening=0.3),
    "Nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
}


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, loss: Any, steps: int) -> list[float]:
    """Losses of full-batch steps, up to where they overflow."""
    losses: list[float] = []
    while len(losses) < steps and (not losses or losses[-1] < 1e12):
        optimizer.zero_grad()
        value = loss(model(batch[0]), batch[1])
        value.backward()
        losses.append(value.item())
        optimizer.step()
    return losses


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Adam as if it had run for ever: v̂ as it is, lifted off 0 and held, as the theory takes it; no bias to correct."""
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            v = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
            state["exp_avg_sq"] = v + 1e-2 * v.max()
            state["step"].fill_(1e18)
            optimizer.param_groups[0]["betas"] = (0.9, 1 - 1e-15)


def limit(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, loss: Any) -> float:
    found = Monitor(model, batch, loss=loss, diagnostics=SPEED).measure(0, optimizer=optimizer)
    assert found.metrics["max_stable_lr"] is not None, found.reasons
    return found.metrics["max_stable_lr"]


@pytest.mark.parametrize("case", RULES)
def test_the_largest_stable_rate_separates_runs_on_a_quadratic(case: str) -> None:
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    batch = (torch.eye(4).double(), torch.tensor([[1.0], [-1.0], [2.0], [0.5]]).double())
    final = {}
    for factor in (0.95, 1.05):
        model = Quadratic(scales)
        optimizer = RULES[case](model.parameters(), 1e-3)
        descend(model, optimizer, batch, mse, 50)
        settle(optimizer)
        optimizer.param_groups[0]["lr"] = factor * limit(model, optimizer, batch, mse)
        final[factor] = descend(model, optimizer, batch, mse, 1500)[-1]
    assert final[0.95] < 1e-3, "5 % below converges"
    assert not final[1.05] < 1e6, "5 % above diverges"


@pytest.mark.parametrize("case", RULES)
def test_the_largest_stable_rate_separates_runs_of_a_real_network(case: str) -> None:
    """At the end of a real squared-error run: 10 % below the loss stays down, 10 % above it leaps up."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data[:20] / 16.0)
    y = torch.tensor(data.target[:20] % 2 * 2.0 - 1)[:, None]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    descend(model, torch.optim.Adam(model.parameters(), 1e-2), (x, y), mse, 250)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    start, worst = mse(model(x), y).item(), {}
    for factor in (0.9, 1.1):
        model.load_state_dict(state)
        optimizer = RULES[case](model.parameters(), 1e-5)
        descend(model, optimizer, (x, y), mse, 20)
        settle(optimizer)
        optimizer.param_groups[0]["lr"] = factor * limit(model, optimizer, (x, y), mse)
        worst[factor] = max(descend(model, optimizer, (x, y), mse, 120)) / start
    assert worst[0.9] < 2, worst
    assert worst[1.1] > 10, worst


def test_time_constants_are_the_measured_ones() -> None:
    """Heavy ball at β = .9 and ημ = .001: 90 steps, not 1,000."""
    model = Quadratic(torch.ones(1).double())
    batch = (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    with torch.no_grad():
        model.w.fill_(1.0)
    half_mse = lambda f, y: 0.5 * mse(f, y)  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    found = Monitor(model, batch, loss=half_mse, diagnostics=[*SPEED, "predicted_rate"]).measure(0, optimizer=optimizer)
    losses = descend(model, optimizer, batch, half_mse, 400)
    measured = -400 / math.log(losses[399] / losses[199])  # the loss falls twice as fast as the error
    assert found.metrics["time_constant_fastest"] == pytest.approx(measured, rel=1e-3)
    assert found.metrics["predicted_rate"] == pytest.approx(2 / measured, rel=1e-3)


def test_rescaling_layers_and_rates_together_leaves_the_weighted_kernel() -> None:
    """(W1, b1)·c, W2/c with rates c², c⁻² is the same training: kernel and scale move, the weighted ones do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).double()
    groups = [{"params": model[0].parameters()}, {"params": [model[2].weight]}, {"params": [model[2].bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    monitor = Monitor(model, torch.randn(6, 4).double(), diagnostics=["lr_weighted_trace", "kernel_scale"])
    before = monitor.measure(0, optimizer=optimizer).metrics["lr_weighted_trace"]
    with torch.no_grad():
        for p in model[0].parameters():
            p *= 3
        model[2].weight /= 3
    for group, scale in zip(optimizer.param_groups, (9, 1 / 9, 1), strict=True):
        group["lr"] *= scale
    after = monitor.measure(1, optimizer=optimizer).metrics
    assert abs(after["kernel_scale"]) > 0.5, "the plain kernel moves"
    assert after["lr_weighted_trace"] == pytest.approx(before, abs=1e-12)


STEPPERS = {key: OPTIMIZERS[key] for key in ("SGD", "heavy ball", "groups", "Adam", "Adam groups")}


@pytest.mark.parametrize("case", STEPPERS)
def test_a_step_of_the_optimizer_is_the_rule(case: str) -> None:
    """θ ← θ − factor·S·V, V ← βV + ∇: exactly, from Adam's first step on with its bias correction."""
    model, (x, y) = net(), rows()
    optimizer, network = STEPPERS[case](model), Network(model)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        beta = optimizer.param_groups[0].get("momentum", 0.9)
        trained(model, optimizer, x, y, steps=1)
        rule = read_rule(optimizer, network.parameters)
        assert isinstance(rule, UpdateRule), rule
        for name, p in model.named_parameters():
            assert p.grad is not None
            momentum[name] = beta * momentum[name] + p.grad
            wanted = before[name] - rule.factor * rule.scales()[name] * momentum[name]
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-9, atol=1e-12, msg=f"{case}: {name}")
