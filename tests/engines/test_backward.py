"""Backward passes for all outputs at once: as right as in turn, in one call of every operation, or known not to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntkwatch.engines.capture import Capture
from ntkwatch.engines.capture_points import read_capture_points
from ntkwatch.model import Network
from tests.support.device import placed

OUTPUTS = 6


class Distances(nn.Module):
    """To learned centres: torch's batching of the backward pass of a distance is wrong (2.13)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.centres = nn.Linear(3, 4), nn.Parameter(torch.randn(OUTPUTS, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.first(x), self.centres, compute_mode="donot_use_mm_for_euclid_dist")


class _Asks(torch.autograd.Function):
    """Doubles; its backward pass looks at the values, which a batch of passes has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * g if float(g.sum()) < 1e9 else g


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Asks.apply(self.first(x)))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, groups=2), nn.GELU(),
        nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, OUTPUTS),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, OUTPUTS)), (5, 3), True),
    "cnn": (cnn, (5, 2, 8, 8), True),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, OUTPUTS)), (5, 3), True),
    "distances": (Distances, (5, 3), False),
    "a backward pass that asks for values": (Asking, (5, 3), False),
}


class _Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_passes_is_used_where_it_is_right(name: str) -> None:
    make, shape, right = MODELS[name]
    module, x = placed(make().eval(), torch.randn(*shape))
    points = read_capture_points(Network(module), x)
    assert points is not None
    assert points.batched is right, name
    assert all(found.factor.outputs == OUTPUTS for found in Capture(Network(module), x, points=points).factors()), name


def test_no_operation_is_called_once_per_output() -> None:
    module, x = placed(cnn().eval(), torch.randn(5, 2, 8, 8))
    network = Network(module)
    points = read_capture_points(network, x)
    with _Calls() as forward:
        capture = Capture(network, x, points=points)
    with _Calls() as backward:
        list(capture.factors())
    many = {op: count for op, count in backward.of.items() if "backward" in op and count > 4}
    assert not many, f"of {OUTPUTS} outputs and at most two nodes of a kind: {many}"
    assert backward.of["convolution_backward"] <= 2 * forward.of["convolution"]
