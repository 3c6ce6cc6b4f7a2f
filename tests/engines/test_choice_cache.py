"""A choice is remembered while nothing that it depends on changes; a change is never hidden."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkwatch import empirical_ntk, plan
from ntkwatch.engines import choice_cache
from ntkwatch.model import UnsupportedModel


class Net(nn.Module):
    """Two layers, with what users change from outside: a flag, a number, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 6), nn.Linear(6, 3), nn.BatchNorm1d(6)
        self.squared, self.scale, self.signs = False, 1.0, [1.0, 1.0, 1.0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.a(x)))
        return self.b(h * h if self.squared else h) * self.scale * torch.tensor(self.signs, dtype=x.dtype)


class Wide(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat(1, 2)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
SCALE = {"value": 1.0}


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one at each choice that is made anew."""
    made: list[Any] = []
    real = choice_cache.choose

    def counted(*args: Any) -> Any:
        made.append(args)
        return real(*args)

    monkeypatch.setattr(choice_cache, "choose", counted)
    return made


def moved(net: Net) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))


SAME: dict[str, Callable[[Net], dict[str, Any]]] = {
    "nothing": lambda net: {},
    "weights moved": lambda net: moved(net) or {},
    "gradients": lambda net: net(X).sum().backward() or {},
    "training mode": lambda net: net.train() and {},
    "buffers moved": lambda net: (net.train()(X + 1).sum() * 0 and {}) or {},
    "other probes": lambda net: {"x": X.flip(0) + 1},
    "another reduction": lambda net: {"reduction": "full"},
    "another precision": lambda net: {"precision": "single"},
    "a hook that is gone": lambda net: net.a.register_forward_hook(print).remove() or {},
}
CHANGED: dict[str, Callable[[Net], dict[str, Any]]] = {
    "a flag": lambda net: setattr(net, "squared", True) or {},
    "a number": lambda net: setattr(net, "scale", 2.0) or {},
    "a list in place": lambda net: net.signs.__setitem__(0, -1.0) or {},
    "another class": lambda net: setattr(net, "__class__", Wide) or {},
    "forward of the object": lambda net: (
        setattr(net, "forward", MethodType(lambda self, x: self.b(self.a(x)), net)) or {}
    ),
    "a module": lambda net: setattr(net, "norm", nn.Identity()) or {},
    "a module of a child": lambda net: setattr(net, "a", nn.Sequential(net.a, nn.Tanh())) or {},
    "a hook": lambda net: net.a.register_forward_hook(lambda m, i, o: o * 2) and {},
    "another hook in its place": lambda net: net.b.register_forward_hook(lambda m, i, o: o * 3) and {},
    "a parametrization": lambda net: nn.utils.parametrizations.weight_norm(net.a) and {},
    "a frozen weight": lambda net: net.a.weight.requires_grad_(False) is None or {},
    "another parameter": lambda net: setattr(net.a, "weight", nn.Parameter(net.a.weight.detach() * 2)) or {},
    "tied weights": lambda net: setattr(net.norm, "weight", net.a.bias) or {},
    "the type of weights": lambda net: net.double() and {"x": X.double()},
    "fewer probes": lambda net: {"x": X[:4]},
    "probes that require grad": lambda net: {"x": X.clone().requires_grad_()},
    "part of the parameters": lambda net: {"params": "a.*"},
    "another engine": lambda net: {"engine": "functional"},
    "outputs=": lambda net: {"outputs": lambda m, x: m(x)[:, :2]},
    "statistics of the batch": lambda net: setattr(net.norm, "momentum", 0.5) or {},
}


def kernel(net: nn.Module, options: dict[str, Any]) -> Tensor:
    return empirical_ntk(net, **{"x1": options.pop("x", X), **options})


@pytest.mark.parametrize("change", SAME)
def test_it_is_remembered(change: str, choices: list[Any]) -> None:
    net = Net()
    first = empirical_ntk(net, X)
    assert len(choices) == 1
    options = SAME[change](net) or {}
    found = kernel(net, dict(options))
    assert len(choices) == 1, f"{change}: chosen anew"
    assert torch.allclose(found, kernel(copy.deepcopy(net), dict(options)), rtol=1e-9), change
    assert change != "nothing" or torch.equal(found, first)


@pytest.mark.parametrize("change", CHANGED)
def test_a_change_is_not_hidden(change: str, choices: list[Any]) -> None:
    net = Net()
    empirical_ntk(net, X)
    options = CHANGED[change](net)
    options = options if isinstance(options, dict) else {}
    found = kernel(net, dict(options))
    assert len(choices) == 2, f"{change}: the old choice was taken"
    assert torch.allclose(found, kernel(copy.deepcopy(net), dict(options)), rtol=1e-9), change
    kernel(net, dict(options))
    assert len(choices) == 3, f"{change}: the copy is another module, and the new choice is remembered"


def outputs_times(factor: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda m, x: m(x) * factor


def test_a_function_is_known_by_what_it_reads(choices: list[Any]) -> None:
    """A lambda is another object at each call: its code, closure and globals are compared."""
    net = Net()
    for _ in range(3):
        empirical_ntk(net, X, outputs=outputs_times(2.0))
    assert len(choices) == 1
    twice = empirical_ntk(net, X, outputs=outputs_times(2.0))
    assert torch.allclose(empirical_ntk(net, X, outputs=outputs_times(4.0)), 4 * twice)
    assert len(choices) == 2
    empirical_ntk(net, X, outputs=lambda m, x: m(x) * SCALE["value"])
    SCALE["value"] = 3.0
    empirical_ntk(net, X, outputs=lambda m, x: m(x) * SCALE["value"])
    SCALE["value"] = 1.0
    assert len(choices) == 4


def test_modes_of_torch_are_part_of_it(choices: list[Any]) -> None:
    net = Net()
    plain = empirical_ntk(net, X)
    with torch.autocast("cpu", torch.bfloat16):  # off in a kernel
        assert torch.equal(empirical_ntk(net, X), plain)
    assert len(choices) == 1
    torch.set_default_dtype(torch.float64)
    try:
        empirical_ntk(net, X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(choices) == 2


def test_plan_and_kernel_share_it(choices: list[Any]) -> None:
    net = Net()
    plan(net, X)
    empirical_ntk(net, X)
    plan(net, X)
    assert len(choices) == 1


def test_what_comes_out_not_finite_is_looked_at_again(choices: list[Any]) -> None:
    net = Net()
    empirical_ntk(net, X)
    with torch.no_grad():
        net.b.weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedModel, match=r"b\.weight holds NaN"):
        empirical_ntk(net, X)
    with torch.no_grad():
        net.b.weight[0, 0] = 1.0
    assert empirical_ntk(net, X).isfinite().all()


class Branching(nn.Module):
    """Of another form where a probe is large, and then coupled through the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return F.softmax(y - y.mean(0), 1) if bool((x > 9).any()) else torch.tanh(y)


def test_a_graph_that_was_not_checked_is_checked(choices: list[Any]) -> None:
    net, far = Branching(), X.clone()
    empirical_ntk(net, X)
    far[-1] = 10
    with pytest.raises(UnsupportedModel, match="depends on the other examples"):
        empirical_ntk(net, far)
    assert len(choices) == 2


def test_it_holds_no_module_alive() -> None:
    net: nn.Module | None = Net()
    empirical_ntk(net, X)
    empirical_ntk(net, X, outputs=lambda m, x: m(x))
    gone = weakref.ref(net)
    net = None
    gc.collect()
    assert gone() is None


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: nn.LSTM(4, 3, batch_first=True), (3, 5, 4)),
    "GRU": (lambda: nn.GRU(4, 3, batch_first=True), (3, 5, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (3, 5, 4)),
    "parametrized": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), (3, 4)),
    "weight norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), (3, 4)),
    "compiled": (lambda: torch.compile(nn.Linear(4, 3), backend="eager"), (3, 4)),
    "scripted": (lambda: torch.jit.script(nn.Linear(4, 3)), (3, 4)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten()), (3, 2, 5, 5)),
}


def first_tensor(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y[0] if isinstance(y, tuple) else y).flatten(1)[:, :2]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore")
def test_torchs_layers_are_remembered(layer: str, choices: list[Any]) -> None:
    make, shape = LAYERS[layer]
    module, x = make(), torch.randn(shape)
    for _ in range(3):
        empirical_ntk(module, x, outputs=first_tensor)
    assert len(choices) == 1, layer


def test_what_cannot_be_compared_is_not_remembered(choices: list[Any]) -> None:
    net = Net()
    net.deep = [[[[[1.0]]]]]
    for _ in range(2):
        empirical_ntk(net, X)
    assert len(choices) == 2
