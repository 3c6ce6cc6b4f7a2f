"""Known answers 3.1 to 3.5 of SCIENCE, by both engines."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ntkwatch.engines import empirical_ntk, layer_ntks

ENGINES = ("functional", "layerwise", "auto")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("engine", ENGINES)
def test_linear_3_1(engine: str) -> None:
    x = torch.tensor([[1.0, 2, 0], [0, 1, -1], [2, 0, 1]])
    theta = empirical_ntk(nn.Linear(3, 2), x, reduction="full", engine=engine)
    gram = x @ x.T + 1
    expected = torch.einsum("nm,cd->ncmd", gram, torch.eye(2))
    assert torch.equal(theta, expected)
    eigenvalues = torch.linalg.eigvalsh(empirical_ntk(nn.Linear(3, 2), x, engine=engine))
    assert close(eigenvalues, torch.tensor([0.5941867925854845, 4.664874396262113, 9.7409388111524]))


class Chain(nn.Module):
    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        return self.b * (self.a * x)


@pytest.mark.parametrize("engine", ENGINES)
def test_scalar_chain_3_2(engine: str) -> None:
    k = empirical_ntk(Chain(2.0, 3.0), torch.tensor([[1.0], [-2.0]]), engine=engine)
    assert torch.equal(k, torch.tensor([[13.0, -26], [-26, 52]]))


def relu_net(width: int = 7, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width, bias), nn.ReLU(), nn.Linear(width, 2, bias))


@pytest.mark.parametrize("engine", ENGINES)
def test_shrinking_3_2b(engine: str) -> None:
    net = nn.Sequential(*(m for _ in range(2) for m in (nn.Linear(4, 4, False), nn.ReLU())), nn.Linear(4, 2, False))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    k0 = empirical_ntk(net, x, engine=engine)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    k1 = empirical_ntk(net, x, engine=engine)
    assert close(torch.log(k1.trace() / k0.trace()), torch.tensor(-2.772588722240))
    assert close(k1 / k1.norm(), k0 / k0.norm())


@pytest.mark.parametrize("engine", ENGINES)
def test_deep_linear_3_3(engine: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5, False), nn.Linear(5, 3, False), nn.Linear(3, 2, False))
    w1, w2, w3 = (layer.weight.detach() for layer in net)
    x = torch.randn(6, 4)
    terms = [
        (x @ x.T, w3 @ w2 @ w2.T @ w3.T),
        (x @ w1.T @ w1 @ x.T, w3 @ w3.T),
        (x @ w1.T @ w2.T @ w2 @ w1 @ x.T, torch.eye(2)),
    ]
    layers = layer_ntks(net, x, reduction="full", engine=engine)
    for (name, layer), (a, b) in zip(layers.items(), terms, strict=True):
        assert close(layer, torch.einsum("nm,cd->ncmd", a, b)), name


@pytest.mark.parametrize("engine", ENGINES)
def test_symmetries_3_4(engine: str) -> None:
    torch.manual_seed(1)
    net, x = relu_net(), torch.randn(5, 3)
    k = empirical_ntk(net, x, engine=engine)
    layers = layer_ntks(net, x, engine=engine)
    assert close(torch.stack(list(layers.values())).sum(0), k), "layers sum to the whole"
    order = torch.randperm(5)
    assert close(empirical_ntk(net, x[order], engine=engine), k[order][:, order]), "data permuted"
    units = torch.randperm(7)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[units]), net[0].bias.copy_(net[0].bias[units])
        net[2].weight.copy_(net[2].weight[:, units])
    assert close(empirical_ntk(net, x, engine=engine), k), "hidden units permuted"
    scaled = empirical_ntk(net, x, engine=engine, outputs=lambda m, b: 3 * m(b))
    assert close(scaled, 9 * k), "outputs scaled"
    with torch.no_grad():
        net[0].weight.mul_(2), net[0].bias.mul_(2), net[2].weight.div_(2)
    moved = layer_ntks(net, x, engine=engine)
    for name, factor in {"0.weight": 1 / 4, "0.bias": 1 / 4, "2.weight": 4, "2.bias": 1}.items():
        assert close(moved[name], factor * layers[name]), f"{name} under a reparametrisation"


@pytest.mark.parametrize("engine", ENGINES)
def test_gauss_newton_3_5(engine: str) -> None:
    torch.manual_seed(2)
    net, x, n, c = relu_net(), torch.randn(4, 3), 4, 2
    theta = empirical_ntk(net, x, reduction="full", engine=engine).reshape(n * c, n * c)
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(dict(net.named_parameters()))
    j = torch.cat([block.detach().flatten(2) for block in jacobians.values()], 2).flatten(0, 1)
    p = net(x).detach().softmax(1)
    h = torch.block_diag(*[(torch.diag(row) - torch.outer(row, row)) / n for row in p])
    values, vectors = torch.linalg.eigh(h)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    mu = torch.linalg.eigvalsh(root @ theta @ root)
    full = torch.linalg.eigvalsh(j.T @ h @ j)[-n * c :]
    assert close(mu, full, 1e-10)
    assert mu[-1] <= torch.linalg.eigvalsh(theta)[-1] / (2 * n) + 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_and_traces(engine: str) -> None:
    torch.manual_seed(3)
    net, x = relu_net(), torch.randn(5, 3)
    theta = empirical_ntk(net, x, reduction="full", engine=engine)
    k = empirical_ntk(net, x, engine=engine)
    assert close(theta.reshape(10, 10).trace(), 2 * k.trace()), "tr Θ = C tr K"
    assert close(theta, theta.permute(2, 3, 0, 1)), "Θ is symmetric"
    assert torch.linalg.eigvalsh(theta.reshape(10, 10))[0] > -1e-12, "Θ is positive semi-definite"
    assert math.isclose(float(empirical_ntk(net, x, x[:2], engine=engine)[1, 0]), float(k[1, 0]), rel_tol=1e-12)
