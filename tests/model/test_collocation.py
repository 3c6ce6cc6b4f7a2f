"""Probes that require grad, as collocation points of physics-informed models do: exact by both engines, left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, empirical_ntk, layer_ntks, metrics, plan
from ntkwatch.model import leaves

N = 5
D = torch.autograd.grad
Outputs = Callable[[nn.Module, Any], Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def points(width: int, n: int = N) -> Tensor:
    g = torch.Generator().manual_seed(10 * n + width)
    return torch.randn(n, width, generator=g, dtype=torch.float64).requires_grad_()


def gradient(u: Tensor, *by: Tensor) -> tuple[Tensor, ...]:
    return D(u.sum(), by, create_graph=True)


def burgers(model: nn.Module, batch: Any) -> Tensor:
    x, t = batch
    u = model(torch.cat([x, t], 1))
    ux, ut = gradient(u, x, t)
    return ut + u * ux


def heat(model: nn.Module, batch: Any) -> Tensor:
    u = model(torch.cat([batch["x"], batch["t"]], 1))
    ux, ut = gradient(u, batch["x"], batch["t"])
    (uxx,) = gradient(ux, batch["x"])
    return ut - uxx


def laplacian(model: nn.Module, xy: Tensor) -> Tensor:
    (first,) = gradient(model(xy), xy)
    return sum(gradient(first[:, i], xy)[0][:, i] for i in range(2))[:, None]


def nested(model: nn.Module, batch: Any) -> Tensor:
    (x, t), scale = batch["points"], batch["scale"]
    return burgers(model, (x, t)) * scale


def both(model: nn.Module, batch: Any) -> Tensor:
    x, t = batch
    u = model(torch.cat([x, t], 1))
    return torch.cat([u, *gradient(u, x, t)], 1)


def partly(model: nn.Module, batch: Any) -> Tensor:
    """The second leaf does not require grad."""
    x, a = batch
    u = model(torch.cat([x, a], 1))
    return gradient(u, x)[0] + a


CASES: dict[str, tuple[Outputs, Callable[[int], Any]]] = {
    "first derivatives, a tuple": (burgers, lambda n: (points(1, n), points(1, n + 100)[:n].detach().requires_grad_())),
    "second derivatives, a dict": (heat, lambda n: {"x": points(1, n), "t": points(2, n)[:, 1:].requires_grad_()}),
    "laplacian, a tensor": (laplacian, lambda n: points(2, n)),
    "nested, and a leaf without": (
        nested,
        lambda n: {
            "points": (points(1, n), (points(1, n).detach() + 1).requires_grad_()),
            "scale": torch.rand(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        },
    ),
    "three outputs": (both, lambda n: (points(1, n), (points(1, n).detach() - 1).requires_grad_())),
    "one leaf of two": (partly, lambda n: (points(1, n), torch.ones(n, 1, dtype=torch.float64))),
    "points that are no leaves": (laplacian, lambda n: points(2, n) * 2),
}  # fmt: skip


def jacobian(model: nn.Module, outputs: Outputs, batch: Any, n: int) -> Tensor:
    f, parameters, rows = outputs(model, batch), list(model.parameters()), []
    for y in f.flatten():
        grads = D(y, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([torch.zeros(p.numel()).double() if g is None else g.flatten()
                               for g, p in zip(grads, parameters, strict=True)]))  # fmt: skip
    return torch.stack(rows).reshape(n, f.shape[1], -1)


@pytest.mark.parametrize("case", CASES)
def test_every_entry_point_gives_the_naive_kernel(case: str) -> None:
    outputs, make = CASES[case]
    model, x1, x2 = net(), make(N), make(3)
    j1, j2 = jacobian(model, outputs, make(N), N), jacobian(model, outputs, make(3), 3)
    want, cross = (torch.einsum("ncp,mcp->nm", j1, j) / j1.shape[1] for j in (j1, j2))
    close = {"rtol": 1e-9, "atol": 1e-12}
    for engine in ("layerwise", "functional"):
        found = empirical_ntk(model, x1, outputs=outputs, engine=engine, chunk_size=2)
        torch.testing.assert_close(found, want, **close, msg=f"{case}, {engine}")
        found = empirical_ntk(model, x1, x2, outputs=outputs, engine=engine)
        torch.testing.assert_close(found, cross, **close, msg=f"{case}, {engine}, x2")
    layers = layer_ntks(model, x1, outputs=outputs)
    torch.testing.assert_close(torch.stack(list(layers.values())).sum(0), want, **close, msg=case)
    assert plan(model, x1, outputs=outputs).peak_bytes > 0, case
    full = empirical_ntk(model, x1, outputs=outputs, reduction="full")
    torch.testing.assert_close(full, torch.einsum("ncp,mdp->ncmd", j1, j1), **close, msg=case)


@pytest.mark.parametrize("case", CASES)
def test_a_monitor_follows_the_points_and_leaves_them_alone(case: str) -> None:
    outputs, make = CASES[case]
    model, batch = net(), make(N)
    before = [(leaf, leaf.detach().clone(), leaf.requires_grad, leaf.is_leaf) for leaf in leaves(batch)]
    for leaf in leaves(batch):
        if leaf.requires_grad and leaf.is_leaf:
            leaf.grad = torch.full_like(leaf, 7.0)
    monitor = Monitor(model, batch, outputs=outputs)
    for step in (0, 1):
        j = jacobian(model, outputs, make(N), N)
        f = outputs(model, make(N)).detach()
        measured = monitor.measure(step)
        want = torch.einsum("ncp,mcp->nm", j, j) / j.shape[1]
        torch.testing.assert_close(measured.kernel, want, rtol=1e-9, atol=1e-12, msg=f"{case}, step {step}")
        if step == 0:
            j_0, f_0, moved = j, f, [0.01 * torch.randn_like(p) for p in model.parameters()]
            with torch.no_grad():
                for p, by in zip(model.parameters(), moved, strict=True):
                    p.add_(by)
    linear = (j_0 @ torch.cat([by.flatten() for by in moved])).reshape(f.shape)
    ratio = float(metrics.taylor_ratio(f - f_0, linear))
    assert 0 < ratio < 0.5, case
    assert measured.metrics["taylor_ratio"] == pytest.approx(ratio, rel=1e-6), case
    for leaf, value, required, is_leaf in before:
        assert torch.equal(leaf.detach(), value), case
        assert (leaf.requires_grad, leaf.is_leaf) == (required, is_leaf), case
        if required and is_leaf:
            assert torch.equal(leaf.grad, torch.full_like(leaf, 7.0)), f"{case}: the points' own gradient"


def test_a_forward_that_differentiates_by_its_input() -> None:
    """An energy's forces, without outputs=."""

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return gradient(self.net(x), x)[0]

    model, x = Forces(), points(2)
    j = jacobian(model, lambda m, b: m(b), points(2), N)
    want = torch.einsum("ncp,mcp->nm", j, j) / 2
    for engine in ("auto", "layerwise", "functional"):
        torch.testing.assert_close(empirical_ntk(model, x, engine=engine), want, rtol=1e-9, atol=1e-12, msg=engine)
