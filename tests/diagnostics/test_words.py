"""Axes of the summary that need more than the default preset: said where recorded, silent where not."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from ntkwatch.summary import summary_lines
from ntkwatch.summary.recorded import recorded
from tests.claims.verdicts import verdict

MOVED = {"kernel_angle": 0.3, "kernel_scale": 0.1, "taylor_ratio": 0.36, "parameter_distance": 0.1}


def lines(end: dict[str, float], start: dict[str, float] | None = None) -> dict[str, str]:
    metrics = pd.DataFrame([dict.fromkeys(end, 0.0) | (start or {}), end], index=pd.Index([0, 10], name="step"))
    return dict(recorded(metrics))


CASES: dict[str, tuple[dict[str, float], str, str]] = {
    "features": ({"feature_angle": 0.5, "feature_cka": 0.8}, "Features", "turned 0.5 rad (CKA with the start 0.8)"),
    "weights": ({"spectral_update_max": 0.25}, "Features", "changed by 0.25 times its size"),
    "gain": ({"after_kernel_gain": 0.1}, "Quality", "+0.100 accuracy: better"),
    "loss": ({"after_kernel_gain": -0.1}, "Quality", "-0.100 accuracy: worse"),
    "no gain": ({"after_kernel_gain": 0.01}, "Quality", "no difference (a saturated task shows none either)"),
    "power": ({"power_auc": 0.7, "power_auc_null": 0.5}, "Labels", "0.700 (shuffled labels 0.500)"),
    "complexity": ({"complexity": 2.0, "complexity_random": 3.0}, "Labels", "Complexity 2, shuffled labels 3"),
    "inside": ({"stability_ratio": 0.3, "max_stable_lr": 0.1}, "Stability", "(largest stable learning rate 0.1): well"),
    "near": ({"stability_ratio": 0.8}, "Stability", "ratio 0.8: inside the edge at 1."),
    "edge": ({"stability_ratio": 1.02}, "Stability", "ratio 1.02: on the edge"),
    "beyond": ({"stability_ratio": 1.6}, "Stability", "ratio 1.6: beyond the edge"),
    "overshoot": ({"linearization_error": 1.4, "kernel_scale": 0.2}, "Stability", "it is not an instability"),
    "instability": ({"linearization_error": 1.4, "kernel_scale": -0.5}, "Stability", "this is an instability"),
    "forecast of something else": (
        {"loss": 0.1, "loss_if_lazy": 0.4, "forecast_start_error": 0.7},
        "Forecast",
        "its first gradient differed from the run's by 70%",
    ),
    "forecast": (
        {"loss": 0.1, "loss_if_lazy": 0.4, "forecast_error": 0.5},
        "Forecast",
        "the same batches, 0.4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_axis_that_was_recorded_is_told(case: str) -> None:
    end, axis, wanted = CASES[case]
    assert wanted in lines(end)[axis], case


def test_a_catapult_is_told_after_it_settled() -> None:
    said = lines({"stability_ratio": 0.7}, start={"stability_ratio": 1.8})["Stability"]
    assert "its maximum was 1.8" in said


READINGS = [(0.2, ": passed"), (0.5, ": passed"), (0.8, "undecided"), (0.98, "FAILED")]


@pytest.mark.parametrize(("halving", "wanted"), READINGS)
def test_the_self_test_is_read_at_the_first_probe(halving: float, wanted: str) -> None:
    end = {"one_step_halving": math.nan, "one_step_error": math.nan}
    said = lines(end, start={"one_step_halving": halving, "one_step_error": 0.01})["Self-test"]
    assert wanted in said


def test_what_was_not_recorded_is_not_told() -> None:
    assert lines(MOVED) == {}


def test_a_diverged_run_is_read_where_it_was_last_finite() -> None:
    metrics = pd.DataFrame([dict.fromkeys(MOVED, 0.0), MOVED, dict.fromkeys(MOVED, math.nan)], index=[0, 10, 20])
    why = {20: dict.fromkeys(MOVED, "the kernel is not finite: the outputs are not finite on 3 of 8 probes")}
    run = SimpleNamespace(manifest={}, metrics=metrics, reasons=why, layer_metrics=pd.DataFrame())
    told = dict(summary_lines(run))
    assert "At step 20 the kernel is not finite: the outputs are not finite on 3 of 8 probes" in told["Divergence"]
    assert "of step 10, the last before" in told["Divergence"]
    assert "0.36" in told["Linearity"]


def test_error_bars_stand_beside_the_numbers() -> None:
    end = MOVED | {"taylor_ratio_se": 0.04, "kernel_angle_se": 0.02}
    metrics = pd.DataFrame([dict.fromkeys(end, 0.0), end], index=[0, 10])
    run = SimpleNamespace(manifest={}, metrics=metrics, reasons={}, layer_metrics=pd.DataFrame())
    told = dict(summary_lines(run))
    assert "Taylor ratio 0.36 ± 0.04" in told["Linearity"]
    assert "Kernel angle 0.3 ± 0.02 rad" in told["Rotation"]


VERDICTS: dict[str, tuple[str, ...]] = {
    "lazy": ("next to linear", "hardly turned", "unchanged", "inside the edge"),
    "unmoved": ("Nothing has moved yet", "the learning rate is 0"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_on_a_real_run(name: str, tmp_path: Path) -> None:
    """The others take longer: `python -m tests.claims.verdicts`."""
    said = " ".join(verdict(name, tmp_path, steps=20, rows=64, probes=12).split())
    for words in VERDICTS[name]:
        assert words in said, said
    (within,) = re.findall(
        r"predicted to within ([\d.]+)% of it, .*? is expected\): ?(?:passed|undecided: kinks)", said
    )
    assert float(within) < 1, f"{said}: a ReLU net's kinks may leave the halving open, not the step itself"
