"""K_∞ in the monitor: the right number, a reason where there is none, never a cost or a trace; kept in the record."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ntkwatch import Monitor, NTKWatch, empirical_ntk, infinite, load_run
from ntkwatch.cli import app
from ntkwatch.measurement import infinite_limit as limits
from ntkwatch.probes import ProbeSet
from ntkwatch.record import RecordError
from tests.support.modules_attention import Encoder
from tests.support.operations import Entries
from tests.support.runs import Classifier, loaders, trainer, whole_and_resumed

NAME = "distance_to_infinite"


def mlp(width: int = 32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def rows(*shape: int, n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 3


def move(model: nn.Module, size: float = 0.01) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p))


# ── the number ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_it_is_the_relative_distance_from_the_analytic_kernel() -> None:
    model, (x, y) = mlp().double(), rows(5)
    k_inf = infinite.kernel(infinite.from_module(model), x).ntk
    monitor = Monitor(model, (x.double(), y))
    for step in (0, 1):
        k = empirical_ntk(model, x.double())
        assert monitor.measure(step).metrics[NAME] == pytest.approx(float((k - k_inf).norm() / k_inf.norm()), rel=1e-6)
        move(model)
    # K_∞ is the network's own, not the moved one's
    assert torch.equal(monitor.limit.kernel.kernel, infinite.kernel(infinite.from_module(mlp()), x.double()).ntk)


@pytest.mark.parametrize("reduction", ["trace", "blocks", "full", "sum"])
def test_it_is_of_the_trace_kernel_in_every_reduction(reduction: str) -> None:
    expected = Monitor(mlp(), rows(5)).measure(0).metrics[NAME]
    got = Monitor(mlp(), rows(5), reduction=reduction).measure(0).metrics[NAME]
    assert got == pytest.approx(expected, rel=1e-6), reduction


def test_it_falls_with_width() -> None:
    """Negative control as well: a constant would pass nothing here."""

    def mean(width: int) -> float:
        found = []
        for seed in range(4):
            model = mlp(width, seed)
            for m in (model[0], model[2], model[4]):  # torch's own scale hides the law behind bias gradients
                nn.init.kaiming_normal_(m.weight)
            found.append(Monitor(model, rows(5)).measure(0).metrics[NAME])
        return sum(found) / 4

    assert mean(8) > 1.8 * mean(256) > 0


def test_a_transformer_is_estimated_and_said() -> None:
    monitor = Monitor(Encoder(32, True, "gelu"), rows(4, 5, n=6), diagnostics=[NAME])
    assert 0 < monitor.measure(0).metrics[NAME] < 1
    assert "Monte Carlo" in str(monitor.limit)


# ── reasons ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.a(x) + z[:, None]


class Picky(nn.Module):
    """Raises on what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise KeyError("a tensor, please")
        return self.a(x)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def pooled() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


REASONS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "max pooling": (
        lambda: nn.Sequential(nn.Conv1d(1, 4, 2), nn.MaxPool1d(4), nn.Flatten(), nn.Linear(4, 3)),
        rows(1, 5), {}, r"1 \(MaxPool1d\) cannot be converted",
    ),
    "batch norm": (normed, rows(5), {}, "statistics at the baseline depend on the data"),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)),
        (torch.arange(60).reshape(12, 5) % 7, torch.arange(12) % 3), {}, "not one tensor of numbers",
    ),
    "two inputs": (Two, (*rows(5), torch.arange(12) % 3), {}, "not one tensor of numbers"),
    "outputs=": (mlp, rows(5), {"outputs": lambda m, b: m(b[0])}, "outputs= .* is not the module's forward"),
    "a forward that asks": (Picky, rows(5), {}, "cannot trace Picky: 'a tensor, please'"),
    "expensive": (pooled, rows(3, 64, 64), {}, r"K_∞ on 8 probes takes some \d+ s \(at most 2 here\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_where_there_is_none_it_says_why(name: str) -> None:
    make, batch, settings, message = REASONS[name]
    monitor = Monitor(make(), batch, **settings)
    measured = monitor.measure(0)
    assert measured.metrics[NAME] is None, name
    assert measured.metrics["kernel_angle"] == 0.0, f"{name}: the rest is there"
    assert re.search(message, measured.reasons[NAME]), f"{name}: {measured.reasons[NAME]}"


def test_what_costs_too_much_is_never_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the kernel was computed")

    monkeypatch.setattr(infinite, "kernel", never)
    model, (x, _) = pooled(), rows(3, 64, 64)
    network = Monitor(model, x, diagnostics=["kernel_angle"]).network
    with Entries() as made:
        assert "takes some" in limits.wide_limit(network, x).kernel
    assert made.count < (64 * 64) ** 2, "more than the covariances of one pair of images"


def test_any_error_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, said in ((RuntimeError("can't allocate memory"), "no memory"), (ZeroDivisionError("oh"), "oh")):

        def broken(*args: Any, error: Exception = error, **kwargs: Any) -> Any:
            raise error

        monkeypatch.setattr(infinite, "from_module", broken)
        measured = Monitor(mlp(), rows(5)).measure(0)
        assert said in measured.reasons[NAME]


def test_it_takes_as_many_probes_as_it_can_afford(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = mlp(), rows(5, n=40)
    one = infinite.nominal_seconds(infinite.from_module(model), x[:1])
    monkeypatch.setattr(limits, "ALLOWED", one * 10 * 11 / 2 * 1.01)
    monitor = Monitor(model, (x, y), diagnostics=[NAME])
    got = monitor.measure(0).metrics[NAME]
    chosen = monitor.limit.kernel.rows
    assert chosen.tolist() == [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]
    k, k_inf = (empirical_ntk(model, x[chosen]), infinite.kernel(infinite.from_module(model), x[chosen]).ntk)
    assert got == pytest.approx(float((k - k_inf).norm() / k_inf.norm()), rel=1e-6)


def test_fresh_probes_have_no_limit() -> None:
    monitor = Monitor(mlp(), rows(5))
    assert monitor.measure(0).metrics[NAME] is not None
    fresh = ProbeSet.from_batch(rows(5, n=12)[0] + 1)
    assert "on the first probes" in monitor.measure(1, probes=fresh).reasons[NAME]


def test_a_run_first_seen_later_has_none() -> None:
    assert "first seen at step 7" in Monitor(mlp(), rows(5)).measure(7).reasons[NAME]


def test_it_is_not_computed_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.measurement.monitor.wide_limit", lambda *a, **k: pytest.fail("it was computed"))
    Monitor(mlp(), rows(5), diagnostics=["kernel_angle"]).measure(0)


# ── no trace ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_model_is_as_it_was() -> None:
    model, seen = mlp().train(), []
    model[0].register_forward_hook(lambda m, a, out: seen.append(type(out)))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Monitor(model, rows(5)).measure(0)
    assert set(seen) == {Tensor}, "a hook is never handed what is no tensor"
    assert all(m.training for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Logging(Classifier):
    """A forward that logs, keeps what it sees and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.detach().mean())
        if self.training:
            self.log("mean", x.mean())
        return self.net(x)


def test_a_forward_with_side_effects_is_left_alone(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [NTKWatch(probes=12, budget=None)]):
        torch.manual_seed(0)
        model = Logging()
        run = trainer(tmp_path / str(len(callbacks)), *callbacks)
        run.fit(model, *loaders())
        assert all(isinstance(seen, Tensor) for seen in model.seen)
        found.append((model.calls, len(model.seen), run.global_step, model.net[0].weight.detach().clone()))
    assert found[0][:3] == found[1][:3]
    assert torch.equal(found[0][3], found[1][3])


# ── record and resume ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_record_keeps_it(tmp_path: Path) -> None:
    monitor = Monitor(mlp(), rows(5), record=tmp_path / "a")
    monitor.measure(0)
    monitor.measure(1)
    run = load_run(tmp_path / "a")
    assert torch.equal(run.limit.kernel, monitor.limit.kernel.kernel)
    assert run.limit.rows.tolist() == list(range(12))
    assert set(run.layers(0)) == set(monitor.network.parameters), "it is no layer"
    assert torch.equal(run.measurement(0).limit.kernel, run.limit.kernel)
    assert run.measurement(1).limit is None
    assert run.manifest["infinite"].startswith("infinite-width limit on 12 probes. ")
    Monitor(normed(), rows(5), record=tmp_path / "b").measure(0)
    with pytest.raises(RecordError, match="depend on the data"):
        load_run(tmp_path / "b").limit  # noqa: B018


def test_a_resumed_run_does_not_compute_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"probes": 12, "budget": None, "every": [0, 6, 12]}
    name = "ntkwatch.measurement.monitor.wide_limit"
    forbid = partial(monkeypatch.setattr, name, lambda *a, **k: pytest.fail("computed again"))
    whole, watch = whole_and_resumed(tmp_path, forbid, **settings)
    distances = load_run(watch.record).metrics[NAME]
    assert list(distances.index) == [0, 6, 12]
    assert distances.notna().all()
    assert distances.iloc[0] == load_run(whole.record).metrics[NAME].iloc[0]
    assert "away from the infinitely wide network's" in " ".join(watch.summary().split())


def test_a_reason_survives_a_resume(tmp_path: Path) -> None:
    settings = {"probes": 12, "budget": None, "every": [0, 6, 12]}
    first = trainer(tmp_path, NTKWatch(**settings), max_steps=6)
    first.fit(Classifier(norm=True), *loaders())
    first.save_checkpoint(tmp_path / "a.ckpt")
    watch = NTKWatch(**settings)
    trainer(tmp_path, watch).fit(Classifier(norm=True), *loaders(), ckpt_path=tmp_path / "a.ckpt")
    assert {why[NAME] for why in load_run(watch.record).reasons.values()} == {
        "BatchNorm's statistics at the baseline depend on the data, which has no closed form"
    }


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_doctor_says_how_signals_pass(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def good():\n    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(8, 5)\n"
        "def bad():\n    return nn.Sequential(nn.Linear(5, 9), nn.CELU(), nn.RMSNorm(9), nn.Linear(9, 2)), "
        "torch.ones(8, 5)\n"
    )
    for name, said in (("good", "full rank on 8 probes"), ("bad", "no infinite-width limit: 2 (RMSNorm) cannot be")):
        result = CliRunner().invoke(app, ["doctor", f"{tmp_path / 'f.py'}:{name}"])
        assert result.exit_code == 0, result.output
        assert said in result.output, name
