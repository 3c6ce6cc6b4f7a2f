"""K_0 against its limit over width: records with a known law give back its slopes, corrections and width."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ntkwatch import Monitor, compare_runs
from ntkwatch.cli import app
from ntkwatch.compare import FiniteWidth
from ntkwatch.record import Limit, Measurement, RecordWriter

N, WIDTHS, SEEDS = 6, (32, 64, 128, 256), 4
SPREAD, BIAS = 1.5, 3.0  # √n·sd and n·bias, over ‖K_∞‖


def k_infinite(width: float) -> Tensor:
    """As in the standard parametrization, it grows with width."""
    a = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (a @ a.T + torch.eye(N)) * width


def fluctuations(seeds: int) -> Tensor:
    """[seeds, N, N], symmetric, of mean 0 and unit sample variance in all."""
    z = torch.randn(seeds, N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = z + z.mT
    z = z - z.mean(0)
    return z / z.var(0).sum().sqrt() if seeds > 1 else torch.ones(1, N, N).double() / N


def write(root: Path, spread: float = SPREAD, bias: float = BIAS, seeds: int = SEEDS, limit: bool = True) -> Path:
    """K_0 = K_∞ + ‖K_∞‖·(bias/n·K_∞/‖K_∞‖ + spread/√n·z_s): known corrections, exact in the sample."""
    z = fluctuations(seeds)
    for width in WIDTHS:
        for seed in range(seeds):
            k_inf = k_infinite(width)
            k = k_inf * (1 + bias / width) + k_inf.norm() * spread / math.sqrt(width) * z[seed]
            writer = RecordWriter.create(root / f"{width}-{seed}", manifest(width, seed))
            for step in (0, 1):
                metrics: dict[str, float | None] = {"kernel_angle": 0.1 * step / width or None}
                kept = Limit(k_inf, torch.arange(N)) if limit and step == 0 else None
                layers = {"net.weight": 0.9 * k, "net.bias": 0.1 * k}
                eigenvalues = torch.linalg.eigvalsh(k).flip(0)
                writer.append(Measurement(step, metrics, {}, k, layers, eigenvalues, 0.1, limit=kept))
    return root


def manifest(width: int, seed: int) -> dict:
    probes = {"n": N, "hash": "a", "targets_hash": "b"}
    return {
        "hparams": {"width": width, "seed": seed, "depth": width // 16},
        "probes": probes,
        "reduction": "trace",
        "optimizer": "SGD",
    }


def found(root: Path) -> FiniteWidth:
    wide = compare_runs(root).finite_width
    assert wide is not None
    return wide


def test_the_law_is_recovered(tmp_path: Path) -> None:
    wide = found(write(tmp_path, bias=0.0))
    for name in ("distance_to_infinite", "seed_deviation"):
        slope = wide.slopes[name]
        assert slope.value == pytest.approx(-0.5, abs=1e-9), name
        assert slope.low < -0.5 < slope.high, name
        assert slope.n == len(WIDTHS) * SEEDS, name
        assert "holds −½" in wide.reading(name), name
    assert wide.points["seed_deviation"].iloc[0] > 0


def test_the_corrections_are_recovered(tmp_path: Path) -> None:
    wide = found(write(tmp_path))
    assert list(wide.table["width"]) == list(WIDTHS)
    assert wide.table["n_bias"].tolist() == pytest.approx([BIAS] * 4, rel=1e-9)
    assert wide.table["n_variance"].tolist() == pytest.approx([SPREAD**2] * 4, rel=1e-9)
    n = torch.tensor(WIDTHS, dtype=torch.float64)
    rms = (SPREAD**2 / n * (1 - 1 / SEEDS) + (BIAS / n) ** 2).sqrt()  # over seeds, whose sample variance is exact
    assert wide.table["distance"].tolist() == pytest.approx(rms.tolist(), rel=1e-9)
    squares = (wide.points["seed_deviation"] ** 2).groupby(wide.points["width"]).mean()
    assert squares.tolist() == pytest.approx([SPREAD**2 / width for width in WIDTHS], rel=1e-9), "unbiased in the seeds"
    bias, variance = wide.corrections(64)
    assert torch.allclose(bias, BIAS * k_infinite(64) / k_infinite(64).norm())
    assert float(variance.sum()) == pytest.approx(SPREAD**2)


def test_the_width_within_ten_percent(tmp_path: Path) -> None:
    """V/n + B²/n² = 0.01, with V and B² estimated without bias from the seeds."""
    wide = found(write(tmp_path / "a", bias=0.0))
    assert wide.wide == pytest.approx(SPREAD**2 / 0.01, rel=1e-9)
    n = found(write(tmp_path / "b", spread=1e-6, bias=BIAS)).wide
    assert n == pytest.approx(BIAS / 0.1, rel=1e-4)


def test_a_wrong_law_is_not_read_as_the_right_one(tmp_path: Path) -> None:
    """Negative control: a distance of order 1/n."""
    wide = found(write(tmp_path, spread=1e-3, bias=BIAS))
    assert wide.slopes["distance_to_infinite"].value == pytest.approx(-1, abs=0.01)
    assert "does not hold −½" in wide.reading("distance_to_infinite")


def test_no_width_is_extrapolated_to_without_a_law(tmp_path: Path) -> None:
    """Distances that stay where they are: 10 % is at no width that could be told."""
    z = fluctuations(SEEDS)
    for width in WIDTHS:
        for seed in range(SEEDS):
            k_inf = k_infinite(width)
            k = k_inf + k_inf.norm() * 0.3 * z[seed]
            writer = RecordWriter.create(tmp_path / "runs" / f"{width}-{seed}", manifest(width, seed))
            kept = Limit(k_inf, torch.arange(N))
            eigenvalues = torch.linalg.eigvalsh(k).flip(0)
            writer.append(Measurement(0, {"kernel_angle": 0.0}, {}, k, {"net.weight": k}, eigenvalues, 0.1, limit=kept))
    wide = found(tmp_path / "runs")
    assert wide.slopes["distance_to_infinite"].value == pytest.approx(0, abs=1e-9)
    assert wide.wide is None
    said = " ".join(
        CliRunner().invoke(app, ["widths", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]).output.split()
    )
    assert "10 % of its limit is undefined: the distance does not fall as between n^−1 and n^−½" in said
    as_json = json.loads(CliRunner().invoke(app, ["widths", str(tmp_path / "runs"), "--json"]).stdout)["finite_width"]
    assert as_json["width_within_10_percent"] is None
    assert "undefined" in as_json["width_within_10_percent_reason"]


def test_few_seeds(tmp_path: Path) -> None:
    one = found(write(tmp_path / "one", seeds=1))
    assert one.wide is None
    assert math.isnan(one.table["n_variance"].iloc[0])
    assert set(one.slopes) == {"distance_to_infinite"}
    assert any("1 seed at some width" in note for note in one.notes)
    with pytest.raises(ValueError, match="corrections need two seeds"):
        one.corrections(64)
    two = found(write(tmp_path / "two", seeds=2))
    assert "seed_deviation" not in two.slopes, "two seeds deviate from their mean alike"
    assert two.wide is not None


def test_runs_without_a_limit(tmp_path: Path) -> None:
    assert compare_runs(write(tmp_path / "none", limit=False)).finite_width is None
    some = write(tmp_path / "some")
    write(some / "more", limit=False)
    wide = found(some)
    assert len(wide.points) == len(WIDTHS) * SEEDS
    assert any("without a limit" in note for note in wide.notes)
    assert compare_runs(some, x="depth").finite_width is None, "of width alone"


def test_biases_that_hide_the_law_are_told(tmp_path: Path) -> None:
    """Real networks at torch's own initialisation, and at Kaiming's."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for kind in ("torch", "kaiming"):
        for width in (16, 64):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            model.append(nn.Linear(width, 2))
            if kind == "kaiming":
                for i in (0, 2, 4):
                    nn.init.kaiming_normal_(model[i].weight)
            monitor = Monitor(model, x, record=tmp_path / kind / str(width), hparams={"width": width})
            monitor.measure(0)
    told = {kind: any("hide the law" in note for note in found(tmp_path / kind).notes) for kind in ("torch", "kaiming")}
    assert told == {"torch": True, "kaiming": False}


def test_the_command_prints_and_writes_it(tmp_path: Path) -> None:
    runs = write(tmp_path / "runs", bias=0.0)
    result = CliRunner().invoke(app, ["widths", str(runs), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for part in ("n·variance", "distance_to_infinite: slope", "holds −½", "K₀ is within 10 % of its limit", "225 on"):
        assert part in said, part
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"finite_width.csv", "slope_distance_to_infinite.png", "slope_seed_deviation.png"} <= written
    as_json = json.loads(CliRunner().invoke(app, ["widths", str(runs), "--json"]).stdout)["finite_width"]
    assert as_json["width_within_10_percent"] == pytest.approx(225)
    assert as_json["slopes"]["distance_to_infinite"]["value"] == pytest.approx(-0.5)
    assert len(as_json["table"]) == len(WIDTHS)
