"""Layouts are read once of a network, also where they depend on the data; what changes is read or verified anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch.engines import capture_points
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network


class LastToken(nn.Module):
    """Pools at the last token that is not padding (0), as decoder classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(ids).cumsum(1)))
        last = (ids != 0).sum(1) - 1
        return self.head(h)[torch.arange(len(ids)), last]


class Experts(nn.Module):
    """Rows go to one of two experts by a gate: which, depends on the weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.head = (
            nn.Linear(6, 2),
            nn.ModuleList([nn.Linear(6, 6) for _ in range(2)]),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        score, choice = self.gate(x).softmax(1).max(1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return self.head(torch.tanh(out) * score[:, None])


class ZeroReadout(nn.Module):
    """All gradients but the readout's are zero at first, so that their layouts cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.transpose(1, 2).flatten(0, 1))).unflatten(0, (len(x), -1)).sum(1))


def ids() -> Tensor:
    x = torch.randint(1, 20, (7, 9))
    x[2, 4:], x[5, 7:] = 0, 0
    return x


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[Tensor], Tensor], bool]] = {
    # the model, its probes, probes that it routes otherwise, and whether weights change how it routes
    "last token": (LastToken, ids, lambda x: torch.where(torch.arange(9) < 6, x, 0), False),
    "experts": (Experts, lambda: torch.randn(7, 6), lambda x: -x, True),
    "zero readout": (ZeroReadout, lambda: torch.randn(7, 4, 3), lambda x: -x, False),
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each backward pass that reads or verifies layouts."""
    made: list[int] = []
    real = capture_points._backward_once

    def counted(*args: Any) -> Any:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(capture_points, "_backward_once", counted)
    return made


def check(engine: Layerwise, network: Network, x: Tensor, what: str) -> None:
    """The engine that has learned of the network gives what one gives that has not."""
    with leave_no_trace(network.module):
        found, right = (e.kernel(network, x, reduction="full") for e in (engine, Layerwise()))
    assert torch.allclose(found.value, right.value, rtol=1e-5, atol=1e-7), what


def moved(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("case", CASES)
def test_kernels_stay_right_as_data_and_weights_change(case: str) -> None:
    make, probes, otherwise, _ = CASES[case]
    module, x = make(), probes()
    engine, network = Layerwise(), Network(module)
    for step in range(4):
        check(engine, network, x, f"{case}, step {step}")
        check(engine, network, otherwise(x), f"{case}, other data at step {step}")
        moved(module)


@pytest.mark.parametrize("case", ["last token", "experts"])
def test_layouts_are_read_once_while_rows_are_routed_alike(case: str, passes: list[int]) -> None:
    make, probes, otherwise, by_weights = CASES[case]
    module, x = make(), probes()
    engine, network = Layerwise(), Network(module)
    with leave_no_trace(module):
        for again in range(3):
            passes.clear()
            engine.kernel(network, x)
            assert again == 0 or not passes, f"{case}: {len(passes)} passes in kernel {again}"
        passes.clear()
        engine.kernel(network, otherwise(x))
        assert passes, f"{case}: other data routes otherwise"
        passes.clear()
        engine.kernel(network, x)
        assert not passes, f"{case}: what was read of the first probes is kept"
    moved(module)
    with leave_no_trace(module):
        engine.kernel(network, x)
    assert bool(passes) == by_weights, case


def test_layouts_of_other_data_are_verified_in_one_reading(passes: list[int]) -> None:
    """As many passes as one step of reading takes (here 2), where reading up the graph takes that for each step."""
    module, x = LastToken(), ids()
    engine, network = Layerwise(), Network(module)
    with leave_no_trace(module):
        engine.kernel(network, x)
        passes.clear()
        engine.kernel(network, CASES["last token"][2](x))
    assert len(passes) == 2
