"""The whole table through the callback: recorded, and a resumed run's path goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from ntkwatch import NTKWatch, load_run
from ntkwatch.diagnostics import select
from tests.support.runs import Classifier, loaders, trainer

MORE = ["kernel_angle", "kernel_velocity", "path_length", "directness"]


def test_the_full_preset_in_a_trainer(tmp_path: Path) -> None:
    from torch.nn.functional import cross_entropy

    watch = NTKWatch(probes=12, budget=None, every=[0, 4, 12], diagnostics="full", loss=cross_entropy)
    trainer(tmp_path, watch).fit(Classifier(), *loaders())
    run = load_run(watch.record)
    assert set(run.metrics.columns) - {"overhead"} == {n for n in select("full") if not n.startswith("statistics_")}
    assert run.metrics["stability_ratio"].notna().all(), run.reasons
    assert 0 < run.metrics["stability_ratio"].iloc[-1] < 2
    assert run.metrics["one_step_halving"].iloc[0] == pytest.approx(0.5, abs=0.1)
    assert "spectral_update" in run.layer_metrics.columns.get_level_values(1)


def test_a_resumed_path_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its length is the sum over every pair of probes in the record, on both sides of the interruption."""
    settings = {"probes": 12, "budget": None, "every": [0, 2, 4, 6, 9, 12], "diagnostics": MORE}
    first = trainer(tmp_path, NTKWatch(**settings), max_steps=6)
    first.fit(Classifier(), *loaders())
    first.save_checkpoint(tmp_path / "a.ckpt")
    watch = NTKWatch(**settings)
    trainer(tmp_path, watch).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "a.ckpt")
    metrics = load_run(watch.record).metrics
    assert list(metrics.index) == [0, 2, 4, 6, 9, 12]
    pieces = metrics["kernel_velocity"].iloc[1:] * metrics.index.to_series().diff().iloc[1:]
    assert metrics["path_length"].iloc[-1] == pytest.approx(pieces.sum(), rel=1e-9)
    assert metrics["directness"].iloc[-1] == pytest.approx(metrics["kernel_angle"].iloc[-1] / pieces.sum(), rel=1e-9)
