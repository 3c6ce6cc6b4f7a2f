"""Promise 19: spectra are honest. What is not flagged is right to 10 %, for conditions 1e2 … 1e12 and every type."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, empirical_ntk, metrics
from ntkwatch.engines.base import at_hand, noise_floor
from ntkwatch.engines.functional import Functional
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from tests.support.device import placed

CONDITIONS = (1e2, 1e4, 1e6, 1e8, 1e10, 1e12)
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
N = 12


def orthogonal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))[0].T


def conditioned(condition: float, width: int = 48) -> Tensor:
    """[n, width] whose Gram has eigenvalues from 1 down to 1/condition, evenly in the logarithm."""
    singular = torch.logspace(0, -math.log10(condition) / 2, N, dtype=torch.float64)
    return orthogonal(N, N) * singular @ orthogonal(N, width)


def linear(condition: float) -> tuple[nn.Module, Tensor]:
    return nn.Linear(48, 3, bias=False), conditioned(condition)


def deep_linear(condition: float) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(48, 48, bias=False), nn.Linear(48, 3, bias=False)), conditioned(condition)


def near_duplicates(condition: float, shape: tuple[int, ...]) -> Tensor:
    """Pairs of probes so close that the kernel's condition is about as asked."""
    x = torch.randn(N // 2, *shape, dtype=torch.float64)
    return torch.cat([x, x + condition**-0.5 * torch.randn(x.shape, dtype=torch.float64)])


def tanh(condition: float) -> tuple[nn.Module, Tensor]:
    layers = [m for _ in range(3) for m in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 3)), near_duplicates(condition, (32,))


def convolutions(condition: float) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    return net, near_duplicates(condition, (2, 6, 6))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(1))


def attention(condition: float) -> tuple[nn.Module, Tensor]:
    return Attention(), near_duplicates(condition, (5, 16))


MODELS: tuple[Callable[[float], tuple[nn.Module, Tensor]], ...] = (
    linear,
    deep_linear,
    tanh,
    convolutions,
    attention,
)


def smallest(module: nn.Module, x: Tensor, engine: Any, precision: Any) -> tuple[float, float, float]:
    """λ_min and λ_max of the trace kernel, and the noise floor."""
    with leave_no_trace(module):
        kernel = engine.kernel(Network(module), x, precision=precision, layers=None)
    spectrum = torch.linalg.eigvalsh(kernel.value.double())
    return float(spectrum[0]), float(spectrum[-1]), kernel.noise_floor


def exact(module: nn.Module, x: Tensor) -> float:
    """λ_min/λ_max in float64, at the very numbers that `module` and `x` hold; the linear one by its singular values."""
    if isinstance(module, nn.Linear):
        singular = torch.linalg.svdvals(x.double())
        return float((singular[-1] / singular[0]) ** 2)
    low, high, _ = smallest(copy.deepcopy(module).double(), x.double(), Layerwise(), "double")
    return low / high


def table(make: Callable[[float], tuple[nn.Module, Tensor]], engine: Any) -> list[tuple[Any, ...]]:
    rows = []
    for condition in CONDITIONS:
        torch.manual_seed(0)
        module, x = make(condition)
        for dtype in TYPES:
            here, batch = placed(copy.deepcopy(module.double().eval()).to(dtype), x.to(dtype))
            right = exact(here, batch)
            for precision in ("double", "single"):
                low, high, floor = smallest(here, batch, engine, precision)
                flagged = bool(metrics.smallest_eigenvalue(torch.tensor([high, low]), floor=floor * high).isnan())
                off = abs(low / high / right - 1)
                name = str(dtype).removeprefix("torch.")
                rows.append((make.__name__, condition, name, precision, right, low / high, off, floor, flagged))
    return rows


@pytest.mark.parametrize("make", MODELS, ids=[m.__name__ for m in MODELS])
def test_what_is_not_flagged_is_right(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(make, Layerwise())
    with capsys.disabled():
        print(f"\npromise 19, {make.__name__}\ncondition  type      products  λ_min/λ_max   found     off    floor")
        for _, condition, name, precision, right, found, off, floor, flagged in rows:
            numbers = f"{right:9.1e}  {found:9.1e} {off:7.0%} {floor:8.1e}"
            print(f"{condition:9.0e}  {name:8s}  {precision:8s}  {numbers}{'  flagged' if flagged else ''}")
    assert any(row[-1] and row[6] > 0.1 for row in rows), f"{make.__name__}: nothing here had to be flagged"
    for row in rows:
        _, condition, name, precision, right, _, off, floor, flagged = row
        where = f"{make.__name__} at {condition:.0e}, {name}, {precision}"
        assert flagged or off <= 0.1, f"{where}: λ_min is off by {off:.0%} and not flagged"
        assert not flagged or right < 2 * floor, f"{where}: λ_min is {right / floor:.1f} floors and flagged"
    seen = {(name, precision) for *_, name, precision, _, _, _, _, flagged in rows if not flagged}
    assert {("float64", "double"), ("float32", "double"), ("float32", "single")} <= seen


def test_the_other_engine_is_as_honest() -> None:
    for make in (linear, tanh):
        for row in table(make, Functional()):
            assert row[-1] or row[6] <= 0.1, f"functional, {row}"


def test_floors_are_published() -> None:
    eps = {dtype: torch.finfo(dtype).eps for dtype in TYPES}
    assert noise_floor(torch.float64, "double") == 20 * eps[torch.float64]
    assert noise_floor(torch.float32, "single") == 20 * eps[torch.float32]
    for dtype in TYPES:
        assert noise_floor(dtype, "double") >= 10 * eps[dtype]
    assert at_hand("double", torch.device("cpu")) == "double"
    assert at_hand("double", torch.device("mps")) == "single"  # no float64 there


def test_long_sums_keep_their_digits() -> None:
    torch.manual_seed(0)
    net, x = placed(nn.Sequential(nn.Linear(300, 2000), nn.Tanh(), nn.Linear(2000, 2)).eval(), torch.randn(6, 300))
    right = smallest(copy.deepcopy(net).double(), x.double(), Layerwise(), "double")
    for engine in (Layerwise(), Functional()):
        found = smallest(net, x, engine, "single")
        assert abs(found[1] / right[1] - 1) < found[2], f"{engine.name}: {found[1]} {right[1]}"


class Mixed(nn.Module):
    """A body and a head of types of their own."""

    def __init__(self, body: torch.dtype, head: torch.dtype, outputs: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()).to(body)
        self.head, self.types = nn.Linear(64, 3).to(head), (body, head, outputs)

    def forward(self, x: Tensor) -> Tensor:
        body, head, outputs = self.types
        return self.head(self.body(x.to(body)).to(head)).to(outputs)


@pytest.mark.parametrize(
    "types",
    [
        (torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_models_of_several_types_are_judged_by_the_coarsest(types: tuple[torch.dtype, ...]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        module, x = placed(Mixed(*types).eval(), torch.randn(64, 20))
        coarsest = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        for engine in (Layerwise(), Functional()):
            kernel = engine.kernel(Network(module), x)
            assert kernel.noise_floor == noise_floor(coarsest, at_hand("double", x.device)), engine.name
        assert empirical_ntk(module, x).isfinite().all(), "not refused for its rounding"
        monitor = Monitor(module, (x, torch.arange(64) % 3), diagnostics="full", loss=nn.functional.cross_entropy)
        assert monitor.measure(0).metrics["log10_lambda_max"] is not None
