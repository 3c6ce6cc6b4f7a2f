"""A rank that measures alone: what does not communicate is as without the mode. Two ranks are in trust_ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ntkwatch import NTKWatch, empirical_ntk, plan
from ntkwatch.guard import leave_no_trace
from ntkwatch.guard.collectives import RefuseCollectives
from ntkwatch.guard.interruption import ProbeEnded, check, deferred_signals, time_limit
from tests.support.runs import Classifier, loaders, trainer


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "MLP": (mlp, (8, 6)),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), (8, 6)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        (8, 1, 8, 8),
    ),
    "encoder": (Encoder, (8, 5, 8)),
    "recurrent": (Recurrent, (8, 5, 8)),
}


@pytest.mark.parametrize("engine", ["auto", "functional"])
@pytest.mark.parametrize("case", MODELS)
def test_a_kernel_and_its_plan_are_the_same_under_the_mode(case: str, engine: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[case]
    model, x = make().eval(), torch.randn(*shape)
    if (case, engine) == ("recurrent", "functional"):
        engine = "layerwise"  # torch.func has no rule for it
    expected, planned = empirical_ntk(model, x, engine=engine), plan(model, x, engine=engine)
    with RefuseCollectives():
        assert torch.allclose(empirical_ntk(model, x, engine=engine), expected, rtol=1e-12, atol=0), case
        again = plan(model, x, engine=engine)
    assert (again.engine, again.peak_bytes) == (planned.engine, planned.peak_bytes), case
    assert [row.name for row in again.rows()] == [row.name for row in planned.rows()], case


def test_one_process_has_no_mode(tmp_path: Path) -> None:
    seen: list[str] = []

    def outputs(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
        return model.net(batch[0])

    watch = NTKWatch(probes=6, every=[0], budget=None, outputs=outputs, on_error="raise")
    trainer(tmp_path, watch, max_steps=1).fit(Classifier(), *loaders())
    assert watch.last is not None
    assert "Alone" not in seen


def test_a_probe_that_is_ended_is_put_back() -> None:
    """The guard's own operations are not ended again, and what raises past `except Exception` does so once."""
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    late = TimeoutError("late")

    def probe() -> None:
        with time_limit(0.0, late), RefuseCollectives(), leave_no_trace(model):
            model[0].bias.data = torch.ones(8)

    with pytest.raises(ProbeEnded) as ended:
        probe()
    assert ended.value.error is late
    assert model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_checks_are_nothing_outside() -> None:
    check()
    with time_limit(60.0, TimeoutError()), deferred_signals():
        check()


def test_the_callback_names_what_is_sharded(tmp_path: Path) -> None:
    """Told by the names of classes; on two ranks in trust_ranks."""
    for kind in ("FSDPModule", "FullyShardedDataParallel"):
        module = Classifier()
        module.net.append(type(kind, (nn.Identity,), {})())
        assert_off(tmp_path / kind, module, f"net.3 is managed by {kind}; sharded parameters cannot be measured yet")
    module = Classifier()
    module.net[0].bias = type("DTensor", (nn.Parameter,), {})(torch.zeros(16))
    assert_off(tmp_path / "tensor", module, "net.0.bias is a DTensor; sharded parameters cannot be measured yet")


def assert_off(folder: Path, module: Any, why: str) -> None:
    watch = NTKWatch(probes=6, budget=None, on_error="raise")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(folder, watch, max_steps=2).fit(module, *loaders())
    off = [str(each.message) for each in said if "NTKWatch" in str(each.message)]
    assert len(off) == 1, off
    assert f"switched off: {why}" in off[0]
    assert watch.last is None
