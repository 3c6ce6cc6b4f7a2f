"""Softmax attention at 1/√d: the Monte Carlo against exact limits and wide networks, and its error bar."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import empirical_ntk, infinite
from ntkwatch.infinite import ConversionError, Dense, GlobalAvgPool, Serial, SoftmaxAttention
from tests.support.modules_attention import Block, Encoder, Fused, Masked, MultiHead, Permuted, Three

X = 2 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spec(head_size: int | None = None, causal: bool = False, gain: float = 1.5) -> Serial:
    attention = SoftmaxAttention(Dense(gain), Dense(gain), Dense(), Dense(), head_size, causal)
    return Serial(Dense(), attention, GlobalAvgPool(), Dense())


def estimate(net: Any, x: Tensor = X, x2: Tensor | None = None, seed: int = 0, samples: int = 512) -> Any:
    return infinite.kernel(net, x, x2, generator=torch.Generator().manual_seed(seed), samples=samples)


# ── exact cases ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_without_logits_attention_is_the_mean_over_positions() -> None:
    """Uniform weights need no Monte Carlo: the estimate is exact, and so are values' and outputs' gradients."""
    k = estimate(spec(gain=0.0))
    flat = Serial(Dense(), GlobalAvgPool(), Dense(), Dense(), Dense())  # values, outputs and readout on the mean
    exact = infinite.kernel(flat, X)
    assert torch.allclose(k.nngp, exact.nngp, atol=1e-12)
    assert torch.allclose(k.ntk, exact.ntk, atol=1e-12)
    assert float(k.ntk_error.max()) < 1e-12


def test_one_token_attends_to_itself() -> None:
    x = X[:, :1]
    exact = infinite.kernel(Serial(Dense(), GlobalAvgPool(), Dense(), Dense(), Dense()), x)
    assert torch.allclose(estimate(spec(8), x).ntk, exact.ntk, atol=1e-12)


def test_a_causal_first_token_attends_to_itself() -> None:
    attention = SoftmaxAttention(Dense(1.5), Dense(1.5), causal=True)
    k = estimate(Serial(Dense(), attention, infinite.Token(0), Dense()))
    exact = infinite.kernel(Serial(Dense(), infinite.Token(0), Dense(), Dense(), Dense()), X)
    assert torch.allclose(k.ntk, exact.ntk, atol=1e-12)


def test_heads_of_many_units_tend_to_gaussian_logits() -> None:
    a, b = (estimate(spec(d), samples=2048) for d in (128, None))
    gap, error = (a.ntk - b.ntk).norm(), (a.ntk_error.square() + b.ntk_error.square()).sum().sqrt()
    assert gap < 4 * error + 0.02 * b.ntk.norm()


# ── wide networks ─────────────────────────────────────────────────────────────────────────────────────────────────────
WIDE: dict[str, Callable[[int], nn.Module]] = {
    "torch, norm first": lambda e: Encoder(e, True, "gelu"),
    "torch, norm last": lambda e: Encoder(e, False, "relu"),
    "torch, attention alone": MultiHead,
    "by hand, causal, last token": lambda e: Block(e, Masked(e, 8), last=True),
    "by hand, 1/d": lambda e: Block(e, Three(e, 8, lambda q, k, v: torch.softmax(q @ k.mT / q.shape[-1], -1) @ v)),
}


@pytest.mark.parametrize("name", WIDE)
def test_from_module_predicts_the_mean_of_wide_transformers(name: str) -> None:
    width, seeds = 192, 12
    torch.manual_seed(99)
    k = estimate(infinite.from_module(WIDE[name](width)))
    draws = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        draws.append(empirical_ntk(WIDE[name](width).double(), X))
    k0 = torch.stack(draws)
    gap = float((k0.mean(0) - k.ntk).norm() / k.ntk.norm())
    error = float((k0.var(0) / seeds + k.ntk_error.square()).sum().sqrt() / k.ntk.norm())
    assert gap < 3 * error + 2 / width, f"{name}: {gap:.4f} off where the Monte Carlo error is {error:.4f}"
    assert error < 0.05, f"{name}: too few draws to tell right from wrong"


def test_negative_control() -> None:
    """The comparison can fail: attention that does not look (uniform weights) is another kernel."""
    torch.manual_seed(0)
    right = estimate(infinite.from_module(Block(64, Fused(64, 8))))
    blind = Block(64, Three(64, 8, lambda q, k, v: torch.softmax(1e-9 * q @ k.mT, -1) @ v))
    with pytest.raises(ConversionError, match="no self-attention"):
        infinite.from_module(blind)
    causal = estimate(infinite.from_module(Block(64, Fused(64, 8, causal=True))))
    assert (causal.ntk - right.ntk).norm() > 10 * right.ntk_error.norm()


# ── the estimate ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_error_bar_is_honest() -> None:
    """32 estimates scatter as much as each of them says."""
    runs = [estimate(spec(8), X[:2], seed=s, samples=128) for s in range(32)]
    scatter = torch.stack([r.ntk for r in runs]).std(0)
    said = torch.stack([r.ntk_error for r in runs]).square().mean(0).sqrt()
    assert ((scatter / said).log().abs() < 0.5).all(), f"scatter over error bar: {scatter / said}"


def test_the_estimate_repeats_and_is_symmetric() -> None:
    a, b = estimate(spec(8)), estimate(spec(8))
    assert torch.equal(a.ntk, b.ntk)
    assert torch.equal(a.ntk, a.ntk.T)
    assert a.samples == 512
    assert not torch.equal(a.ntk, estimate(spec(8), seed=1).ntk)


def test_duplicates_zeros_and_two_sets() -> None:
    x = torch.cat([X, X[:1], -X[:1], torch.zeros_like(X[:1]), X[1:2, [0, 0, 0, 0]]])
    k = estimate(spec(8), x, samples=2048)
    assert torch.isfinite(k.ntk).all()
    assert torch.allclose(k.ntk[0, 0], k.ntk[0, 3], rtol=1e-3), "a duplicate is the input itself"
    assert float(torch.linalg.eigvalsh(k.nngp)[0]) > -4 * float(k.nngp_error.max()), "positive to its error"
    cross = estimate(spec(8), x, X, samples=2048)
    gap = (cross.ntk - k.ntk[:, :3]).abs()
    assert (gap < 6 * (cross.ntk_error + k.ntk_error[:, :3]) + 1e-6).all()


def test_it_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"no closed form: pass generator="):
        infinite.kernel(spec(), X)
    with pytest.raises(ValueError, match="samples >= 16"):
        estimate(spec(), samples=4)
    with pytest.raises(ValueError, match="needs positions"):
        estimate(spec(), X[:, 0])
    with pytest.raises(ValueError, match="head_size"):
        SoftmaxAttention(head_size=0)


# ── attention by hand ─────────────────────────────────────────────────────────────────────────────────────────────────
def found(model: nn.Module) -> SoftmaxAttention:
    layers = list(infinite.from_module(model).layers)
    while layers:
        layer = layers.pop()
        if isinstance(layer, SoftmaxAttention):
            return layer
        layers += [*getattr(layer, "layers", ()), *getattr(layer, "branches", ())]
    raise AssertionError("no attention was found")


BY_HAND: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "chunks": (lambda: Fused(24, 3), 8, False),
    "causal chunks": (lambda: Fused(24, 3, causal=True), 8, True),
    "mask from a buffer": (lambda: Masked(24, 4), 6, True),
    "one reshape": (lambda: Permuted(24, 2), 12, False),
    "three projections": (lambda: Three(24, 6), 4, False),
    "one head": (lambda: Three(24, 1), 24, False),
    "einsum": (
        lambda: Three(24, 3, lambda q, k, v: torch.softmax(torch.einsum("nhtd,nhsd->nhts", q, k) / 8**0.5, -1) @ v),
        8,
        False,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_attention_by_hand_is_recognised(name: str) -> None:
    make, head_size, causal = BY_HAND[name]
    torch.manual_seed(0)
    layer = found(Block(24, make()))
    assert (layer.head_size, layer.causal) == (head_size, causal), name
    assert layer.query.w_std == pytest.approx(1 / math.sqrt(3)), name
    assert layer.query.w_grad == pytest.approx(24), name


def test_the_scale_of_logits_goes_to_the_queries() -> None:
    layer = found(Block(24, Three(24, 3, lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v)))
    assert layer.query.w_std == pytest.approx(8**0.5 / math.sqrt(3))
    assert layer.query.w_grad == pytest.approx(24 * 8)


NOT_ATTENTION: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "no softmax": (lambda q, k, v: q @ k.mT @ v, "no self-attention"),
    "relu": (lambda q, k, v: torch.relu(q @ k.mT) @ v, "no self-attention"),
    "softmax over queries": (lambda q, k, v: torch.softmax(q @ k.mT / 8**0.5, -2) @ v, "no self-attention"),
    "a window": (lambda q, k, v: torch.softmax((q @ k.mT / 8**0.5).triu(-1), -1) @ v, "no self-attention"),
    "values twice": (lambda q, k, v: torch.softmax(q @ k.mT / 8**0.5, -1) @ v + v, "no self-attention"),
    "keys are queries": (lambda q, k, v: torch.softmax(q @ q.mT / 8**0.5, -1) @ v, "mixes 2 projections"),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_what_is_no_attention_is_refused(name: str) -> None:
    mix, message = NOT_ATTENTION[name]
    with pytest.raises(ConversionError, match=message):
        infinite.from_module(Block(24, Three(24, 3, mix)))


TORCH_REFUSED: dict[str, tuple[nn.Module, str]] = {
    "copied layers": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
        "is a copy of layers.0.self_attn.in_proj_weight",
    ),
    "positions first": (nn.TransformerEncoderLayer(8, 2, 16), "batch_first=True"),
    "decoder": (nn.Sequential(nn.TransformerDecoderLayer(8, 2, 16)), "0 .TransformerDecoderLayer. cannot be converted"),
}


@pytest.mark.parametrize("name", TORCH_REFUSED)
def test_torch_layers_that_do_not_convert_are_named(name: str) -> None:
    module, message = TORCH_REFUSED[name]
    with pytest.raises(ConversionError, match=message):
        infinite.from_module(module)


def test_an_encoder_of_fresh_layers_converts() -> None:
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8), enable_nested_tensor=False
    )
    for layer in stack.layers:
        for m in layer.modules():
            if hasattr(m, "reset_parameters") and not isinstance(m, nn.LayerNorm):
                m.reset_parameters()
        layer.self_attn._reset_parameters()
    assert len(infinite.from_module(nn.Sequential(nn.Linear(5, 8), stack)).layers) == 1 + 2 * 6 + 2
