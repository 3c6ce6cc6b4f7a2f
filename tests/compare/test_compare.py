"""Runs side by side: known slopes from records on disk, what is refused and why, and what the table holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ntkwatch.compare import CompareError, MismatchError, compare_runs, diff_runs, fit_slope
from ntkwatch.record import RecordError, find_runs, load_run
from tests.support.synthetic import STEPS, write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root)
    return root


def test_known_slopes_are_recovered_from_records(sweep: Path) -> None:
    slopes = compare_runs([sweep]).slopes
    for name in ("kernel_angle", "relative_change", "taylor_ratio", "parameter_distance"):
        value, low, high, r2, n = slopes[name]
        assert value == pytest.approx(-1, abs=1e-9), name
        assert low == pytest.approx(-1, abs=1e-7), name
        assert high == pytest.approx(-1, abs=1e-7), name
        assert r2 == pytest.approx(1), name
        assert n == 12, name
    assert slopes["kernel_distance"].value == pytest.approx(-2, abs=0.05), "1 − cos is quadratic in the angle"


def test_the_table_has_a_row_per_run_in_order_of_width_and_seed(sweep: Path) -> None:
    table = compare_runs(sweep).table
    assert list(table["width"]) == [w for w in (32, 64, 128, 256) for _ in range(3)]
    assert list(table["seed"]) == [0, 1, 2] * 4
    assert list(table["run"][:3]) == ["version_0", "version_1", "version_2"]
    assert set(table["step"]) == {256}
    assert set(table["optimizer"]) == {"SGD"}
    run = load_run(sweep / "version_4")
    assert table["kernel_angle"][4] == run.metrics["kernel_angle"][256], "the table repeats the record"


def test_the_history_is_every_value_of_every_step(sweep: Path) -> None:
    c = compare_runs(sweep)
    assert len(c.history) == 12 * len(STEPS) * len(load_run(sweep / "version_0").metrics.columns)
    one = c.history.query("run == 'version_7' and step == 64 and metric == 'kernel_angle'")
    assert one["value"].item() == load_run(sweep / "version_7").metrics["kernel_angle"][64]


SHUT = "switched off at step 8; nothing was measured after it: the gate is shut (\N{REPLACEMENT CHARACTER}[31m)."
ENDS: dict[str, tuple[dict[str, int | None], list[str]]] = {  # the step at which each run's watch was switched off
    "none": ({"a": None, "b": None}, []),
    "one": ({"a": None, "b": 8}, [f"b: {SHUT}"]),
    "two, for one reason": ({"a": 8, "b": 8}, [f"a, b: {SHUT}"]),
    "two, at other steps": ({"a": 2, "b": 8}, [f"a: {SHUT.replace('8', '2')}", f"b: {SHUT}"]),
    "five": (dict.fromkeys("abcde", 8), [f"a, b and 3 others: {SHUT}"]),
}


@pytest.mark.parametrize("case", ENDS)
def test_runs_that_were_switched_off_are_noted(case: str, tmp_path: Path) -> None:
    ends, wanted = ENDS[case]
    for i, (name, step) in enumerate(ends.items()):
        off = None if step is None else {"step": step, "why": "the gate\nis shut (\x1b[31m)"}
        write_run(tmp_path / name, width=32 * 2**i, switched_off=off)
    found = [note for note in compare_runs(tmp_path).notes if "switched off" in note]
    assert found == wanted, case


def test_the_last_common_step_is_used(tmp_path: Path) -> None:
    write_run(tmp_path / "a", width=32, steps=(0, 1, 2, 4, 8))
    write_run(tmp_path / "b", width=64, steps=(0, 2, 4, 16))
    assert compare_runs(tmp_path).step == 4


def test_a_run_given_twice_counts_once(sweep: Path) -> None:
    c = compare_runs([sweep, sweep / "version_0", str(sweep / "version_3" / "ntkwatch")])
    assert len(c.table) == 12


def test_min_width_leaves_small_ones_out(sweep: Path) -> None:
    assert sorted(set(compare_runs(sweep, min_width=100).table["width"])) == [128, 256]
    with pytest.raises(CompareError, match=r"no run has width ≥ 1000 \(the largest is 256\)"):
        compare_runs(sweep, min_width=1000)


def test_any_hyperparameter_can_be_x(tmp_path: Path) -> None:
    for i, rate in enumerate((0.01, 0.1, 1.0)):
        hparams = {"optimizer": {"lr": rate}, "seed": i}
        write_run(tmp_path / str(i), width=4.0, strength=rate, exponent=0.0, hparams=hparams)
    c = compare_runs(tmp_path, x="lr")
    assert list(c.table["lr"]) == [0.01, 0.1, 1.0]
    assert c.slopes["kernel_angle"].value == pytest.approx(1)
    assert "no reference line" in c.reading("kernel_angle"), "the lines are about width"


def test_a_slope_is_that_of_every_width_and_seed(tmp_path: Path) -> None:
    write_sweep(tmp_path, widths=(32, 64, 128), seeds=2, noise=0.2, strength=2.0, steps=(0, 8))
    c = compare_runs(tmp_path)
    assert c.slopes["kernel_angle"] == fit_slope(list(c.table["width"]), list(c.table["kernel_angle"]))
    assert c.slopes["kernel_angle"].r2 < 1, "the seeds differ"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({"hparams": {"lr": 0.1}}, r"odd.*has no hyperparameter 'width' \(it has lr\).*--x"),
    "width is a text": ({"hparams": {"width": "wide"}}, r"odd.*has width = 'wide'.*positive number"),
    "width is 0": ({"hparams": {"width": 0}}, r"odd.*has width = 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_without_a_usable_x_is_named(case: str, tmp_path: Path) -> None:
    kwargs, message = REFUSED[case]
    write_run(tmp_path / "good", width=32)
    write_run(tmp_path / "odd", **kwargs)
    with pytest.raises(CompareError, match=message):
        compare_runs(tmp_path)


def test_one_run_or_one_width_is_no_comparison(tmp_path: Path) -> None:
    write_run(tmp_path / "a", width=32)
    with pytest.raises(CompareError, match=r"1 run with one width \(32\)"):
        compare_runs(tmp_path)
    write_run(tmp_path / "b", width=32, seed=1)
    with pytest.raises(CompareError, match=r"2 runs with one width \(32\)"):
        compare_runs(tmp_path)


def test_no_common_step_is_said_with_each_runs_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "a", width=32, steps=(0, 2, 4))
    write_run(tmp_path / "b", width=64, steps=(1, 3, 5))
    with pytest.raises(CompareError, match=r"share no measured step \(a 0–4, b 1–5\)"):
        compare_runs(tmp_path)


def test_a_run_without_a_probe_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", width=32)
    write_run(tmp_path / "b", width=64, steps=())
    with pytest.raises(CompareError, match=r"b/ntkwatch holds no probe yet"):
        compare_runs(tmp_path)


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError):
        compare_runs(tmp_path)


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "probes": ({"probes": {"n": 8, "hash": "c" * 64, "targets_hash": "b" * 64}}, "probe hash: aaaaaaaaaaaa in a, b"),
    "targets": ({"probes": {"n": 8, "hash": "a" * 64, "targets_hash": "c" * 64}}, "targets hash: bbbbbbbbbbbb"),
    "reduction": ({"reduction": "full"}, "reduction: trace in a, b against full in odd"),
    "mode": ({"mode": "train"}, "mode: eval in a, b against train in odd"),
    "diagnostics": ({"diagnostics": ["taylor_ratio"]}, "diagnostics: "),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_unlike_kernels_are_refused_and_can_be_allowed(case: str, tmp_path: Path) -> None:
    change, message = MISMATCHES[case]
    for name, width in (("a", 32), ("b", 64)):
        write_run(tmp_path / name, width=width)
    write_run(tmp_path / "odd", width=128, **change)
    with pytest.raises(MismatchError) as refusal:
        compare_runs(tmp_path)
    assert message in str(refusal.value)
    assert "in odd" in str(refusal.value)
    assert "--allow-mismatch" in str(refusal.value)
    allowed = compare_runs(tmp_path, allow_mismatch=True)
    assert message in (allowed.mismatch or "")
    assert len(allowed.table) == 3


def test_an_allowed_mismatch_is_printed_on_every_figure(tmp_path: Path) -> None:
    write_run(tmp_path / "a$x_{", width=32)
    write_run(tmp_path / "b$", width=64, mode="train")
    drawn = compare_runs(tmp_path, allow_mismatch=True).figures()
    for name, figure in drawn.items():
        assert "mismatch allowed: mode" in figure.get_supxlabel(), name
    drawn["slope_kernel_angle"].canvas.draw()  # a dollar sign in a run's name is no formula


def test_an_undefined_value_leaves_its_slope_out_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "a", width=32)
    write_run(tmp_path / "b", width=64, undefined={"taylor_ratio": "θ_0 is not kept above 2 GB of parameters"})
    c = compare_runs(tmp_path)
    assert "taylor_ratio" not in c.slopes
    assert "kernel_angle" in c.slopes
    assert any("taylor_ratio" in note and "b: θ_0 is not kept" in note for note in c.notes), c.notes


def test_too_few_points_give_no_interval_and_say_so(tmp_path: Path) -> None:
    write_run(tmp_path / "a", width=32)
    write_run(tmp_path / "b", width=64)
    c = compare_runs(tmp_path)
    assert math.isnan(c.slopes["kernel_angle"].low)
    assert any("no confidence interval from 2 points" in note for note in c.notes)
    assert any("width 32 has 1 run" in note for note in c.notes)


def test_step_0_alone_has_no_slopes_and_says_so(tmp_path: Path) -> None:
    write_sweep(tmp_path, widths=(32, 64), seeds=1, steps=(0,))
    c = compare_runs(tmp_path)
    assert c.slopes == {}
    assert any("before training" in note for note in c.notes)


def test_another_optimizer_is_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, widths=(32, 64), seeds=1, optimizer="Adam")
    assert any("hold for SGD; the optimizer here: Adam" in note for note in compare_runs(tmp_path).notes)


def test_seed_spread_falls_as_the_root_of_width(tmp_path: Path) -> None:
    write_sweep(tmp_path, widths=(16, 128, 1024), seeds=8, steps=(0,))
    spread = compare_runs(tmp_path).seed_spread
    assert fit_slope(list(spread["x"]), list(spread["spread"])).value == pytest.approx(-0.5, abs=0.1)


def test_seed_spread_is_the_unbiased_deviation_over_seeds(sweep: Path) -> None:
    spread = compare_runs(sweep).seed_spread
    assert set(spread["runs"]) == {3}
    for width, found in zip(spread["x"], spread["spread"], strict=True):
        runs = [run for run in map(load_run, find_runs([sweep])) if run.width == width]
        kernels = torch.stack([run.kernel(run.steps[0]) for run in runs])
        assert found == pytest.approx(float(kernels.var(0).sum().sqrt() / kernels.mean(0).norm())), width


def test_figures_have_one_for_each_slope(sweep: Path) -> None:
    c = compare_runs(sweep)
    assert {name for name in c.figures() if name.startswith("slope_")} == {f"slope_{name}" for name in c.slopes}


def test_as_dict_is_json_without_nan(tmp_path: Path) -> None:
    write_run(tmp_path / "a", width=32, hparams={"width": 32})
    write_run(tmp_path / "b", width=64)
    answer = json.loads(json.dumps(compare_runs(tmp_path).as_dict(), allow_nan=False))
    assert answer["slopes"]["kernel_angle"]["low"] is None
    assert [row["seed"] for row in answer["runs"]] == [None, 0]


def test_a_run_differs_from_itself_by_nothing(sweep: Path) -> None:
    d = diff_runs(sweep / "version_0", sweep / "version_0")
    assert d.table["angle"].abs().max() == pytest.approx(0, abs=1e-12)
    assert d.table["scale"].abs().max() == pytest.approx(0, abs=1e-12)
    assert d.table["cka"].min() == pytest.approx(1)
    assert list(d.table["step"]) == list(STEPS)
    assert list(d.layers["layer"]) == ["net.0.weight", "net.0.bias", "net.2.weight"]
    assert list(d.layers["share_a"]) == pytest.approx([0.6, 0.1, 0.3])


def test_a_difference_is_that_of_the_kernels(sweep: Path) -> None:
    a, b = load_run(sweep / "version_0"), load_run(sweep / "version_11")
    d = diff_runs(a.folder, b.folder, step=16)
    row = d.table.set_index("step").loc[16]
    k, m = a.kernel(16), b.kernel(16)
    cosine = float((k * m).sum() / (k.norm() * m.norm()))
    assert row["angle"] == pytest.approx(math.acos(cosine), rel=1e-6)
    assert row["scale"] == pytest.approx(float(torch.log(m.trace() / k.trace())))
    assert d.step == 16


@pytest.mark.parametrize("change", [{"probes": {"hash": "c" * 64}}, {"reduction": "sum"}, {"mode": "train"}])
def test_kernels_on_unlike_grounds_have_no_difference(change: dict[str, Any], sweep: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", **change)
    with pytest.raises(MismatchError, match="unlike grounds"):
        diff_runs(sweep / "version_0", other)


def test_a_step_that_one_run_lacks_is_refused(sweep: Path) -> None:
    with pytest.raises(CompareError, match=r"step 3 is not one that both runs measured: choose from 0, 1, 2"):
        diff_runs(sweep / "version_0", sweep / "version_1", step=3)
