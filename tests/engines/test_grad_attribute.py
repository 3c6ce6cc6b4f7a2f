"""Weights whose gradient arrives through `.grad` are refused by name; what is returned, and what was there, stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ntkwatch import Monitor
from ntkwatch.engines import UnsupportedModel, empirical_ntk, layer_ntks, plan
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from tests.support.oracles import reduced, trained_ntk


class Checkpoint(torch.autograd.Function):
    """Runs `block` again in the backward pass, and calls autograd on the whole of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Callable[[Tensor], Tensor], when: Callable[[Tensor], bool]) -> Tensor:
        ctx.block, ctx.when = block, when
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        if not ctx.when(x):
            return torch.autograd.grad(y, x, g)[0], None, None
        torch.autograd.backward(y, g)
        return x.grad, None, None


class Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), inverted in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module, g: nn.Module) -> Tensor:
        ctx.f, ctx.g = f, g
        with torch.no_grad():
            x1, x2 = x.chunk(2, 1)
            y1 = x1 + f(x2)
            ctx.y = torch.cat([y1, x2 + g(y1)], 1)
        return ctx.y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y1, y2), (d1, d2) = ctx.y.chunk(2, 1), grad.chunk(2, 1)
        with torch.enable_grad():
            y1 = y1.detach().requires_grad_()
            gy = ctx.g(y1)
            gy.backward(d2)
            x2 = (y2 - gy).detach().requires_grad_()
            d1 = d1 + y1.grad
            ctx.f(x2).backward(d1)
        return torch.cat([d1, d2 + x2.grad], 1), None, None


class Tied(torch.autograd.Function):
    """A weight that gets one half of its gradient returned and the other in `.grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x.detach(), w
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        whole = ctx.x.t() @ g
        ctx.w.grad = whole / 2 if ctx.w.grad is None else ctx.w.grad + whole / 2
        return g @ ctx.w.t(), whole / 2


def always(x: Tensor) -> bool:
    return True


def is_large(x: Tensor) -> bool:
    return bool((x.abs() > 5).any())


class Model(nn.Module):
    def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.i, self.o, self.call = nn.Linear(4, 4), nn.Linear(4, 2), call
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4, bias=False)))
        self.a, self.b, self.w = nn.Linear(2, 2), nn.Linear(2, 2), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.call(self, self.i(x))))


F = ("f.0.weight", "f.0.bias", "f.2.0.weight")
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[str, ...]]] = {
    "checkpoint of one's own": (lambda m, x: Checkpoint.apply(x, m.f, always), F),
    "for some inputs only": (lambda m, x: Checkpoint.apply(x, m.f, is_large), F),
    "reversible": (lambda m, x: Reversible.apply(x, m.a, m.b), ("a.weight", "a.bias", "b.weight", "b.bias")),
    "both ways in one backward pass": (lambda m, x: Tied.apply(x, m.w), ("w",)),
    "returned here, left in .grad there": (lambda m, x: m.f(Checkpoint.apply(x, m.f, always)), F),
    "one inside another": (
        lambda m, x: Checkpoint.apply(x, lambda h: m.f(Checkpoint.apply(h, lambda t: t @ m.w, always)), always),
        (*F, "w"),
    ),
}
RIGHT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "torch's checkpoint, reentrant": lambda m, x: checkpoint(m.f, x, use_reentrant=True),
    "torch's checkpoint": lambda m, x: checkpoint(m.f, x, use_reentrant=False),
    "for no input": lambda m, x: Checkpoint.apply(x, torch.tanh, always),
    "in training alone": lambda m, x: Checkpoint.apply(x, m.f, always) if m.training else m.f(x),
    "of frozen weights": lambda m, x: Checkpoint.apply(x, lambda h: h @ m.w.detach(), always),
}


def probes() -> Tensor:
    x = torch.randn(9, 4).double()
    x[-1] *= 100  # the last alone is large
    return x


def asked(model: nn.Module, x: Tensor, engine: str) -> dict[str, Callable[[], object]]:
    return {
        "empirical_ntk": lambda: empirical_ntk(model, x, engine=engine),
        "layer_ntks": lambda: layer_ntks(model, x, engine=engine),
        "plan": lambda: plan(model, x, engine=engine),
        "Monitor": lambda: Monitor(model, x, engine=engine).measure(0),
    }


@pytest.mark.parametrize("engine", ["auto", "layerwise", "functional"])
@pytest.mark.parametrize("name", REFUSED)
def test_gradients_left_in_grad_are_refused_by_name(name: str, engine: str) -> None:
    torch.manual_seed(0)
    call, names = REFUSED[name]
    model, x = Model(call).double(), probes()
    kept = {parameter: torch.randn_like(p) for parameter, p in model.named_parameters()}
    for parameter, p in model.named_parameters():
        p.grad = kept[parameter] if parameter != "i.bias" else None
    before = {parameter: None if p.grad is None else p.grad.clone() for parameter, p in model.named_parameters()}
    for what, ask in asked(model, x, engine).items():
        with pytest.raises(UnsupportedModel, match=r"arrives through \.grad") as refused:
            ask()
        said = str(refused.value).partition(" arrives")[0].removeprefix("the gradient of ").split(", ")
        assert set(said) == set(names), f"{name}: {what} names {said}"
        for parameter, p in model.named_parameters():
            same = p.grad is None if before[parameter] is None else torch.equal(p.grad, before[parameter])
            assert same, f"{name}: {what} changed {parameter}.grad"
            assert p.grad is None or p.grad is kept[parameter], f"{name}: {what} replaced {parameter}.grad"


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_returned_is_measured(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(RIGHT[name]).double().eval(), torch.randn(5, 4).double()
    found = empirical_ntk(model.train(), x)
    assert torch.allclose(found, reduced(trained_ntk(model.eval(), x), "trace"), rtol=1e-10), name
    plan(model, x)


def test_other_parameters_alone_are_right() -> None:
    torch.manual_seed(0)
    model, x = Model(REFUSED["checkpoint of one's own"][0]).double(), torch.randn(5, 4).double()
    plain = Model(lambda m, h: m.f(h)).double()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(empirical_ntk(model, x, params="[io].*"), empirical_ntk(plain, x, params="[io].*"))


def test_the_remedies_of_the_message_work() -> None:
    """Without the block's Function where self.training is False, or with torch's checkpoint."""
    torch.manual_seed(0)
    model, x = Model(REFUSED["checkpoint of one's own"][0]).double(), torch.randn(5, 4).double()
    right = reduced(trained_ntk(model, x), "trace")
    for remedy in ("in training alone", "torch's checkpoint"):
        model.call = RIGHT[remedy]
        assert torch.allclose(empirical_ntk(model, x), right, rtol=1e-10), remedy


def test_a_kernel_looks_again() -> None:
    """Of probes that the choice of an engine did not see."""
    torch.manual_seed(0)
    model, x = Model(lambda m, x: Checkpoint.apply(x, m.f, is_large)).double(), probes()
    with leave_no_trace(model), pytest.raises(UnsupportedModel, match=r"f\.0\.weight, f\.0\.bias, f\.2\.0\.weight"):
        Layerwise(uncoupled=True).kernel(Network(model), x)
    assert all(p.grad is None for p in model.parameters())
