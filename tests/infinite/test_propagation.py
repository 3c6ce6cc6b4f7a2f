"""Signal propagation: phases and conditioning with depth have known answers; advice says what is the matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import infinite
from ntkwatch.infinite import Conv, Dense, Erf, Flatten, GlobalAvgPool, Relu, Residual, Serial, signal_propagation


def four_points() -> Tensor:
    """Four vectors of ⟨x, x⟩/d = 1 at different angles."""
    x = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    x = x @ torch.tensor([[1, 0.3, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0.3], [0, 0, 0, 1]], dtype=torch.float64)
    return 2 * x / x.norm(dim=1, keepdim=True)


def deep(activation: infinite.Layer, w: float, b: float, depth: int = 32) -> Serial:
    dense = Dense(math.sqrt(w), math.sqrt(b))
    return Serial(*[dense, activation] * depth, dense)


def test_the_three_phases() -> None:
    """SCIENCE 3.11: ordered grows without bound, chaotic tends to 1, ReLU falls to (n + 3)/3."""
    found = {
        name: signal_propagation(deep(activation, w, b), four_points())
        for name, activation, w, b in (
            ("ordered", Erf(), 0.5, 0.5),
            ("chaotic", Erf(), 6.0, 0.0),
            ("critical", Relu(), 2.0, 0.0),
        )
    }
    for name, p in found.items():
        assert p.phase == name, f"{name}: χ = {p.chi}"
        assert p.advice.lower().startswith(name)
        assert len(p.stages) == 33
    conditions = [s.condition for s in found["ordered"].stages]
    assert all(b > 2 * a for a, b in itertools.pairwise(conditions[2:28])), f"ordered grows: {conditions}"
    assert found["chaotic"].stages[-1].condition == pytest.approx(1, abs=1e-3)
    relu = [s.condition for s in found["critical"].stages]
    assert all(b < a for a, b in itertools.pairwise(relu[12:])), f"ReLU falls: {relu}"
    assert relu[-1] > 7 / 3
    assert found["critical"].chi == pytest.approx(1, abs=1e-9)


def test_conditions_are_those_of_the_kernel() -> None:
    x = four_points()
    p = signal_propagation(deep(Erf(), 1.5, 0.1, 3), x)
    for depth in (1, 2, 3):
        k = infinite.kernel(deep(Erf(), 1.5, 0.1, depth), x)
        assert p.stages[depth].condition == pytest.approx(float(torch.linalg.cond(k.ntk)), rel=1e-9), depth
        assert p.stages[depth].variance == pytest.approx(float(k.nngp.diagonal().mean()), rel=1e-12), depth


def test_chi_is_its_definition() -> None:
    """χ = w²·E[φ'(h)²] at the variance before the activation, by quadrature over h."""
    z, step = torch.linspace(-12, 12, 20001, dtype=torch.float64, requires_grad=False), 24 / 20000
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * step
    p = signal_propagation(deep(Erf(), 1.7, 0.2, 4), four_points())
    for before, after in itertools.pairwise(p.stages):
        h = math.sqrt(before.variance) * z
        slope = 2 / math.sqrt(math.pi) * torch.exp(-h * h)
        assert after.chi == pytest.approx(1.7 * float((density * slope.square()).sum()), rel=1e-9)


def test_a_module_at_its_own_initialisation() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(64, 64), nn.ReLU())]
    default = nn.Sequential(*layers, nn.Linear(64, 3))
    x = torch.randn(8, 64)
    p = signal_propagation(default, x)
    assert p.phase == "ordered"
    assert p.chi == pytest.approx(1 / 6), "torch's default shrinks gradients sixfold a ReLU layer"
    assert p.depth_scale == pytest.approx(1 / math.log(6))
    assert "Kaiming" in p.advice
    for m in layers:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)
    assert signal_propagation(default, x).phase == "critical"


def test_positions_residuals_and_attention() -> None:
    image, tokens = torch.randn(4, 2, 5, 5), torch.randn(4, 3, 5)
    cnn = Serial(*[Conv(3, w_std=math.sqrt(2)), Relu()] * 6, GlobalAvgPool(), Dense())
    assert len(signal_propagation(cnn, image).stages) == 7
    stream = Serial(Dense(), *[Residual(Relu(), Dense(math.sqrt(2)))] * 6, Relu(), Dense())
    p = signal_propagation(Serial(Flatten(), stream), image)
    assert p.stages[-2].variance == pytest.approx(p.stages[0].variance * 2**6, rel=1e-9), "the stream doubles"
    assert p.phase == "critical", "a stream's χ counts relative to its growth"
    transformer = Serial(Dense(), Residual(infinite.LayerNorm(), infinite.SoftmaxAttention()), GlobalAvgPool(), Dense())
    assert signal_propagation(transformer, tokens).rank == 4


def test_duplicates_take_rank() -> None:
    x = four_points()
    p = signal_propagation(deep(Relu(), 2.0, 0.0, 2), torch.cat([x, x[:1]]))
    assert (p.rank, p.n) == (4, 5)
    assert math.isinf(p.stages[-1].condition)
    assert "1 cannot be fitted apart" in p.advice


def test_degenerate_networks() -> None:
    linear = signal_propagation(Dense(), four_points())
    assert linear.phase == "linear"
    assert linear.chi is None
    assert math.isinf(linear.depth_scale)
    dead = signal_propagation(deep(Relu(), 0.0, 0.0, 3), four_points())
    assert (dead.phase, dead.rank) == ("ordered", 0)
    assert "χ = 0" in dead.advice
    assert signal_propagation(deep(Relu(), 2.0, 0.0, 3), four_points()[:1]).rank == 1
    with pytest.raises(ValueError, match="no layer with weights"):
        signal_propagation(Serial(), four_points())
    with pytest.raises(infinite.ConversionError, match="LSTM"):
        signal_propagation(nn.Sequential(nn.LSTM(4, 4)), four_points())


def test_the_table() -> None:
    text = str(signal_propagation(deep(Erf(), 6.0, 0.0, 6), four_points()))
    assert "condition" in text
    assert text.count("Dense") == 7
    assert "Chaotic" in text


# ── cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_nominal_seconds_grow_as_the_work_does() -> None:
    net, pooled = deep(Relu(), 2.0, 0.0, 5), Serial(Conv(3), Relu(), Conv(3), Relu(), GlobalAvgPool(), Dense())
    flat = Serial(Conv(3), Relu(), Conv(3), Relu(), Flatten(), Dense())
    cost = infinite.nominal_seconds
    assert cost(net, torch.ones(200, 4)) / cost(net, torch.ones(100, 4)) == pytest.approx(4, rel=0.02)
    assert cost(net, torch.ones(200, 4), torch.ones(50, 4)) == pytest.approx(
        cost(net, torch.ones(200, 4)) * 200 * 50 / 20100
    )
    assert cost(deep(Relu(), 2.0, 0.0, 10), torch.ones(9, 4)) / cost(net, torch.ones(9, 4)) > 1.8
    for spec, power in ((flat, 1), (pooled, 2)):
        ratio = cost(spec, torch.ones(9, 1, 16, 16)) / cost(spec, torch.ones(9, 1, 8, 8))
        assert ratio == pytest.approx(4**power, rel=0.05)
    huge = torch.empty(64, 3, 224, 224, device="meta")
    assert cost(pooled, huge) > 1e3, "nothing is computed, whatever the size"
    with pytest.raises(ValueError, match="not empty"):
        cost(net, torch.ones(4))
    with pytest.raises(ValueError, match="needs positions"):
        cost(pooled, torch.ones(4, 3))


@pytest.mark.soak
def test_nominal_seconds_are_within_a_factor_of_a_few() -> None:
    import statistics
    import time

    relu = [Dense(1.4), Relu()]
    cases: dict[str, tuple[Serial, tuple[int, ...]]] = {
        "dense": (Serial(*relu * 5, Dense()), (1500, 64)),
        "tanh": (Serial(*[Dense(1.4), infinite.Activation(torch.tanh)] * 2, Dense()), (400, 64)),
        "flatten": (Serial(*[Conv(3), Relu()] * 4, Flatten(), Dense()), (96, 3, 16, 16)),
        "pooling": (Serial(*[Conv(3), Relu()] * 4, GlobalAvgPool(), Dense()), (48, 1, 8, 8)),
        "stream": (Serial(*relu, Residual(Dense(1.4)), Relu(), Dense()), (128, 8)),
        "softmax": (Serial(Dense(), infinite.SoftmaxAttention(head_size=16), GlobalAvgPool(), Dense()), (8, 8, 8)),
    }
    ratios = {}
    for name, (spec, shape) in cases.items():
        x, began = torch.randn(*shape, dtype=torch.float64), time.process_time()
        infinite.kernel(spec, x, generator=torch.Generator().manual_seed(0))
        spent, nominal = time.process_time() - began, infinite.nominal_seconds(spec, x)
        print(f"{name}: nominal {nominal:.3f} s, spent {spent:.3f} s")
        ratios[name] = nominal / spent
    usual = statistics.median(ratios.values())  # how fast this machine is, and how busy
    assert all(1 / 10 < ratio / usual < 10 for ratio in ratios.values()), ratios
