"""The self-check on all probes, and the tolerance: what is off by more is refused, what is off by less is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor
from ntkwatch.engines import UnsupportedModel, auto, empirical_ntk, layer_ntks, plan
from ntkwatch.engines.auto import choose
from ntkwatch.engines.base import Kernel
from ntkwatch.engines.functional import Functional
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.selfcheck import self_check
from ntkwatch.engines.sumcheck import SumCheck
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network, batch_size, take
from tests.support.cases import Lambda, build, find

# The tolerances, once more: a change of either place has to be one of both.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-3, torch.bfloat16: 0.1}
Change = Callable[[Tensor], Tensor]


def mistaken(change: Change, least: int = 0, parameter: str | None = None) -> type[Layerwise]:
    """An engine whose kernels of `least` probes or more are changed: of one parameter, or of all."""

    class Mistaken(Layerwise):
        def kernel(self, network: Network, x1: Any, *args: Any, **kwargs: Any) -> Kernel:
            right = super().kernel(network, x1, *args, **{**kwargs, "layers": "full"})
            kept, layers = kwargs.get("layers"), right.layers
            if batch_size(x1) >= least:
                layers = {name: change(k) if parameter in (None, name) else k for name, k in right.layers.items()}
            value = sum(layers.values())
            if right.reduction != "full":
                value = right.value + (value - sum(right.layers.values())).diagonal(dim1=1, dim2=3).mean(-1)
            if kept == "trace":
                layers = {name: k.diagonal(dim1=1, dim2=3).mean(-1) for name, k in layers.items()}
            return dataclasses.replace(right, value=value, layers=layers)

    return Mistaken


def last(by: float) -> Change:
    """The last probe's gradients are `by` of what they should be."""

    def change(k: Tensor) -> Tensor:
        k = k.clone()
        k[-1] *= by
        k[:, :, -1] *= by
        return k

    return change


def exchanged(k: Tensor) -> Tensor:
    """The last two probes."""
    order = [*range(len(k) - 2), len(k) - 1, len(k) - 2]
    return k[order][:, :, order]


MISTAKES: dict[str, Change] = {
    "left out": last(0.0),
    "twice": last(2.0),
    "of the other sign": last(-1.0),
    "off by a tenth": last(1.1),
    "one side alone": lambda k: torch.cat([k[:-1], 1.2 * k[-1:]]),
    "the last two exchanged": exchanged,
}


def probes(name: str, n: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    module, batch = build(find(name), dtype)
    return module, torch.cat([batch + 0.1 * k for k in range(-(-n // len(batch)))])[:n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [5, 40, 70])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_last_probe_alone_is_found(mistake: str, n: int, dtype: torch.dtype) -> None:
    for name in ("mlp", "conv2d", "transformer_encoder"):
        module, x = probes(name, n, dtype)
        with leave_no_trace(module):
            network = Network(module)
            sums = SumCheck(network, x)
            for parameter in (None, list(network.parameters)[-2]):
                engine = mistaken(MISTAKES[mistake], least=4, parameter=parameter)()
                assert self_check(engine, network, x)[0] < TOLERANCE[dtype], "a few probes cannot tell"
                error, worst = sums.error(engine)
                case = f"{name}, {n} probes, {mistake}, {parameter}"
                if parameter is None or dtype == torch.float64:  # one of few entries may be within rounding
                    assert error > TOLERANCE[dtype], f"{case}: off by {error:.1e} only"
                    assert parameter in (None, worst), f"{case}: it names {worst}"
            for right in (Layerwise(), Functional()):
                exact, _ = sums.error(right)
                assert exact < TOLERANCE[dtype] / 30, f"{name}, {right.name}: {exact:.1e} without a mistake"


def test_such_an_engine_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = probes("mlp", 12, torch.float64)
    right = empirical_ntk(module, x)
    monkeypatch.setattr("ntkwatch.engines.auto.Layerwise", mistaken(last(1.5), least=4))
    chosen = choose(Network(module), x)
    assert chosen.engine.name == "functional"
    assert "over all probes" in chosen.reason
    assert torch.allclose(empirical_ntk(module, x), right, rtol=1e-10)
    for ask in (empirical_ntk, layer_ntks, plan, lambda m, x, engine: Monitor(m, x, engine=engine).measure(0)):
        with pytest.raises(UnsupportedModel, match=r"off by .* over all probes, most in "):
            ask(module, x, engine="layerwise")  # type: ignore[operator]


def test_kernels_of_two_parameters_exchanged_are_found() -> None:
    """The whole kernel is right then; each parameter's own is not."""

    class Exchanged(Layerwise):
        def kernel(self, *args: Any, **kwargs: Any) -> Kernel:
            right = super().kernel(*args, **kwargs)
            (a, k), (b, l), *others = right.layers.items()
            return dataclasses.replace(right, layers={a: l, b: k, **dict(others)})

    module, x = probes("mlp", 12, torch.float64)
    with leave_no_trace(module):
        network = Network(module)
        for error, worst in (self_check(Exchanged(), network, x), SumCheck(network, x).error(Exchanged())):
            assert error > TOLERANCE[torch.float64]
            assert worst in list(network.parameters)[:2]


def test_the_tolerances_are_those() -> None:
    assert {dtype: auto._TOLERANCE[dtype] for dtype in TOLERANCE} == TOLERANCE


@pytest.mark.parametrize(
    ("n", "dtype"), [*((3, dtype) for dtype in TOLERANCE), (24, torch.float64), (24, torch.float32)]
)
def test_just_above_the_tolerance_is_refused_and_just_below_is_not(
    n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one output, whose kernel is off by a factor: on few probes entry by entry, on many in their sum."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    x = torch.randn(n, 4).to(dtype)
    with leave_no_trace(module):  # how far off the sum is for each part that the kernel is
        share = 1.0 if n == 3 else SumCheck(Network(module), x).error(mistaken(lambda k: 1.5 * k, 4)())[0] * 3
    for times, refused in ((0.5, False), (2.0, True)):
        by = 1 + times * TOLERANCE[dtype] / share
        monkeypatch.setattr(auto, "Layerwise", mistaken(lambda k, by=by: by * k, 0 if n == 3 else 4))
        if refused:
            with pytest.raises(UnsupportedModel, match="the self-check found it off by"):
                choose(Network(module), x, "layerwise")
        else:
            assert choose(Network(module), x, "layerwise").engine.name == "layerwise"


def test_gradients_that_are_not_finite_on_a_later_probe_are_refused() -> None:
    net = Lambda(lambda m, x: m.a(x) / (x[:, :1] > -3), a=nn.Linear(4, 2))
    x = torch.randn(6, 4).clamp(-2, 2)
    assert empirical_ntk(net, x).isfinite().all()
    x[-1] = -5
    with pytest.raises(UnsupportedModel, match="NaN or infinity"):
        empirical_ntk(net, x)


def test_it_takes_no_more_probes_at_once_than_the_kernel() -> None:
    """In the blocks that are asked for, and else in those that examples are looked at in."""
    sizes: list[int] = []
    net = Lambda(lambda m, x: (sizes.append(len(x)), m.a(x))[1], a=nn.Linear(4, 2))
    x = torch.randn(150, 4)
    for chunk, most in ((7, 64), (None, 64)):
        sizes.clear()
        with leave_no_trace(net):
            SumCheck(Network(net), x, chunk).error(Layerwise(uncoupled=True))
        assert max(sizes) == (chunk or most), sizes
    whole = empirical_ntk(net, x)
    assert torch.allclose(empirical_ntk(net, x, chunk_size=7), whole, rtol=1e-6)
    assert torch.allclose(empirical_ntk(net, take(x, slice(0, 65))), whole[:65, :65], rtol=1e-6)
