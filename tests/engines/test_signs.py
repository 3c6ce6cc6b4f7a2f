"""The kernel of sign descent against the naive loop, and what it is for: one step along the signs of a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch.engines import contract, empirical_ntk, sign_ntk
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.machines import machine
from ntkwatch.engines.memory import peak_bytes
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network, take
from tests.engines.test_zoo import error, params
from tests.support.cases import Case, build, find
from tests.support.oracles import gradients, reduced

REDUCTIONS = ("trace", "blocks", "full")


def naive(j1: dict[str, Tensor], j2: dict[str, Tensor]) -> Tensor:
    """J₁ sign(J₂)ᵀ, [n1, C, n2, C]; the sign of what is zero but for rounding, which differs from CPU to CPU, is 0."""
    return torch.stack([torch.einsum("ncp,mdp->ncmd", j, sign(j2[name])) for name, j in j1.items()]).sum(0)


def sign(j: Tensor) -> Tensor:
    """Of [n, C, P] in float64."""
    return torch.where(j.abs() <= 1e-12 * j.abs().amax(-1, keepdim=True), 0, j.sign())


@pytest.mark.parametrize("case", params(refused=False))
def test_layerwise_equals_the_naive_loop(case: Case) -> None:
    module, batch = build(case)
    j = gradients(module, batch)
    theta = naive(j, j)
    for reduction in REDUCTIONS:
        found = sign_ntk(module, batch, reduction=reduction, engine="layerwise")
        assert error(found, reduced(theta, reduction)) < 1e-10, f"{case}: {reduction}"


SAMPLE = ["mlp", "conv2d", "conv_groups", "embedding", "scalar_output", "deep_linear"]


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
@pytest.mark.parametrize("name", SAMPLE)
def test_rectangular_and_in_blocks(name: str, engine: str) -> None:
    module, batch = build(find(name))
    other = take(batch, slice(1, 3))
    j1, j2 = gradients(module, batch), gradients(module, other)
    for reduction in REDUCTIONS:
        settings: dict[str, Any] = {"reduction": reduction, "engine": engine}
        whole, part = reduced(naive(j1, j1), reduction), reduced(naive(j1, j2), reduction)
        assert error(sign_ntk(module, batch, **settings, chunk_size=2), whole) < 1e-10, f"{reduction}, in blocks"
        assert error(sign_ntk(module, batch, other, **settings), part) < 1e-10, f"{reduction}, with x2"
        assert error(sign_ntk(module, batch, other, **settings, chunk_size=1), part) < 1e-10, f"{reduction}, both"


@pytest.mark.parametrize("name", SAMPLE)
def test_in_the_large_portions_that_a_gpu_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contracted as on a GPU, wherever this runs."""
    monkeypatch.setattr(contract, "machine", lambda device: machine(torch.device("cuda")))
    module, batch = build(find(name))
    j = gradients(module, batch)
    for reduction in REDUCTIONS:
        found = sign_ntk(module, batch, reduction=reduction, engine="layerwise")
        assert error(found, reduced(naive(j, j), reduction)) < 1e-10, reduction


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
def test_outputs_are_not_added_before_there_are_signs(engine: str) -> None:
    with pytest.raises(ValueError, match="take 'trace', 'blocks' or 'full'"):
        sign_ntk(nn.Linear(3, 2), torch.eye(3), reduction="sum", engine=engine)


def test_a_linear_model_is_known() -> None:
    """f = Wx + b: the kernel is X sign(X)ᵀ + 1 in every output, and zero between them."""
    x = torch.tensor([[1.0, 2, 0], [0, 1, -1], [2, 0, 1]]).double()
    found = sign_ntk(nn.Linear(3, 2).double(), x, reduction="full")
    expected = torch.tensor([[4.0, 3, 2], [2, 3, 0], [3, 0, 4]]).double()
    assert torch.equal(found, torch.einsum("nm,cd->ncmd", expected, torch.eye(2).double()))


def mlp(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 1))
    return net.double(), torch.randn(5, 4).double()


def test_it_is_how_a_step_along_the_signs_of_one_example_moves_the_others() -> None:
    """Δf(x_n) = −η sign(ℓ'_m) K[n, m], with an error that falls with η; the plain kernel is no such thing."""
    net, x = mlp()
    k, plain = sign_ntk(net, x), empirical_ntk(net, x)
    for m in range(len(x)):
        before, grads = net(x).detach(), torch.autograd.grad(net(x)[m].sum(), list(net.parameters()))
        moves = []
        for eta in (1e-4, 5e-5):
            stepped = {name: p - eta * g.sign() for (name, p), g in zip(net.named_parameters(), grads, strict=True)}
            moves.append((torch.func.functional_call(net, stepped, (x,)) - before).flatten().detach() / -eta)
        first, second = ((move - k[:, m]).norm() / k[:, m].norm() for move in moves)
        assert first < 1e-2, m
        assert float(second / first) == pytest.approx(0.5, abs=0.05), m
        assert (moves[1] - plain[:, m] * k[m, m] / plain[m, m]).norm() > 0.1 * k[:, m].norm(), "negative control"


def test_invariances() -> None:
    net, x = mlp()
    k = sign_ntk(net, x)
    order = torch.randperm(5)
    assert error(sign_ntk(net, x[order]), k[order][:, order]) < 1e-12, "data permuted"
    assert error(sign_ntk(net, x, outputs=lambda m, b: -3 * m(b)), 3 * k) < 1e-12, "outputs scaled, and turned over"
    with torch.no_grad():
        units = torch.randperm(9)
        net[0].weight.copy_(net[0].weight[units]), net[0].bias.copy_(net[0].bias[units])
        net[2].weight.copy_(net[2].weight[:, units])
    assert error(sign_ntk(net, x), k) < 1e-12, "hidden units permuted"
    with torch.no_grad():
        net[0].weight[3].neg_(), net[0].bias[3].neg_(), net[2].weight[:, 3].neg_()
    assert error(sign_ntk(net, x), k) < 1e-12, "a unit turned over"
    assert (k - k.T).norm() > 0.1 * k.norm(), "it is not symmetric"
    assert bool((k.abs() <= k.diagonal()[:, None] * (1 + 1e-12)).all()), "the diagonal is the largest of its row"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", ["layerwise", "functional"])
def test_what_is_zero_but_for_rounding_has_no_sign(engine: str, dtype: torch.dtype) -> None:
    """Channel i of example i is positive everywhere: the normalisation takes its shift away, and no other's."""
    torch.manual_seed(15)
    net = nn.Sequential(nn.GroupNorm(2, 6), nn.ReLU(), nn.InstanceNorm2d(6), nn.Flatten(), nn.Linear(54, 3))
    x = torch.randn(6, 6, 3, 3)
    net[0].bias.data[:] = 0.1
    for i in range(6):
        x[i, i] = x[i, i].abs() + 3  # far above the mean of its group
    j = gradients(net.double(), x.double())["0.bias"]
    vanishes = torch.eye(6, dtype=torch.bool)[:, None].expand_as(j)
    share = j.abs() / j.abs().amax(-1, keepdim=True)
    assert share[vanishes].max() < 1e-12
    assert share[~vanishes & (j != 0)].min() > 1e-3, "a channel without a positive entry has no gradient at all"
    expected = reduced(naive({"b": j}, {"b": torch.where(vanishes, 0, j)}), "blocks")
    found = sign_ntk(net.to(dtype), x.to(dtype), params="0.bias", reduction="blocks", engine=engine)
    assert error(found, expected) < 100 * torch.finfo(dtype).eps


def test_a_tied_weight_has_one_sign() -> None:
    """The signs of the sum of a weight's uses, which are not the sum of signs."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(4, 3)
    net[2].weight = net[0].weight
    j = gradients(net.double(), x.double())
    assert error(sign_ntk(net, x.double()), reduced(naive(j, j), "trace")) < 1e-12
    apart = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    apart.load_state_dict(net.state_dict())
    assert error(sign_ntk(apart, x.double()), reduced(naive(j, j), "trace")) > 0.01, "negative control"


WIDE = {
    "convolution": lambda: (nn.Sequential(nn.Conv1d(64, 512, 9), nn.Flatten(), nn.Linear(2048, 8)), (64, 12)),
    "linear": lambda: (nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 8)), (512,)),
    "recurrent": lambda: (nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Flatten(), nn.Linear(1024, 8)), (4, 256)),
}


@pytest.mark.parametrize("name", WIDE)
def test_it_never_holds_the_jacobian(name: str) -> None:
    """At its peak less than a quarter of J [n, C, P] in float64, for a model that would fill it."""
    torch.manual_seed(0)
    net, shape = WIDE[name]()
    net, x = net.eval(), torch.randn(96, *shape)
    whole = 96 * 8 * sum(p.numel() for p in net.parameters()) * 8
    network, engine = Network(net), Layerwise()
    with leave_no_trace(net):
        peak = peak_bytes(lambda: engine.kernel(network, x, layers=None, signed=True))
    assert peak < whole / 4, f"{name}: {peak / 2**20:.0f} of {whole / 2**20:.0f} MiB"
