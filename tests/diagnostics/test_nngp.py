"""gp_nll and gp_coverage through the callback: the infinite-width limit gives their NNGP, or says why and what to do.

Held to the ensemble's formula written out with an inverse, on as many probes as the limit is of.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import Monitor, NTKWatch, infinite, load_run
from ntkwatch.measurement import infinite_limit as limits
from tests.support.runs import Classifier, loaders, trainer

NAMES = ["gp_nll", "gp_coverage"]
SETTINGS: dict[str, Any] = {"budget": None, "every": [0, 6, 12], "diagnostics": NAMES, "on_error": "raise"}


def by_hand(k: Tensor, s: Tensor, y: Tensor, seed: int = 0) -> tuple[float, float]:
    """(gp_nll, gp_coverage) from the formulas: an inverse, a loop over points, and the normal density."""
    n, generator = len(k), torch.Generator().manual_seed(seed)
    ridge, noise = (1e-4 * float(m.trace()) / n for m in (k, s))
    nll, inside = [], []
    for _ in range(8):
        order = torch.randperm(n, generator=generator)
        a, b = order[: n // 2], order[n // 2 :]
        weights = k[b][:, a] @ torch.linalg.inv(k[a][:, a] + ridge * torch.eye(len(a)).double())
        for i, point in enumerate(b):
            w = weights[i]
            variance = s[point, point] + w @ s[a][:, a] @ w - 2 * w @ s[point, a] + noise
            for target, mean in zip(y[point], w @ y[a], strict=True):
                gap = float((target - mean) ** 2 / variance)
                nll.append(0.5 * (math.log(2 * math.pi * float(variance)) + gap))
                inside.append(gap <= 1.959963984540054**2)
    return sum(nll) / len(nll), sum(inside) / len(inside)


def test_through_the_callback_they_are_the_formulas(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(64)
    spec = infinite.from_module(model)
    watch = NTKWatch(probes=24, **SETTINGS)
    trainer(tmp_path, watch).fit(model, *loaders())
    run = load_run(watch.record)
    assert run.metrics[NAMES].notna().all(axis=None), run.reasons
    x, y = loaders()[1].dataset[run.manifest["probes"]["indices"]]
    s, target = infinite.kernel(spec, x.double()).nngp, nn.functional.one_hot(y).double()
    torch.testing.assert_close(run.limit.nngp, s)
    for step in (0, 12):
        nll, inside = by_hand(run.kernel(step), s, target)
        assert run.metrics["gp_nll"].loc[step] == pytest.approx(nll, rel=1e-6), step
        assert run.metrics["gp_coverage"].loc[step] == pytest.approx(inside, abs=1e-9), step
    assert "distance_to_infinite" not in run.metrics, "it was not asked for"


def test_on_as_many_probes_as_the_limit_is_cheap_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).double()
    x, y = loaders()[1].dataset[:24]
    x = x.double()
    monkeypatch.setattr(limits, "ALLOWED", infinite.nominal_seconds(infinite.from_module(model), x[:1]) * 10 * 11 / 2)
    monitor = Monitor(model, (x, y), diagnostics=NAMES)
    found = monitor.measure(0)
    rows = monitor.limit.kernel.rows
    assert len(rows) == 10, "fewer than there are probes"
    s = infinite.kernel(infinite.from_module(model), x[rows]).nngp
    nll, inside = by_hand(found.kernel[rows][:, rows], s, nn.functional.one_hot(y[rows], 3).double())
    assert found.metrics["gp_nll"] == pytest.approx(nll, rel=1e-8)
    assert found.metrics["gp_coverage"] == pytest.approx(inside, abs=1e-9)


def test_a_resumed_run_goes_on_with_the_one_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first = trainer(tmp_path, NTKWatch(probes=12, **SETTINGS), max_steps=6)
    first.fit(Classifier(), *loaders())
    first.save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr("ntkwatch.measurement.monitor.wide_limit", lambda *a, **k: pytest.fail("it was computed again"))
    watch = NTKWatch(probes=12, **SETTINGS)
    trainer(tmp_path, watch).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "a.ckpt")
    run = load_run(watch.record)
    assert list(run.metrics.index) == [0, 6, 12]
    y = loaders()[1].dataset[run.manifest["probes"]["indices"]][1]
    nll, _ = by_hand(run.kernel(12), run.limit.nngp, nn.functional.one_hot(y).double())
    assert run.metrics["gp_nll"].loc[12] == pytest.approx(nll, rel=1e-6)


def test_where_the_model_has_none_it_says_why_and_what_to_do(tmp_path: Path) -> None:
    """Also after a resume, when nothing can be computed any more."""
    settings = {**SETTINGS, "probes": 12, "diagnostics": [*NAMES, "ntkgp_nll"]}
    first = trainer(tmp_path, NTKWatch(**settings), max_steps=6)
    first.fit(Classifier(norm=True), *loaders())
    first.save_checkpoint(tmp_path / "a.ckpt")
    watch = NTKWatch(**settings)
    trainer(tmp_path, watch).fit(Classifier(norm=True), *loaders(), ckpt_path=tmp_path / "a.ckpt")
    run = load_run(watch.record)
    for name in NAMES:
        said = {why[name] for why in run.reasons.values()}
        assert len(said) == 1, f"{name} changes its mind: {said}"
        for part in ("statistics at the baseline depend on the data", "monitor.nngp", "ntkgp_nll and ntkgp_coverage"):
            assert part in said.copy().pop(), name
    assert run.metrics["ntkgp_nll"].notna().all()


def test_a_record_of_before_it_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkwatch.record import writer

    settings = {**SETTINGS, "probes": 12, "diagnostics": [*NAMES, "distance_to_infinite"]}
    kept = writer._tensors
    monkeypatch.setattr(writer, "_tensors", lambda *a: {k: v for k, v in kept(*a).items() if k != "limit_nngp"})
    first = trainer(tmp_path, NTKWatch(**settings), max_steps=6)
    first.fit(Classifier(), *loaders())
    first.save_checkpoint(tmp_path / "a.ckpt")
    watch = NTKWatch(**settings)
    trainer(tmp_path, watch).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "a.ckpt")
    assert "keeps no NNGP kernel" in watch.last.reasons["gp_nll"]
    assert watch.last.metrics["distance_to_infinite"] is not None


def test_fresh_probes_have_none(tmp_path: Path) -> None:
    watch = NTKWatch(probes=12, resample=True, **{**SETTINGS, "on_error": "warn"})
    trainer(tmp_path, watch).fit(Classifier(), *loaders())
    assert "resample=True" in watch.last.reasons["gp_nll"]


class Regressor(pl.LightningModule):
    """Wide enough to be the ensemble's member; its targets are drawn from the ensemble."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 2048), nn.ReLU(), nn.Linear(2048, 1))
        nn.init.normal_(self.net[2].weight, std=2048**-0.5), nn.init.normal_(self.net[0].weight, std=(2 / 5) ** 0.5)
        nn.init.zeros_(self.net[0].bias), nn.init.zeros_(self.net[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_targets_of_the_ensembles_own_kind_are_covered(tmp_path: Path) -> None:
    """A function that the members fit lies inside, nine tenths of it at least; a rough one is less likely."""
    found = {}
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    for name, y in (("smooth", x[:, :1] + 0.3 * x[:, 1:2]), ("rough", torch.sin(40 * x.sum(1, keepdim=True)))):
        torch.manual_seed(1)
        watch = NTKWatch(probes=64, **{**SETTINGS, "every": [0]})
        data = DataLoader(TensorDataset(x, y), 16)
        trainer(tmp_path / name, watch, max_steps=1).fit(Regressor(), data, data)
        found[name] = load_run(watch.record).metrics.loc[0]
    assert found["smooth"]["gp_coverage"] > 0.9, found
    assert found["rough"]["gp_nll"] > found["smooth"]["gp_nll"] + 0.3, found
