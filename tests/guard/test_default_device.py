"""A script's default device: its own code runs under it, and what a probe makes for itself lies where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, empirical_ntk, plan
from ntkwatch.diagnostics import select


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors without memory: whatever is made there by mistake cannot be computed with."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # type: ignore[arg-type]


seen: set[str] = set()  # devices of the model's own new tensors; a probe puts back what the model itself notes


class Net(nn.Module):
    """Notes where its own new tensors go."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        seen.add(torch.zeros(()).device.type)
        return self.layers(x)


def made() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return Net(), torch.randn(8, 6), torch.arange(8) % 3


def two_probes() -> Any:
    net, x, y = made()
    monitor = Monitor(net, (x, y), diagnostics=select("full"), loss=nn.functional.cross_entropy)
    monitor.measure(0)
    with torch.no_grad():
        net.layers[0].weight.add_(0.1)
    return monitor.measure(1)


def test_probes_measure_the_same(elsewhere: None) -> None:
    found = two_probes()
    torch.set_default_device(None)  # type: ignore[arg-type]
    right = two_probes()
    assert {**found.metrics, "overhead": 0} == {**right.metrics, "overhead": 0}
    assert torch.equal(found.kernel, right.kernel)


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
def test_kernels_and_plans(engine: Any, elsewhere: None) -> None:
    net, x, _ = made()
    seen.clear()
    found = empirical_ntk(net, x, engine=engine, reduction="full")
    assert plan(net, x, engine=engine).peak_bytes > 0
    assert seen == {"meta"}, "the model runs under the script's own default"
    torch.set_default_device(None)  # type: ignore[arg-type]
    assert torch.equal(found, empirical_ntk(net, x, engine=engine, reduction="full"))
