"""The table of diagnostics: each says what it needs, is defined or says why, and agrees with its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, metrics
from ntkwatch.cli.glossary import entry
from ntkwatch.diagnostics import DIAGNOSTICS, costs, reduction, select
from ntkwatch.engines.base import Kernel
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.measurement import arguments as checks
from tests.support import ROOT

cross_entropy = nn.functional.cross_entropy
LINEAR_X = torch.tensor([[1.0, 2, 0], [0, 1, -1], [2, 0, 1]]).double()  # known answer 3.1
LINEAR_SPECTRUM = (0.5941867925854845, 4.664874396262113, 9.7409388111524)
DEFAULT = [
    "kernel_distance",
    "kernel_angle",
    "kernel_scale",
    "relative_change",
    "kernel_velocity",
    "distance_to_infinite",
    "centered_alignment",
    "centered_alignment_z",
    "effective_rank",
    "log10_lambda_max",
    "log10_lambda_1",
    "log10_lambda_2",
    "log10_lambda_3",
    "log10_lambda_4",
    "log10_lambda_5",
    "taylor_ratio",
    "parameter_distance",
    "statistics_shift",
    "statistics_angle",
]
FULL = tuple(name for name, diagnostic in DIAGNOSTICS.items() if not diagnostic.by_name)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def rows(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 3
    return torch.randn(n, 4, generator=generator).double() + nn.functional.one_hot(y, 4), y


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def run() -> dict[str, list[Any]]:
    """The whole table along a run with SGD and one with Adam: measurements at steps 0, 5 and 20."""
    found: dict[str, list[Any]] = {}
    for name in ("SGD", "Adam"):
        model, batch = net(), rows()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05)
        monitor = Monitor(model, batch, loss=cross_entropy, diagnostics="full")
        found[name] = [monitor.measure(0, optimizer=optimizer)]
        for step, more in ((5, 5), (20, 15)):
            train(model, optimizer, batch, more)
            found[name].append(monitor.measure(step, optimizer=optimizer))
    return found


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_presets() -> None:
    assert list(select("default")) == DEFAULT
    assert select("full") == FULL
    assert {*DIAGNOSTICS} - {*FULL} == {n for n in DIAGNOSTICS if n.startswith("sign_")}, "asked for by name alone"
    assert select(["full", "sign_angle"]) == tuple(n for n in DIAGNOSTICS if n in FULL or n == "sign_angle")
    assert reduction(select("default")) == "any"
    assert list(costs(select("default"))) == [
        "two forward-mode products at θ_0",
        "a second kernel, in models with BatchNorm",
    ], "all that the default costs beyond its kernel"
    assert select(["default", "gcv"]) == select([*DEFAULT, "gcv"])
    read = ("loss", "loss_if_lazy", "forecast_start_error")
    assert select(["loss_if_lazy"]) == read, "what it is read beside comes with it"
    assert reduction(select("full")) == "full"
    assert costs(["class_specialization"]) == {"a kernel reduced to 'blocks'": ["class_specialization"]}
    for own, beyond in (("trace", 2), ("sum", 2), ("blocks", 1), ("full", 0)):
        said = [text for text in costs(select("full"), own) if text.startswith("a kernel reduced")]
        assert len(said) == beyond, f"the run's own is {own}: {said}"


def test_the_pages_count_what_there_is() -> None:
    by_name = len(DIAGNOSTICS) - len(FULL)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"records {len(FULL) - len(DEFAULT)} more numbers than the default's {len(DEFAULT)}" in readme
    assert f"has {by_name} (`sign_angle`, …) that are in no preset" in readme
    assert f"- {len(DIAGNOSTICS)} diagnostics" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_explain_knows_every_diagnostic(name: str) -> None:
    said = entry(name)
    assert said is not None
    for part in ("Formula:", "Range:", "Source:", "Pitfalls:"):
        assert part in said, f"{name} has no {part}"
    assert entry(f"ntk/{name}") == said, "as it is logged"


@pytest.mark.parametrize("name", ["share", "angle", "alignment", "parameter_distance", "spectral_update", "overhead"])
def test_explain_knows_what_is_logged_by_module(name: str) -> None:
    said = entry(f"ntk_layers/net.0/{name}")
    assert said is not None
    assert all(part in said for part in ("Formula:", "Range:", "Source:", "Pitfalls:"))


def test_explain_says_what_of_a_matrix_is_recorded() -> None:
    assert "As recorded: the mean diagonal" in (entry("class_specialization") or "")


NOT_UNDER = {
    "SGD": {"preconditioned_alignment"},
    "Adam": set[str](),
}
LATER = {"one_step_error", "one_step_halving"}  # of the first probe alone
UNKNOWN = {"loss_if_lazy", "forecast_error", "forecast_start_error"}  # no forecast is attached
NO_GUARANTEE = {"predicted_rate", "loss_if_flow", "flow_error"}  # cross-entropy has zero modes and no closed form
NO_GUARANTEE |= {"eigenlearning_samples"}  # six samples do not learn half of the targets


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_whole_table_along_a_run(run: dict[str, list[Any]], optimizer: str) -> None:
    last = run[optimizer][-1]
    assert set(last.metrics) - {"overhead"} == {n for n in FULL if not n.startswith("statistics_")}
    undefined = {name for name, value in last.metrics.items() if value is None}
    assert undefined == NOT_UNDER[optimizer] | LATER | UNKNOWN | NO_GUARANTEE, last.reasons
    assert set(last.reasons) == undefined
    assert all(math.isfinite(v) for v in last.metrics.values() if v is not None)


NEEDS = {
    "targets": ({"probes": rows()[0], "loss": cross_entropy}, "targets"),
    "loss": ({"probes": rows()}, "loss"),
}


@pytest.mark.parametrize("need", [*NEEDS, "optimizer", "forecast"])
def test_what_is_declared_as_needed_is_what_is_missing_without_it(need: str, run: dict[str, list[Any]]) -> None:
    """Undefined without it, for a reason that names it; whatever does not declare the need does not notice."""
    settings, word = NEEDS.get(need, ({"probes": rows(), "loss": cross_entropy}, need))
    model = net()
    probes = settings.pop("probes") if need not in NEEDS else settings["probes"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    monitor = Monitor(model, probes, diagnostics="full", loss=settings.get("loss"))
    first = monitor.measure(0)
    train(model, optimizer, rows(), 20)
    last = monitor.measure(20, optimizer=None if need == "optimizer" else optimizer)
    for name in FULL:
        diagnostic = DIAGNOSTICS[name]
        here = {name: last, **dict.fromkeys(LATER, first)}[name] if name in LATER else last
        reason = here.reasons.get(name, "")
        if need in diagnostic.needs or (need == "targets" and "loss" in diagnostic.needs):
            assert word in reason, f"{name}: {reason or 'defined'}"
        elif name in run["Adam"][-1].metrics and name not in UNKNOWN | NO_GUARANTEE:
            assert here.metrics[name] is not None, f"{name} noticed the missing {need}: {reason}"


class Counting(Layerwise):
    """Remembers which reductions it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def kernel(self, *args: Any, **settings: Any) -> Kernel:
        self.asked.append(settings["reduction"])
        return super().kernel(*args, **settings)


@pytest.mark.parametrize(
    ("diagnostics", "own", "asked"),
    [
        ("default", "trace", ["trace"]),
        ("default", "sum", ["sum"]),
        (["class_specialization"], "trace", ["blocks"]),
        (["class_specialization"], "sum", ["full"]),
        (["class_specialization", "gauss_newton_mu_max", "zero_modes_full"], "trace", ["full"]),
        (["gauss_newton_mu_max"], "blocks", ["full"]),
    ],
)
def test_one_kernel_a_probe_as_rich_as_is_needed(diagnostics: Any, own: str, asked: list[str]) -> None:
    monitor = Monitor(net(), rows(), loss=cross_entropy, reduction=own, diagnostics=diagnostics)
    monitor.start()
    counting = Counting()
    object.__setattr__(monitor.choice, "engine", counting)
    monitor.measure(0)
    assert counting.asked == asked


def test_a_full_kernel_that_is_too_large_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FULL_LIMIT", 36 * 36 * 8 - 1)
    found = Monitor(net(), rows(), loss=cross_entropy, diagnostics="full").measure(0)
    assert found.metrics["gauss_newton_mu_max"] is None
    assert "full kernel of 12 probes x 3 outputs" in found.reasons["gauss_newton_mu_max"]
    assert found.metrics["class_specialization"] is not None, "blocks still fit"
    assert found.metrics["kernel_angle"] == 0


def test_one_output_needs_no_full_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FULL_LIMIT", 1)
    found = Monitor(nn.Linear(3, 1).double(), LINEAR_X, diagnostics=["log10_lambda_min_full"]).measure(0)
    assert found.metrics["log10_lambda_min_full"] == pytest.approx(math.log10(LINEAR_SPECTRUM[0]))


# ── known answers ─────────────────────────────────────────────────────────────────────────────────────────────────────
KNOWN: dict[str, float] = {
    "log10_lambda_min_full": math.log10(LINEAR_SPECTRUM[0]),
    "zero_modes_full": 0,
    "condition_number": LINEAR_SPECTRUM[2] / LINEAR_SPECTRUM[0],
    "stable_rank": 15 / LINEAR_SPECTRUM[2],
    "zero_modes": 0,
    "one_step_error": 0,
    "feature_angle": 0,
    "gauss_newton_mu_max": LINEAR_SPECTRUM[2] * 2 / 6,
    "max_stable_lr": 6 / LINEAR_SPECTRUM[2],
    "predicted_rate": 2 / (-1 / math.log(1 - 0.01 * LINEAR_SPECTRUM[0] / 3)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_linear_model(name: str) -> None:
    model = nn.Linear(3, 2).double()
    y = torch.tensor([[1.0, 0], [0, 2], [-1, 1]]).double()
    monitor = Monitor(model, (LINEAR_X, y), loss=nn.functional.mse_loss, diagnostics=[name])
    found = monitor.measure(0, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    assert found.metrics[name] == pytest.approx(KNOWN[name], abs=1e-9), found.reasons


def test_path_length_and_directness_there_and_back() -> None:
    model = net()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    monitor = Monitor(model, rows(), diagnostics=["path_length", "directness", "kernel_angle"])
    monitor.measure(0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), rows(), 10)
    out = monitor.measure(10).metrics
    model.load_state_dict(start)
    back = monitor.measure(20).metrics
    assert out["path_length"] == pytest.approx(out["kernel_angle"])
    assert out["directness"] == pytest.approx(1)
    assert back["path_length"] == pytest.approx(2 * out["path_length"])
    assert back["directness"] == pytest.approx(0, abs=1e-9)


def test_labels_are_shuffled_alike_at_every_step() -> None:
    """A kernel that stands still has an alignment that stands still, in the deviations of its null too."""
    monitor = Monitor(net(), rows(), diagnostics=["centered_alignment_z"])
    z = [monitor.measure(step).metrics["centered_alignment_z"] for step in (0, 1, 7)]
    assert z == pytest.approx([z[0]] * 3, rel=1e-9)


def test_the_probe_that_moves_is_named() -> None:
    """One weight column that only probe 4 sees."""
    x = torch.eye(6).double()
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False)).double()
    names = ["per_example_motion_index", "per_example_motion_max", "per_example_motion_median"]
    monitor = Monitor(model, x, diagnostics=names)
    first = monitor.measure(0)
    assert "no probe has moved" in first.reasons["per_example_motion_index"]
    with torch.no_grad():
        model[0].weight[:, 4] += 2
    second = monitor.measure(1)
    found = second.metrics
    assert found["per_example_motion_index"] == 4
    assert found["per_example_motion_max"] > 2 * found["per_example_motion_median"]
    unit, unit_0 = (m.kernel.double() / m.kernel.double().norm() for m in (second, first))
    motion = sorted(((unit - unit_0).norm(dim=1) / unit_0.norm(dim=1)).tolist())
    assert found["per_example_motion_median"] == pytest.approx((motion[2] + motion[3]) / 2, rel=1e-9)


def test_features_are_the_last_layers_input() -> None:
    model, (x, y) = net(), rows()
    monitor = Monitor(model, (x, y), diagnostics=["feature_angle", "feature_cka", "feature_alignment"])
    monitor.measure(0)
    h_0 = model[:4](x).detach()
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), (x, y), 10)
    found, h = monitor.measure(10).metrics, model[:4](x).detach()
    assert found["feature_angle"] == pytest.approx(float(metrics.kernel_angle(h @ h.T, h_0 @ h_0.T)), rel=1e-9)
    assert found["feature_cka"] == pytest.approx(float(metrics.cka(h @ h.T, h_0 @ h_0.T)), rel=1e-9)
    one_hot = nn.functional.one_hot(y).double()
    assert found["feature_alignment"] == pytest.approx(float(metrics.centered_alignment(h @ h.T, one_hot)))


def test_feature_correlations_and_spectral_updates_are_the_formulas() -> None:
    model, (x, y) = net(), rows()
    start = [p.detach().clone() for p in model.parameters()]
    names = [n for n in DIAGNOSTICS if n.startswith(("spectral", "neural"))]
    monitor = Monitor(model, (x, y), diagnostics=names)
    monitor.measure(0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), (x, y), 10)
    found = monitor.measure(10)
    inner = [x, model[:2](x).detach(), model[:4](x).detach()]
    wanted, of_updates = [], []
    for layer, h in zip((0, 2, 4), inner, strict=True):
        module, w0 = model[layer], start[layer]
        g = torch.func.vmap(torch.func.jacrev(lambda v, k=layer: model[k:](v)))(h)
        step, gram = module.weight.detach() - w0, torch.einsum("nci,ncj->ij", g, g)
        square = step.T @ step
        of_updates.append(float((square * gram).sum() / (square.norm() * gram.norm())))
        if layer == 4:
            continue
        wanted.append(float(metrics.neural_feature_correlation(module.weight.detach(), g)))
        assert found.layer_metrics[str(layer)]["neural_feature_correlation"] == pytest.approx(wanted[-1])
    assert found.metrics["neural_feature_correlation_mean"] == pytest.approx(sum(wanted) / 2), "the readout is left out"
    said = "the readout counts, as explain says"
    assert found.metrics["neural_feature_correlation_update"] == pytest.approx(sum(of_updates) / 3), said
    assert "the readout counts" in (DIAGNOSTICS["neural_feature_correlation_update"].compute.__doc__ or "")
    updates = [
        float(torch.linalg.matrix_norm(p.detach() - s, 2) / torch.linalg.matrix_norm(s, 2))
        for p, s in zip(model.parameters(), start, strict=True)
        if p.ndim == 2
    ]
    assert found.metrics["spectral_update_max"] == pytest.approx(max(updates))
    assert found.metrics["spectral_update_mean"] == pytest.approx(sum(updates) / 3)
    assert found.layer_metrics["4"]["spectral_update"] == pytest.approx(updates[2])


def test_error_bars_are_the_jackknifes(run: dict[str, list[Any]]) -> None:
    first, _, last = run["SGD"]
    bars = metrics.jackknife(metrics.kernel_angle, last.kernel, first.kernel)
    assert last.metrics["kernel_angle_se"] == pytest.approx(float(bars.standard_error))
    assert last.metrics["kernel_angle_corrected"] == pytest.approx(float(bars.corrected))
    assert 0 < last.metrics["taylor_ratio_se"] < last.metrics["taylor_ratio"]
    few = Monitor(net(), rows(3), diagnostics=["kernel_angle_se"]).measure(0)
    assert "at least 4 probes" in few.reasons["kernel_angle_se"]


def test_the_loss_and_how_fast_it_falls(run: dict[str, list[Any]]) -> None:
    first, _, last = run["SGD"]
    wanted = math.log(first.metrics["loss"] / last.metrics["loss"]) / 20
    assert last.metrics["loss_rate"] == pytest.approx(wanted, rel=1e-6)
    assert last.metrics["loss"] == pytest.approx(float(cross_entropy(last.outputs, rows()[1])))


# ── the self-test ─────────────────────────────────────────────────────────────────────────────────────────────────────
SELF_TEST = ["one_step_error", "one_step_halving"]


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = net()
    model[0].requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": net,
    "float32": lambda: net().float(),
    "tied": tied,
    "frozen": frozen,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double(),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double(),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_self_tests_error_halves_with_the_step(case: str) -> None:
    x, y = rows()
    model = MODELS[case]()
    x = x.to(next(model.parameters()).dtype)
    found = Monitor(model, (x, y), loss=cross_entropy, diagnostics=SELF_TEST).measure(0)
    assert found.metrics["one_step_error"] < 0.05, case
    assert found.metrics["one_step_halving"] == pytest.approx(0.5, abs=0.05), case


def relu(dtype: torch.dtype, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A ReLU net that has fitted its probes: its units' kinks have come close to them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = torch.randn(20, 10), torch.randint(3, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2000):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.to(dtype), (x.to(dtype), y)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trained_relu_net_is_not_accused_by_the_self_test(dtype: torch.dtype, seed: int) -> None:
    """Large steps cross kinks: the error of the right kernel hardly falls, and that of a wrong one by half."""
    model, rows_of = relu(dtype, seed)
    found = Monitor(model, rows_of, loss=cross_entropy, diagnostics=SELF_TEST).measure(0)
    halving, case = found.metrics["one_step_halving"], f"{dtype}, seed {seed}: {found.metrics}"
    if dtype == torch.float64:
        assert halving == pytest.approx(0.5, abs=0.05), case
    else:
        assert halving < 0.95, case


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_kernel_of_a_trained_relu_net_does_not_pass(seed: int) -> None:
    model, rows_of = relu(torch.float64, seed)
    found = broken(model, rows_of, lambda k, m: 1.04 * k.value)
    assert found.metrics["one_step_halving"] == pytest.approx(1, abs=0.05), f"seed {seed}: {found.metrics}"


WRONG: dict[str, Callable[[Kernel, nn.Module], Tensor]] = {
    "4 % off": lambda k, m: 1.04 * k.value,
    "a tenth missing": lambda k, m: 0.9 * k.value,
    "diagonal blocks only": lambda k, m: k.value * torch.eye(3).double()[None, :, None, :],
}


def broken(model: nn.Module, rows_of: Any, wrong: Callable[[Kernel, nn.Module], Tensor]) -> Any:
    class Broken(Layerwise):
        def kernel(self, *args: Any, **settings: Any) -> Kernel:
            right = super().kernel(*args, **settings)
            return replace(right, value=wrong(right, model))

    monitor = Monitor(model, rows_of, loss=cross_entropy, diagnostics=SELF_TEST)
    monitor.start()
    object.__setattr__(monitor.choice, "engine", Broken())
    return monitor.measure(0)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kernel_does_not_pass_the_self_test(case: str) -> None:
    """The negative control: the error stalls at the kernel's own."""
    found = broken(net(), rows(), WRONG[case])
    assert found.metrics["one_step_halving"] > 0.9, case


# ── robustness ────────────────────────────────────────────────────────────────────────────────────────────────────────
class Bare(nn.Module):
    """No Linear, no convolution: parameters of its own, at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


ODD: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "no layer": lambda: (Bare(), rows()),
    "one probe": lambda: (net(), tuple(t[:1] for t in rows())),
    "two probes": lambda: (net(), tuple(t[:2] for t in rows())),
    "duplicates": lambda: (net(), (rows()[0][:1].repeat(6, 1), torch.arange(6) % 3)),
    "one class": lambda: (net(), (rows()[0], torch.zeros(12, dtype=torch.long))),
    "zero readout": lambda: (zeroed(), rows()),
    "zero kernel": lambda: (unmoved(), rows()),
    "convolution": lambda: (
        nn.Sequential(nn.Conv1d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double(),
        (rows()[0][:, None], rows()[1]),
    ),
    "reused": lambda: (tied(), rows()),
}


def zeroed() -> nn.Module:
    model = net()
    nn.init.zeros_(model[4].weight)
    nn.init.zeros_(model[4].bias)
    return model


def unmoved() -> nn.Module:
    """No gradient passes its readout, which is zero and not trained."""
    model = zeroed()
    model[4].requires_grad_(False)
    return model


@pytest.mark.parametrize("case", ODD)
def test_odd_models_and_probes_are_measured_or_say_why(case: str) -> None:
    model, batch = ODD[case]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = Monitor(model, batch, loss=cross_entropy, diagnostics="full")
    for step in (0, 3):
        found = monitor.measure(step, optimizer=optimizer)
        undefined = {name for name, value in found.metrics.items() if value is None}
        assert set(found.reasons) == undefined, case
        failed = {name: why for name, why in found.reasons.items() if "it failed" in why or "not finite" in why}
        assert not failed, f"{case}: {failed}"
        train(model, optimizer, batch, 3)


def test_one_failing_number_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(view: Any) -> float:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(DIAGNOSTICS, "gcv", type(DIAGNOSTICS["gcv"])(broken))
    found = Monitor(net(), rows(), diagnostics=["kernel_angle", "gcv"]).measure(0)
    assert found.metrics["kernel_angle"] == 0
    assert found.reasons["gcv"] == "it failed (RuntimeError: no such thing)"
