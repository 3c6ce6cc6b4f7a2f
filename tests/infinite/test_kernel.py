"""Known answers of infinitely wide networks, laws, degenerate inputs, and refusals."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor

from ntkwatch import infinite
from ntkwatch.infinite import Conv, Dense, Erf, Flatten, GlobalAvgPool, Relu, Residual, Serial
from tests.bench.neural_tangents import our_kernel
from tests.support import SUPPORT

FROZEN = json.loads((SUPPORT / "infinite_neural_tangents.json").read_text())


def relu_net(depth: int, readout: float = math.sqrt(2)) -> Serial:
    return Serial(*[Dense(math.sqrt(2)), Relu()] * depth, Dense(readout))


def circle(*degrees: float) -> Tensor:
    """Unit vectors of two dimensions, scaled so that ⟨x, x⟩/d = 1 becomes the SCIENCE's x·x after Dense(√2)."""
    t = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([t.cos(), t.sin()], dim=1)


RELU = {  # depth: the NTK at 0°, 60°, 90°, 120°, 180°
    1: (2, 0.942331114378, 0.318309886184, -0.057668885622, 0),
    2: (3, 1.351479561123, 0.685708636283, 0.343862246273, 0.318309886184),
    3: (4, 1.737844679215, 1.060388106803, 0.742249322561, 0.685708636283),
    5: (6, 2.462893132458, 1.792195966845, 1.507106801986, 1.430390497210),
}


@pytest.mark.parametrize("depth", RELU)
def test_relu_network(depth: int) -> None:
    x = circle(0, 60, 90, 120, 180)
    got = infinite.kernel(relu_net(depth), x[:1], x).ntk[0]
    assert got[0] == pytest.approx(RELU[depth][0], abs=1e-7)
    assert got[1:].tolist() == pytest.approx(RELU[depth][1:], abs=1e-10)
    half = infinite.kernel(relu_net(depth, 1.0), x[:1], x).ntk[0]
    assert torch.allclose(half * 2, got, atol=1e-14), "a readout variance of 1 is exactly half"


def test_relu_nngp() -> None:
    x = circle(0, 60)
    got = [float(infinite.kernel(relu_net(depth, 1.0), x).nngp[0, 1]) for depth in (1, 2, 3)]
    assert got == pytest.approx([0.304498890522, 0.341952825449, 0.369064096151], abs=1e-10)


def test_erf_network() -> None:
    def layer() -> Dense:
        return Dense(math.sqrt(1.5), math.sqrt(0.05))

    x = circle(0, 60)
    for depth, diagonal, off in ((1, 1.428530612834, 0.698375848029), (2, 2.050012974231, 0.945269096042)):
        k = infinite.kernel(Serial(*[layer(), Erf()] * depth, layer()), x)
        assert k.ntk[0, 0] == pytest.approx(diagonal, abs=1e-10)
        assert k.ntk[0, 1] == pytest.approx(off, abs=1e-10)
        if depth == 1:
            assert k.nngp[0].tolist() == pytest.approx([0.682997874081, 0.368035413393], abs=1e-10)


def test_four_points() -> None:
    x = torch.tensor([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0], [0, 0, 1]], dtype=torch.float64) * math.sqrt(1.5)
    k = infinite.kernel(relu_net(1), x).ntk
    expected = [0.310427554756, 1.681690113816, 1.876335879098, 4.131546452330]
    assert torch.linalg.eigvalsh(k).tolist() == pytest.approx(expected, abs=1e-9)
    # H^∞ is the first layer's part: the derivative dual times the input kernel
    h = infinite.kernel(Serial(Dense(math.sqrt(2)), Relu(), Dense(1.0, w_grad=0.0)), x).ntk
    y = torch.tensor([1, -1, 1, -1], dtype=torch.float64)
    assert torch.linalg.eigvalsh(h).tolist() == pytest.approx([0.118060764659, 0.5, 0.5, 0.881939235341], abs=1e-9)
    assert math.sqrt(2 * float(y @ torch.linalg.solve(h, y)) / 4) == pytest.approx(2.5561983693297, abs=1e-7)


IMAGES = torch.tensor(
    [[[1.8, 0.4, 1], [2.2, 1.9, -1], [1, -0.2, -0.1]], [[0.4, 0.1, 1.5], [0.8, 0.1, 0.4], [0.3, 1.5, -0.2]]],
    dtype=torch.float64,
)[:, None]


def test_convolutional_network() -> None:
    spec = Serial(*[Conv(3, w_std=math.sqrt(2)), Relu()] * 2, Flatten(), Dense())
    k = infinite.kernel(spec, IMAGES).ntk
    assert [k[0, 0], k[0, 1], k[1, 1]] == pytest.approx([2.138024691358, 0.469443010360, 0.704074074074], abs=1e-7)
    assert k[0, 1] == pytest.approx(0.469443010360, abs=1e-10)


def test_diagonal_positions_are_enough_for_flatten() -> None:
    """AvgPool(1) changes nothing but asks for all pairs of positions."""
    layers = [Conv(3, 2, w_std=1.3, b_std=0.2), Relu(), Conv(2, padding="circular"), Erf()]
    few = infinite.kernel(Serial(*layers, Flatten(), Dense()), IMAGES)
    all_pairs = infinite.kernel(Serial(*layers, infinite.AvgPool(1), Flatten(), Dense()), IMAGES)
    assert torch.allclose(few.ntk, all_pairs.ntk, atol=1e-14)
    assert torch.allclose(few.nngp, all_pairs.nngp, atol=1e-14)


def test_conditioning_with_depth() -> None:
    x = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    x = x @ torch.tensor([[1, 0.3, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0.3], [0, 0, 0, 1]], dtype=torch.float64)
    x = 2 * x / x.norm(dim=1, keepdim=True)

    def condition(activation: infinite.Layer, w: float, b: float, depth: int) -> float:
        dense = Dense(math.sqrt(w), math.sqrt(b))
        k = infinite.kernel(Serial(*[dense, activation] * depth, dense), x).ntk
        return float(torch.linalg.cond(k))

    ordered = [condition(Erf(), 0.5, 0.5, d) for d in (4, 8, 16, 32)]
    assert all(b > 5 * a for a, b in itertools.pairwise(ordered)), f"ordered grows: {ordered}"
    chaotic = [condition(Erf(), 6.0, 0.0, d) for d in (4, 8, 16, 32)]
    assert chaotic[-1] == pytest.approx(1, abs=1e-3), f"chaotic tends to 1: {chaotic}"
    relu = [condition(Relu(), 2.0, 0.0, d) for d in (16, 64, 256, 1024)]
    assert all(b < a for a, b in itertools.pairwise(relu)), f"ReLU falls: {relu}"
    assert relu[-1] == pytest.approx(7 / 3, rel=0.03), f"to (n+3)/3: {relu}"
    k = infinite.kernel(Serial(*[Dense(math.sqrt(2)), Relu()] * 1024, Dense(math.sqrt(2))), x).ntk
    assert float(k[0, 1] / k[0, 0]) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("case", FROZEN, ids=lambda c: c["name"])
def test_neural_tangents(case: dict) -> None:
    """Values of neural-tangents 0.6.5, frozen by tests/bench/neural_tangents.py."""
    k = our_kernel(case)
    for mine, name in ((k.nngp, "nngp"), (k.ntk, "ntk")):
        expected = torch.tensor(case[name], dtype=torch.float64)
        assert float((mine - expected).abs().max() / expected.abs().max()) < 1e-6, f"{case['name']}: {name}"


SPECS: dict[str, tuple[Serial, tuple[int, ...]]] = {
    "mlp": (relu_net(3), (6,)),
    "deep": (relu_net(100), (6,)),
    "deep erf": (Serial(*[Dense(1.5, 0.1), Erf()] * 100, Dense()), (6,)),
    "leaky": (Serial(*[Dense(1.2, 0.1), infinite.LeakyRelu(0.1)] * 3, Dense()), (6,)),
    "gelu": (Serial(*[Dense(1.4), infinite.Gelu()] * 3, Dense()), (6,)),
    "sin": (Serial(*[Dense(1.4), infinite.Sin()] * 3, Dense()), (6,)),
    "tanh": (Serial(*[Dense(1.4), infinite.Activation(torch.tanh)] * 2, Dense()), (6,)),
    "layer norm": (Serial(Dense(), infinite.LayerNorm(0.0), Relu(), infinite.LayerNorm(0.0), Dense()), (6,)),
    "stream": (Serial(Dense(1.4), Relu(), Residual(Dense()), Relu(), Flatten(), Dense()), (6,)),
    "residual": (Serial(Dense(), Residual(Relu(), Dense(), infinite.Abs()), infinite.LayerNorm(), Dense()), (6,)),
    "cnn": (Serial(*[Conv(3, 2, 1, 1.4), Relu()] * 2, Flatten(), Dense()), (2, 5, 5)),
    "cntk": (Serial(*[Conv(3, w_std=1.4), Relu()] * 2, GlobalAvgPool(), Dense()), (2, 4, 4)),
    "series": (Serial(Conv(3, w_std=1.4), Relu(), Flatten(), Dense()), (2, 6)),
    "attention": (Serial(Dense(), Residual(infinite.LayerNorm(), infinite.Attention()), Flatten(), Dense()), (4, 3)),
    "linear attention": (Serial(infinite.Attention("linear"), infinite.GlobalAvgPool(), Dense()), (4, 3)),
}


def degenerate(shape: tuple[int, ...]) -> Tensor:
    """Duplicates, antipodes, parallels, near-duplicates, zeros, huge and tiny inputs."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tiny = x[:1] + 1e-9 * x[1:2]
    return torch.cat([x, x[:1], -x[:1], 2 * x[:1], tiny, torch.zeros_like(x[:2]), 1e6 * x[1:2], 1e-9 * x[2:]])


@pytest.mark.parametrize("name", SPECS)
def test_degenerate_inputs(name: str) -> None:
    spec, shape = SPECS[name]
    x = degenerate(shape)
    k = infinite.kernel(spec, x)
    rescaled = infinite.kernel(spec, x[:9])
    for which, value in (("nngp", k.nngp), ("ntk", k.ntk)):
        assert torch.isfinite(value).all(), f"{name}: {which} is not finite"
        assert torch.equal(value, value.T), f"{name}: {which} is not symmetric"
    for which, value in (("nngp", rescaled.nngp), ("ntk", rescaled.ntk)):
        values = torch.linalg.eigvalsh(value)
        if k.samples:
            continue  # positive to its Monte Carlo error only
        floor = len(value) * torch.finfo(torch.float64).eps * float(values[-1])
        assert float(values[0]) >= -10 * floor, f"{name}: {which} has eigenvalue {float(values[0]):.2e} < -{floor:.2e}"


@pytest.mark.parametrize("channels", [6, 37, 333])
def test_equal_inputs_stay_equal_in_a_chaotic_network(channels: int) -> None:
    """Their cosine is 1 exactly: a rounding error of the first product would have grown to 1e-8 in thirty layers."""
    x = torch.randn(40, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = infinite.kernel(Serial(*[Dense(2.5, 0.1), Erf()] * 30, Dense()), torch.cat([x, x[:1]]))
    for value in (k.nngp, k.ntk):
        assert float((value[0] - value[-1]).abs().max() / value.abs().max()) < 1e-12


def test_branches_that_end_in_activations_are_correlated_by_their_means() -> None:
    """E[(h + g)(h' + g')] of independent branches alike: 2 E[hh'] + 2 E[h] E[h']; of ReLU, E[h] = √(q/2π)."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    branch = Serial(Dense(1.3, 0.2), Relu())
    one, both = infinite.kernel(branch, x), infinite.kernel(infinite.Sum(branch, branch), x)
    mean = ((1.3**2 * x.square().mean(1) + 0.2**2) / (2 * math.pi)).sqrt()
    torch.testing.assert_close(both.nngp, 2 * one.nngp + 2 * mean[:, None] * mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(both.ntk, 2 * one.ntk, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SPECS)
def test_two_sets_and_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of two sets is a block of the kernel of both; blocks of any size give the same."""
    spec, shape = SPECS[name]
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, part = infinite.kernel(spec, x), infinite.kernel(spec, x[:4], x[4:])
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("ntkwatch.infinite.kernels.BLOCK_ENTRIES", {"cpu": 5, "other": 5})
    small = infinite.kernel(spec, x, progress=lambda done, total: seen.append((done, total)))
    scale = float(whole.ntk.abs().max())
    assert torch.allclose(part.ntk, whole.ntk[:4, 4:], atol=1e-9 * scale), name
    assert torch.allclose(part.nngp, whole.nngp[:4, 4:], atol=1e-9 * scale), name
    assert torch.allclose(small.ntk, whole.ntk, atol=1e-7 * scale), name
    assert len(seen) > 1
    assert seen[-1] == (45, 45)


def test_float32_inputs_are_computed_in_float64() -> None:
    x = torch.randn(4, 3)
    k = infinite.kernel(relu_net(2), x)
    assert k.ntk.dtype == torch.float64
    assert torch.equal(k.ntk, infinite.kernel(relu_net(2), x.double()).ntk)
    assert infinite.kernel(relu_net(2), x, dtype=torch.float32).ntk.dtype == torch.float32


def test_standard_parametrization_is_a_choice_of_gradients() -> None:
    """torch's default: variance 1/(3 fan_in), every weight's gradient counts once."""
    x = torch.randn(3, 5, dtype=torch.float64)
    spec = Serial(Dense(1 / math.sqrt(3), 1 / math.sqrt(15), w_grad=5, b_grad=1))
    k = infinite.kernel(spec, x)
    assert torch.allclose(k.ntk, x @ x.T + 1)
    assert torch.allclose(k.nngp, (x @ x.T + 1) / 15)


def test_streams_of_residual_networks() -> None:
    """Quasi-Monte Carlo where a closed form exists too: relu(relu(h)) = |relu(h)| = relu(h)."""
    x = degenerate((6,))[:9]
    single = infinite.kernel(Serial(Dense(1.4, 0.3), Relu(), Dense()), x)
    assert single.samples == 0
    for again in (Relu(), infinite.Abs()):
        k = infinite.kernel(Serial(Dense(1.4, 0.3), Relu(), again, Dense()), x)
        assert k.samples == 512
        for mine, exact in ((k.nngp, single.nngp), (k.ntk, single.ntk)):
            assert torch.equal(mine, mine.T)
            assert float((mine - exact).norm() / exact.norm()) < 0.01
    fine = infinite.kernel(Serial(Dense(1.4, 0.3), Relu(), Relu(), Dense()), x, samples=8192)
    assert float((fine.ntk - single.ntk).norm() / single.ntk.norm()) < 1e-3


def test_streams_match_their_definition() -> None:
    """relu(g + relu(h)) by brute force."""
    w, b, x = 1.4, 0.3, circle(20, 65)
    k = infinite.kernel(Serial(Dense(w, b), Relu(), Residual(Dense(w, b)), Relu(), Dense()), x, samples=4096).nngp
    h = infinite.kernel(Serial(Dense(w, b)), x).nngp
    g = infinite.kernel(Serial(Dense(w, b), Relu(), Dense(w, b)), x).nngp
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 2, 10**6, generator=generator, dtype=torch.float64)
    u = torch.relu(torch.linalg.cholesky(g) @ z[0] + torch.relu(torch.linalg.cholesky(h) @ z[1]))
    assert torch.allclose(k, u @ u.T / u.shape[1], rtol=0.006)


REFUSALS = {
    "ends with positions": (Serial(Conv(3), Relu()), (1, 4, 4)),
    "needs Gaussian inputs": (Serial(Relu(), Dense()), (4,)),
    "needs positions": (Serial(Dense(), GlobalAvgPool(), Dense()), (4,)),
    "different positions": (Serial(Residual(Conv(3, 2)), Flatten()), (1, 4, 4)),
    "larger than its padded input": (Serial(Conv(7, padding="valid"), Flatten()), (1, 4, 4)),
    "dimensions": (Serial(Conv((3, 3)), Flatten()), (1, 4)),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message: str) -> None:
    spec, shape = REFUSALS[message]
    with pytest.raises(ValueError, match=message):
        infinite.kernel(spec, torch.ones(2, *shape))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="1/√d-scaled logits has no closed form"):
        infinite.Attention("sqrt")
    with pytest.raises(ValueError, match="correlated"):
        Residual(Relu())
    with pytest.raises(ValueError, match="padding"):
        Conv(3, padding="reflect")
    with pytest.raises(ValueError, match="w_std"):
        Dense(-1.0)
    with pytest.raises(ValueError, match="not finite"):
        infinite.kernel(relu_net(1), torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(ValueError, match="differ"):
        infinite.kernel(relu_net(1), torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(TypeError, match="tensor"):
        infinite.kernel(relu_net(1), [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers such as"):
        Serial(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["relu", "leaky", "abs", "erf", "gelu", "sin", "tanh"])
def test_depth_one_hundred(name: str) -> None:
    """Duplicates, antipodes, zeros, huge and tiny inputs through 100 layers of every activation."""
    activation = {
        "relu": Relu(),
        "leaky": infinite.LeakyRelu(0.1),
        "abs": infinite.Abs(),
        "erf": Erf(),
        "gelu": infinite.Gelu(),
        "sin": infinite.Sin(),
        "tanh": infinite.Activation(torch.tanh),
    }[name]
    k = infinite.kernel(Serial(*[Dense(1.4, 0.1), activation] * 100, Dense()), degenerate((6,))[:9])
    for which, value in (("nngp", k.nngp), ("ntk", k.ntk)):
        assert torch.isfinite(value).all(), f"{name}: {which} is not finite"
        assert torch.equal(value, value.T), f"{name}: {which} is not symmetric"
        assert torch.allclose(value[0], value[3], rtol=1e-9), f"{name}: {which} tells duplicates apart"
        values = torch.linalg.eigvalsh(value)
        floor = 9 * torch.finfo(torch.float64).eps * float(values[-1])
        assert float(values[0]) >= -10 * floor, f"{name}: {which} has eigenvalue {float(values[0]):.2e} < -{floor:.2e}"


def test_blocks_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that an activation works on holds more entries than a block, or than one pair of inputs."""
    seen: list[int] = []
    dual = infinite.ABRelu.dual

    def watched(self: infinite.ABRelu, k: Tensor, *rest: object) -> object:
        seen.append(k.numel())
        return dual(self, k, *rest)  # type: ignore[arg-type]

    def largest(*shape: int, n: int = 12, budget: int = 1000, pool: bool = False) -> int:
        monkeypatch.setattr("ntkwatch.infinite.kernels.BLOCK_ENTRIES", {"cpu": budget, "other": budget})
        seen.clear()
        readout = GlobalAvgPool() if pool else Flatten()
        infinite.kernel(Serial(Conv(3), Relu(), readout, Dense()), torch.randn(n, *shape))
        return max(seen)

    monkeypatch.setattr(infinite.ABRelu, "dual", lambda self, k, *a, **kw: watched(self, k, *a, *kw.values()))
    assert largest(1, 4, 4) <= 1000
    assert largest(1, 4, 4, pool=True) <= 1000
    assert largest(1, 4, 4, n=40) <= 1000, "not with the number of inputs"
    assert largest(1, 8, 8, pool=True) == 64**2, "one pair of inputs at least"
    assert largest(1, 4, 4, n=40, budget=10**9) > 1000, "the watch can see"


ODD: dict[str, tuple[tuple[int, ...], Serial]] = {
    "one channel": ((4, 1), relu_net(2)),
    "one row": ((1, 3), relu_net(2)),
    "one pixel": ((2, 3, 1, 1), Serial(Conv(3), Relu(), GlobalAvgPool(), Dense())),
    "not square, even windows": (
        (3, 2, 4, 7),
        Serial(Conv((2, 4), (1, 2)), Relu(), Conv(2, padding="circular"), Flatten(), Dense()),
    ),
    "a window larger than the image, wrapped": ((3, 2, 2, 3), Serial(Conv(5, padding="circular"), Flatten(), Dense())),
    "a stride longer than the image": ((3, 2, 2, 3), Serial(Conv(3, 7), Relu(), Flatten(), Dense())),
    "no layer": ((3, 4), Serial()),
    "one token": ((3, 1, 4), Serial(infinite.Attention(), Relu(), GlobalAvgPool(), Dense())),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str) -> None:
    shape, spec = ODD[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    k = infinite.kernel(spec, x)
    assert k.ntk.shape == (shape[0], shape[0]), name
    assert torch.isfinite(k.ntk).all(), name
    both = infinite.kernel(spec, x, x.double()[:1])
    assert torch.allclose(both.ntk, k.ntk[:, :1], atol=1e-7), f"{name}: x2 of another type and number"


BAD_INPUTS: dict[str, tuple[Tensor, str]] = {
    "one dimension": (torch.ones(3), r"got \[3\]"),
    "five dimensions": (torch.ones(1, 1, 1, 1, 1), r"\[n, C, H, W\]"),
    "no rows": (torch.ones(0, 3), "not empty"),
    "no channels": (torch.ones(3, 0), "not empty"),
    "complex": (torch.ones(2, 3, dtype=torch.complex64), "real numbers"),
    "no data": (torch.ones(2, 3, device="meta"), "on meta"),
    "infinite": (torch.full((2, 3), math.inf), "not finite"),
    "squares that overflow": (torch.full((2, 3), 1e200, dtype=torch.float64), "overflows"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(name: str) -> None:
    x, message = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=message):
        infinite.kernel(relu_net(1), x)


def test_inputs_on_two_devices() -> None:
    with pytest.raises(ValueError, match="x1 is on cpu and x2 on meta"):
        infinite.kernel(relu_net(1), torch.ones(2, 3), torch.ones(2, 3, device="meta"))
