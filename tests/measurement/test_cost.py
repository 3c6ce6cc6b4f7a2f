"""What presets cost, told before they are measured: rows that add up, priced by what they do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ntkwatch import plan
from ntkwatch.cli.commands import app
from ntkwatch.diagnostics import DIAGNOSTICS, costs, select
from ntkwatch.engines import extrapolation
from ntkwatch.measurement.cost import FORECAST
from tests.support.clocks import ticking

N, C = 12, 3
FORWARD = 2.0 * N * (4 * 16 + 16 * C)  # of the MLP below on N probes


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, C))


def told(diagnostics: str | Sequence[str] | None, **settings: object) -> dict[str, float]:
    """Row -> flops."""
    rows = plan(mlp(), torch.randn(N, 4), diagnostics=diagnostics, **settings).rows()  # type: ignore[arg-type]
    return {row.name: row.flops for row in rows}


PRICED: dict[str, tuple[str, str, float]] = {
    "features": ("feature_angle", "+ a forward pass at θ_0 and one at θ_t", 2 * FORWARD),
    "Taylor": ("taylor_ratio", "+ two forward-mode products at θ_0", 4 * FORWARD),
    "gradients": ("neural_feature_correlation_mean", "+ C backward passes", (1 + 2 * C) * FORWARD),
    "Θ": ("zero_modes_full", "+ eigenvalues of Θ [nC, nC]", 6.0 * (N * C) ** 3),
    "weights": ("spectral_update_max", "+ singular values of the weights", 14.0 * (16 * 4 * 4 + C * 16 * C)),
}


@pytest.mark.parametrize("case", PRICED)
def test_a_cost_is_priced_by_what_it_does(case: str) -> None:
    name, row, flops = PRICED[case]
    assert told([name])[row] == pytest.approx(flops), case


ELSEWHERE = ("a kernel reduced", "a second kernel, in models with BatchNorm")  # the model here has none


def test_a_second_kernel_is_counted_where_there_is_batch_norm() -> None:
    norm = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    rows = {row.name for row in plan(norm, torch.randn(N, 4), diagnostics="default").rows()}
    assert "+ a second kernel, in models with BatchNorm" in rows


@pytest.mark.parametrize("preset", ["default", "full", ["kernel_angle"]])
def test_every_cost_of_a_preset_has_one_row(preset: str | Sequence[str]) -> None:
    rows = told(preset)
    wanted = {f"+ {text}" for text in costs(select(preset)) if not text.startswith(ELSEWHERE)}
    assert {name for name in rows if name.startswith("+")} == wanted | {"+ eigenvalues of the kernel"}


def test_presets_cost_more_than_a_kernel_and_full_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extrapolation, "clock", ticking(1e-6))  # what is timed is never twice the same
    x = torch.randn(N, 4)
    seconds = [plan(mlp(), x, diagnostics=d).seconds for d in (None, ["kernel_angle"], "default", "full")]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 4


def test_a_richer_kernel_that_is_needed_is_the_one_planned() -> None:
    """Contracting to the full kernel costs more at the weights than to its trace."""
    trace, full = told(["kernel_angle"]), told(["max_stable_lr"])
    asked = plan(mlp(), torch.randn(N, 4), reduction="full").rows()
    assert {row.name: row.flops for row in asked}.items() <= full.items()
    assert sum(full.values()) > sum(trace.values())


def test_the_forecast_is_told_where_it_is_named_and_only_there() -> None:
    x = torch.randn(N, 4)
    assert plan(mlp(), x, diagnostics=["loss_if_lazy"]).notes == (FORECAST,)
    assert FORECAST in " ".join(str(plan(mlp(), x, diagnostics=["loss_if_lazy"])).split())
    assert plan(mlp(), x, diagnostics="full").notes == ()


def test_what_is_too_large_to_measure_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkwatch.measurement import arguments as checks

    monkeypatch.setattr(checks, "FULL_LIMIT", (N * C) ** 2 * 8 - 1)
    (note,) = plan(mlp(), torch.randn(N, 4), diagnostics=["max_stable_lr"]).notes
    assert "the full kernel of 12 probes x 3 outputs" in note


def test_a_kernel_per_parameter_is_counted_as_the_monitor_keeps_it() -> None:
    """Of a wide, shallow model whose kernels outweigh its factors."""
    x = torch.randn(256, 4)
    alone, kept = (plan(mlp(), x, layers=layers) for layers in (None, "trace"))
    kernel = 256 * 256 * 8
    assert kept.peak_bytes - alone.peak_bytes >= 3 * kernel  # of four parameters; one is the whole's buffer
    counted, without = (sum(row.bytes for row in each.rows()[1:]) for each in (kept, alone))
    assert counted > without
    probe = plan(mlp(), x, diagnostics=["kernel_angle"])
    assert probe.peak_bytes == kept.peak_bytes, "a Monitor keeps a kernel of each parameter"
    with pytest.raises(ValueError, match="layers must be one of"):
        plan(mlp(), x, layers="rows")  # type: ignore[arg-type]


def test_without_diagnostics_the_plan_is_the_kernels_alone() -> None:
    assert list(told(None)) == ["forward and backward", "0.weight", "0.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match="unknown diagnostics"):
        told(["kernel_angel"])


@pytest.mark.parametrize("wanted", ["default", "full", "kernel_angle,loss_if_lazy"])
def test_doctor_tells_the_costs(wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "made.py"
    path.write_text(
        "import torch\ndef made():\n    return torch.nn.Linear(3, 2), (torch.randn(5, 3), torch.zeros(5).long())\n"
    )
    found = CliRunner().invoke(app, ["doctor", f"{path}:made", "--diagnostics", wanted])
    assert found.exit_code == 0, found.output
    assert "+ eigenvalues of the kernel" in found.output
    for text in costs(select(wanted.split(","))):
        assert text.startswith(ELSEWHERE) or f"+ {text}" in found.output
    assert CliRunner().invoke(app, ["doctor", f"{path}:made", "--diagnostics", "nothing"]).exit_code == 2


def test_every_diagnostic_that_needs_more_than_the_kernel_has_a_price() -> None:
    """Those that ask the model again."""
    for name, diagnostic in DIAGNOSTICS.items():
        asks = "ask_model" in diagnostic.compute.__code__.co_names or "forecast" in diagnostic.needs
        assert diagnostic.cost is not None or not asks, name
