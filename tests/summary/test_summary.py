"""One run in words: numbers beside reference points, disagreements named, nothing invented, no bare label."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from ntkwatch.record import load_run
from ntkwatch.summary import (
    REFERENCE_ANGLE,
    REFERENCE_GAMMA,
    REFERENCE_TAYLOR_RATIO,
    equivalent_gamma,
    optimizer_name,
    path,
    speed,
    summarise,
    summary_lines,
    unmoved,
)
from tests.support.synthetic import write_run

ROW = {
    "kernel_angle": 0.3,
    "kernel_scale": 0.1,
    "relative_change": 0.35,
    "taylor_ratio": 0.36,
    "parameter_distance": 0.1,
    "centered_alignment": 0.2,
    "centered_alignment_z": 9.0,
    "kernel_velocity": 0.03,
    "overhead": 0.011,
}
START = dict.fromkeys(ROW, 0.0) | {"centered_alignment": 0.1, "centered_alignment_z": 4.0, "taylor_ratio": math.nan}


def _run(manifest: dict[str, Any] | None = None, **end: float) -> SimpleNamespace:
    """A run that was measured at steps 0 and 10, as ROW but for what is given."""
    metrics = pd.DataFrame([START, ROW | end], index=pd.Index([0, 10], name="step"))
    return SimpleNamespace(manifest=manifest or {}, metrics=metrics, reasons={}, layer_metrics=pd.DataFrame())


def _line(run: SimpleNamespace, axis: str) -> str:
    return " ".join(text for label, text in summary_lines(run) if label == axis)


@pytest.mark.parametrize("ladder", [REFERENCE_TAYLOR_RATIO, REFERENCE_ANGLE], ids=["rho", "angle"])
def test_the_ladder_is_read_back_at_its_rungs(ladder: tuple[float, ...]) -> None:
    for gamma, value in zip(REFERENCE_GAMMA, ladder, strict=True):
        assert equivalent_gamma(value, ladder) == pytest.approx(gamma), f"γ0 {gamma}"
    values = [ladder[0] * 1.1**k for k in range(40) if ladder[0] * 1.1**k < ladder[-1]]
    read = [equivalent_gamma(value, ladder) for value in values]
    assert read == sorted(read), "a larger value stands higher"
    assert equivalent_gamma(ladder[0] / 2, ladder) == 0
    assert equivalent_gamma(ladder[-1] * 1.01, ladder) == math.inf


CASES: dict[str, tuple[dict[str, float], str, str]] = {
    "lazy end": (
        {"taylor_ratio": 0.005},
        "Linearity",
        "Taylor ratio 0.005: next to linear, below the reference range, γ0 < 0.01",
    ),
    "near linear": ({"taylor_ratio": 0.048}, "Linearity", "close to linear, as the reference at γ0 0.03"),
    "between": ({"taylor_ratio": 0.33}, "Linearity", "clearly non-linear, as the reference at γ0 0.1"),
    "rich": ({"taylor_ratio": 0.69}, "Linearity", "strongly non-linear, as the reference at γ0 1"),
    "beyond": ({"taylor_ratio": 0.95}, "Linearity", "above the reference range, γ0 > 3"),
    "turned": ({"kernel_angle": 0.419}, "Rotation", "0.419 rad: strongly turned, as the reference at γ0 0.3"),
    "still": ({"kernel_angle": 0.001}, "Rotation", "0.001 rad: hardly turned, below the reference range, γ0 < 0.01"),
    "scale apart": ({"kernel_scale": math.log(2)}, "Scale", "changed × 2 (log +0.693)"),
    "towards": ({}, "Direction", "0.100 → 0.200 (+0.100), z 4.0 → 9.0 against shuffled labels: it turned towards"),
    "away": ({"centered_alignment": 0.05, "centered_alignment_z": 3.0}, "Direction", "it turned away from the targets"),
    "chance": ({"centered_alignment_z": 1.2}, "Direction", "z 4.0 → 1.2 against shuffled labels: within chance"),
    "alignment and z": ({"centered_alignment_z": 3.0}, "Direction", "These disagree: prefer the z-score"),
    "no z": (
        {"centered_alignment_z": math.nan},
        "Direction",
        "without a z-score it cannot be distinguished from chance",
    ),
    "cost": ({}, "Cost", "1.10% of wall time"),
    "regime": ({}, "Regime", "needs a sweep of the width or the output scale"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_axis_says_its_numbers(case: str) -> None:
    end, axis, wanted = CASES[case]
    assert wanted in _line(_run(**end), axis), case


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        (
            {"taylor_ratio": 0.6, "kernel_angle": 0.01, "kernel_scale": -2.8},
            "a change of the weights' scale alone has this effect",
        ),
        (
            {"taylor_ratio": 0.6, "kernel_angle": 0.01},
            "departed from their linearisation further than the kernel turned.",
        ),
        ({"taylor_ratio": 0.02, "kernel_angle": 0.6}, "the kernel turned further than the outputs departed"),
    ],
    ids=["shrinking", "unexplained", "turning"],
)
def test_axes_that_disagree_are_named(end: dict[str, float], wanted: str) -> None:
    text = summarise(_run(**end), width=10_000)
    assert "The axes disagree" in text
    assert wanted in text


def test_the_verdict_is_its_axes_in_sentences() -> None:
    end = {"taylor_ratio": 0.33, "kernel_angle": 0.18, "kernel_scale": math.log(3), "feature_angle": 0.2}
    end |= {"after_kernel_gain": 0.1, "stability_ratio": 1.4, "loss": 0.1, "loss_if_lazy": 0.4}
    assert _line(_run(**end), "Verdict") == (
        "The run is clearly non-linear in its weights (Taylor ratio 0.33, as the reference at γ0 0.17); its kernel "
        "clearly turned (0.18 rad, as the reference at γ0 0.1); its trace changed × 3; "
        "the last hidden features turned 0.2 rad. "
        "Alignment with the targets +0.100 (z 4.0 → 9.0): it turned towards the targets. As a kernel machine it is "
        "better than at the start (+0.100 held-out accuracy). The learning rate exceeded the largest stable one, "
        "up to × 1.4. Loss on the probes 0.1; the linearised network's, 0.4."
    )


def test_the_verdict_on_growth_alone() -> None:
    end = {"taylor_ratio": 0.3, "kernel_angle": 0.001, "kernel_scale": 2.0}
    assert "its trace changed × 7.39, which is nearly all of its motion" in _line(_run(**end), "Verdict")


def test_the_verdict_on_a_catapult() -> None:
    run = _run(stability_ratio=0.4, kernel_scale=-1.0)
    run.metrics.loc[0, "stability_ratio"] = 1.96
    wanted = "up to × 1.96, 0.4 at the end; the kernel shrank until it was stable (a catapult)."
    assert wanted in _line(run, "Verdict")


def test_the_verdict_on_a_forecast_that_diverged() -> None:
    run = _run(loss=0.1, loss_if_lazy=math.nan)
    run.reasons = {10: {"loss_if_lazy": "the linearised network diverged under the run's learning rates"}}
    assert "Loss on the probes 0.1; the linearised network diverged." in _line(run, "Verdict")


def test_a_run_whose_motion_was_not_measured_is_not_called_unmoved() -> None:
    metrics = pd.DataFrame({"loss": [1.0, 0.5]}, index=[0, 10])
    assert not unmoved(metrics)


def test_axes_that_agree_are_not() -> None:
    assert "The axes disagree" not in summarise(_run())


@pytest.mark.parametrize(
    ("named", "wanted"),
    [(["SGD"], "SGD"), (["SGD", "Adam"], "SGD + Adam"), ("AdamW", "AdamW"), ([], None), (None, None)],
)
def test_the_optimizer_is_named(named: object, wanted: str | None) -> None:
    assert optimizer_name({"optimizer": named}) == wanted


def test_no_bare_label() -> None:
    for rho in (0.001, 0.2, 0.9):
        text = summarise(_run(taylor_ratio=rho, kernel_angle=rho)).lower()
        assert "rich" not in text, "a label without a sweep"
        assert "is lazy" not in text
        assert "whether this is a lazy regime needs a sweep" in " ".join(text.split())


def test_before_anything_moved_nothing_is_claimed(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", steps=(0,)))
    text = summarise(run)
    assert "Nothing has moved yet" in text
    assert "Measured once, at step 0" in text
    for word in ("Linearity", "Direction", "Speed"):
        assert word not in text
    assert "no motion yet" in text, "the reason of the undefined Taylor ratio"


def test_a_constant_run_has_not_moved() -> None:
    still = dict.fromkeys(("kernel_angle", "relative_change", "taylor_ratio", "parameter_distance"), 0.0)
    assert unmoved(_run(**still).metrics)
    assert not unmoved(_run(**still | {"parameter_distance": 1e-9}).metrics)


def test_half_of_the_path_and_directness() -> None:
    steps, velocity = [0, 1, 2, 4, 8], [math.nan, 0.4, 0.2, 0.05, 0.025]
    metrics = pd.DataFrame({"kernel_velocity": velocity, "kernel_angle": [0, 0.4, 0.5, 0.45, 0.4]}, index=steps)
    travelled = path(metrics)
    assert travelled is not None
    assert list(travelled) == pytest.approx([0.4, 0.6, 0.7, 0.8])
    text = speed(metrics)
    assert "path (0.8 rad) was covered by step 1 of 8 (12.5%)" in text
    assert "directness 0.50" in text
    assert "now turns 0.025 rad per step; the maximum was 0.4" in text


def test_two_probes_say_nothing_about_speed() -> None:
    assert _line(_run(), "Speed") == "2 probes are too few to say when the kernel moved."


def test_a_gap_in_the_velocity_gives_no_path() -> None:
    metrics = pd.DataFrame({"kernel_velocity": [math.nan, 0.1, math.nan]}, index=[0, 1, 2])
    assert path(metrics) is None
    assert speed(metrics) == ""


def test_reasons_are_repeated_once_for_all_they_hold_for(tmp_path: Path) -> None:
    why = dict.fromkeys(("centered_alignment", "centered_alignment_z"), "the batch holds no targets")
    text = " ".join(summarise(load_run(write_run(tmp_path / "a", undefined=why))).split())
    assert "centered_alignment, centered_alignment_z: the batch holds no targets" in text
    assert "Direction" not in text


def test_probe_count_and_reduction_are_cautioned(tmp_path: Path) -> None:
    text = _line(_run({"probes": {"n": 8}, "reduction": "trace", "n_outputs": 10}), "Caution")
    assert "8 probes understate the angle" in text
    assert "quarter or more" in text
    assert _line(_run({"probes": {"n": 64}, "reduction": "trace", "n_outputs": 1}), "Caution") == ""


def test_the_largest_and_the_most_turned_layer_are_named(tmp_path: Path) -> None:
    text = " ".join(summarise(load_run(write_run(tmp_path / "a"))).split())
    assert "Share of the trace: net.0 70%, net.2 30%" in text
    assert "Turned most: net.2" in text


@pytest.mark.parametrize("width", [40, 60, 79, 120])
def test_lines_fit(width: int, tmp_path: Path) -> None:
    text = summarise(load_run(write_run(tmp_path / "a")), width=width)
    assert max(map(len, text.splitlines())) <= width


def test_control_characters_of_a_model_name_do_not_reach_the_terminal() -> None:
    text = summarise(_run({"model": "\x1b]0;owned\x07\x1b[31mnet\u202e", "baseline": "a\nb\r"}))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "net" in text


OFF = {"switched_off": {"step": 1200, "why": "the probe failed (RuntimeError: one line,\n  \x1b[31manother)"}}
WATCH: dict[str, tuple[dict[str, Any], str]] = {
    "nothing went wrong": ({}, ""),
    "resumed": ({"switched_off": None, "failed_probes": []}, ""),
    "off": (
        OFF,
        "Switched off at step 1,200; nothing was measured after it: "
        "the probe failed (RuntimeError: one line, \N{REPLACEMENT CHARACTER}[31manother).",
    ),
    "one failed": ({"failed_probes": [7]}, "One probe failed, at step 7."),
    "some failed": ({"failed_probes": [3, 1000]}, "2 probes failed, the first at step 3, the last at step 1,000."),
}


@pytest.mark.parametrize("case", WATCH)
@pytest.mark.parametrize("measured", [True, False])
def test_what_became_of_the_watch_is_a_line_of_its_own(case: str, measured: bool) -> None:
    manifest, expected = WATCH[case]
    run = _run(manifest)
    run.metrics = run.metrics if measured else run.metrics.iloc[:0]
    assert _line(run, "Watch") == expected, case
