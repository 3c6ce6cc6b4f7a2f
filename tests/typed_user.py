"""A user's script for `mypy`, never run: the public names have their types, and a wrong call is seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import ntkwatch
from ntkwatch import Measurement, Monitor, NTKWatch, Run, empirical_ntk, infinite, layer_ntks, load_run, metrics, plan

model, x = nn.Linear(3, 2), torch.randn(5, 3)
callback = NTKWatch(probes=32, every=[0, 10], budget=None, diagnostics=["default", "loss"], hparams={"width": 256})
found = Monitor(model, (x, torch.zeros(5, 2)), loss=nn.functional.mse_loss).measure(0)
assert_type(callback.last, Measurement | None)
assert_type(found, Measurement)
assert_type(found.metrics["kernel_angle"], float | None)
assert_type(empirical_ntk(model, x, reduction="full"), Tensor)
assert_type(layer_ntks(model, x), dict[str, Tensor])
assert_type(plan(model, x).peak_bytes, int)
assert_type(load_run("runs"), Run)
assert_type(ntkwatch.compare_runs(["a", "b"]).slopes["kernel_angle"].value, float)
assert_type(metrics.kernel_angle(x, x), Tensor)
assert_type(metrics.class_block_fit(x, x).r2, Tensor)
assert_type(infinite.kernel(infinite.from_module(model), x).ntk, Tensor)
infinite.kernel(infinite.Serial(infinite.Dense(2**0.5), infinite.Relu(), infinite.Dense()), x)

# An ignore that nothing needs is an error here: these calls are wrong.
metrics.kernel_angle("k", x)  # type: ignore[arg-type]
NTKWatch(probe=32)  # type: ignore[call-arg]
empirical_ntk(model, x, reduction="mean")  # type: ignore[arg-type]
