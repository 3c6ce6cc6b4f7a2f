"""`autograd.Function`s: arguments of any kind in any place, several outputs, adjoints, and what frees what it saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor
from ntkwatch.engines import empirical_ntk, layer_ntks, plan
from tests.support.oracles import reduced, trained_ntk


class Scaled(torch.autograd.Function):
    """alpha x wᵀ + b, with arguments that are no tensors before, between and behind, and tensors without gradient."""

    @staticmethod
    def forward(ctx: Any, alpha: float, x: Tensor, name: str, mask: Tensor, w: Tensor, options: Any, b: Any) -> Tensor:
        ctx.alpha = alpha
        ctx.save_for_backward(x, w, mask)
        return (alpha * (x @ w.t()) + (0 if b is None else b)) * mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, mask = ctx.saved_tensors
        g = g * mask
        bias = g.sum(0) if ctx.needs_input_grad[6] else None
        return None, ctx.alpha * (g @ w), None, None, ctx.alpha * (g.t() @ x), None, bias


class Pair(torch.autograd.Function):
    """Two outputs, of which a model may use one; the weight is there twice."""

    @staticmethod
    def forward(ctx: Any, power: int, v: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.power = power
        ctx.save_for_backward(v, x, w)
        return x @ w, (x * v) ** power

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:
        v, x, w = ctx.saved_tensors
        slope = h * ctx.power * (x * v) ** (ctx.power - 1)  # zeros where the output is not used
        return None, (slope * x).sum(0), g @ w.t() + slope * v, x.t() @ g


class Named(torch.autograd.Function):
    """Keeps its weight under the name that torch's own nodes have for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str, w: Tensor) -> Tensor:
        ctx.variable, ctx.x = w, x
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g @ ctx.variable.t(), None, ctx.x.t() @ g


class Reparametrised(torch.autograd.Function):
    """A weight made of parameters alone, before any example is met."""

    @staticmethod
    def forward(ctx: Any, kind: str, w: Tensor, steps: list[int], scale: Tensor) -> Tensor:
        ctx.save_for_backward(w, scale)
        return w * scale.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        w, scale = ctx.saved_tensors
        return None, g * scale.exp(), None, (g * w).sum() * scale.exp()


class Adjoint(torch.autograd.Function):
    """Euler steps of y' = f(y) forth, and of the adjoint equation back, as ODE solvers are differentiated."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, steps: int, y: Tensor, tolerance: Any, *parameters: Tensor) -> Tensor:
        ctx.f, ctx.parameters, path = f, parameters, [y]
        with torch.no_grad():
            for _ in range(steps):
                path.append(path[-1] + f(path[-1]) / steps)
        ctx.path = path
        return path[-1].clone()

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Any:
        total = [torch.zeros_like(p) for p in ctx.parameters]
        steps = len(ctx.path) - 1
        for y in reversed(ctx.path[:-1]):
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                grads = torch.autograd.grad(ctx.f(y), (y, *ctx.parameters), a / steps, allow_unused=True)
            a = a + grads[0]
            total = [t if g is None else t + g for t, g in zip(total, grads[1:], strict=True)]
        return None, None, a, None, *total


class Freed(torch.autograd.Function):
    """Frees what it saved at its first backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x.detach(), w.detach()
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.x, ctx.w
        del ctx.x, ctx.w
        return g @ w.t(), x.t() @ g


class Emptied(Freed):
    """Frees by clearing a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.held = [x.detach(), w.detach()]
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        w, x = ctx.held.pop(), ctx.held.pop()
        return g @ w.t(), x.t() @ g


class Overwritten(Freed):
    """Writes over what it saved: a second backward pass gives something else, and no error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x.detach().clone(), w.detach()
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        grads = g @ ctx.w.t(), ctx.x.t() @ g
        ctx.x.zero_()
        return grads


def unpacked_once(x: Tensor, w: Tensor) -> Tensor:
    """What torch saves is kept outside, as on a disk, and gone when it was read."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> int:
        kept[len(kept)] = t.detach().clone()
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.pop):
        return torch.tanh(x @ w)


class Model(nn.Module):
    """`call` on the features of a layer and on parameters, followed by another layer."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], first: bool = False) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(4, 4), nn.Linear(4, 3)
        self.w, self.v, self.s = (nn.Parameter(torch.randn(size)) for size in ((4, 4), (4,), ()))
        self.field = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.call, self.first = call, first

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.call(self, x if self.first else self.i(x))))


def scaled(m: Any, x: Tensor, b: Tensor | None = None) -> Tensor:
    return Scaled.apply(2.0, x, "a", torch.ones(4), m.w, {}, b)


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "non-tensors everywhere": lambda m, x: scaled(m, x, m.v),
    "an optional tensor left out": scaled,
    "nothing but the weight needs a gradient": lambda m, x: Scaled.apply(
        0.5, x.detach(), "b", torch.arange(4) > 0, m.w, 3, None
    ),
    "the first of two outputs": lambda m, x: Pair.apply(2, m.v, x, m.w)[0],
    "the second of two outputs": lambda m, x: Pair.apply(3, m.v, x, m.w)[1],
    "both outputs": lambda m, x: sum(Pair.apply(2, m.v, x, m.w)),
    "one weight twice": lambda m, x: scaled(m, scaled(m, x)),
    "a name that torch has": lambda m, x: Named.apply(x, "c", m.w),
    "of parameters alone": lambda m, x: x @ Reparametrised.apply("d", m.w, [1, 2], m.s),
    "an adjoint": lambda m, x: Adjoint.apply(m.field, 5, x, None, *m.field.parameters()),
    "an adjoint of another order": lambda m, x: Adjoint.apply(m.field, 3, x, 1e-3, *reversed([*m.field.parameters()])),
}
ONCE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "deleted": lambda m, x: Freed.apply(x, m.w),
    "a list emptied": lambda m, x: Emptied.apply(x, m.w),
    "written over": lambda m, x: Overwritten.apply(x, m.w),
    "unpacked once": lambda m, x: unpacked_once(x, m.w),
    "two in a row": lambda m, x: Freed.apply(Freed.apply(x, m.w), m.w),
}


@pytest.mark.parametrize("first", [True, False], ids=["on the inputs", "behind a layer"])
@pytest.mark.parametrize("name", [*CALLS, *ONCE])
def test_kernels_of_functions_are_those_that_training_sees(name: str, first: bool) -> None:
    torch.manual_seed(0)
    model, x = Model((CALLS | ONCE)[name], first).double(), torch.randn(7, 4).double()
    theta = trained_ntk(model, x)
    for reduction, engine in (("full", "auto"), ("sum", "layerwise")):
        found = empirical_ntk(model, x, reduction=reduction, engine=engine)  # type: ignore[arg-type]
        assert torch.allclose(found, reduced(theta, reduction), rtol=1e-9, atol=1e-9), f"{name}: {reduction}, {engine}"
    trace = reduced(theta, "trace")
    parts = empirical_ntk(model, x, x[:3], chunk_size=2)
    assert torch.allclose(parts, trace[:, :3], rtol=1e-9, atol=1e-9), f"{name}: blocks, x2"
    layers = layer_ntks(model, x)
    assert set(layers) == {parameter for parameter, _ in model.named_parameters()}, name
    assert torch.allclose(torch.stack(list(layers.values())).sum(0), trace, rtol=1e-9, atol=1e-9), f"{name}: layers"
    assert torch.allclose(Monitor(model, x).measure(0).kernel.cpu(), trace, rtol=1e-9, atol=1e-9), f"{name}: Monitor"


@pytest.mark.parametrize("name", [*CALLS, *ONCE])
def test_plans_of_functions(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model((CALLS | ONCE)[name]).double(), torch.randn(7, 4).double()
    found = plan(model, x)
    assert {row.name for row in found.rows()} >= {parameter for parameter, _ in model.named_parameters()}, name
    assert found.peak_bytes > 0
    assert ("one pass for each example and output" in found.reason) == (name in ONCE), found.reason
