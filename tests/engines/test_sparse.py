"""Models with sparse matrices: kernels are the dense ones', and plans are made; sparse parameters are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor
from ntkwatch.engines import UnsupportedModel, empirical_ntk, layer_ntks, plan
from tests.support.oracles import naive_ntk, reduced

pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
N = 9


def adjacency() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(N, N, generator=generator, dtype=torch.float64)
    return dense * (dense < 0.3) + torch.eye(N, dtype=torch.float64)


def twice(dense: Tensor) -> Tensor:
    """Every entry in two halves."""
    a = dense.to_sparse_coo().coalesce()
    return torch.sparse_coo_tensor(torch.cat([a.indices()] * 2, 1), torch.cat([a.values() / 2] * 2), a.shape)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda dense: dense,
    "COO": Tensor.to_sparse_coo,
    "COO, not coalesced": twice,
    "CSR": Tensor.to_sparse_csr,
    "CSC": Tensor.to_sparse_csc,
}


class Base(nn.Module):
    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("nodes", torch.randn(N, 4))
        self.keep(a)

    def keep(self, a: Tensor) -> None:
        self.register_buffer("graph", a)

    def forward(self, chosen: Tensor) -> Tensor:
        return self.product(self.b(torch.relu(self.product(self.a(self.nodes)))))[chosen]

    def product(self, h: Tensor) -> Tensor:
        return torch.sparse.mm(self.graph, h) if self.graph.layout is not torch.strided else self.graph @ h


class Operator(Base):
    """By the operator, which has another formula."""

    def product(self, h: Tensor) -> Tensor:
        return self.graph @ h


class Closure(Base):
    def keep(self, a: Tensor) -> None:
        self.product = lambda h: a @ h  # type: ignore[method-assign]


class Attribute(Base):
    def keep(self, a: Tensor) -> None:
        self.graph = a


class Frozen(Base):
    def keep(self, a: Tensor) -> None:
        self.graph = nn.Parameter(a, requires_grad=False)


class Features(Base):
    """The matrix acts on the features of every example."""

    def forward(self, chosen: Tensor) -> Tensor:
        h = torch.stack([self.nodes[chosen, 0] + k for k in range(N)], 1)
        return self.b(torch.tanh(self.a(self.product(h.T).T[:, :4])))


class Weighted(Base):
    """A sparse matrix of trained values."""

    def keep(self, a: Tensor) -> None:
        entries = (a.to_dense() if a.layout is not torch.strided else a).to_sparse_coo().coalesce()
        self.at, self.values = entries.indices(), nn.Parameter(entries.values())
        self.dense = a.layout is torch.strided

    def product(self, h: Tensor) -> Tensor:
        graph = torch.sparse_coo_tensor(self.at, self.values, (N, N))
        return graph.to_dense() @ h if self.dense else torch.sparse.mm(graph, h)


class Inputs(Base):
    """Examples made sparse on their way."""

    def forward(self, chosen: Tensor) -> Tensor:
        x = self.nodes[chosen].relu()
        return self.b(torch.tanh(torch.sparse.mm(x.to_sparse(), self.a.weight.T) + self.a.bias))


MODELS = (Base, Operator, Closure, Attribute, Frozen, Features, Weighted, Inputs)


def made(kind: type[Base], form: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind(FORMS[form](adjacency())).double(), torch.tensor([0, 3, 4, 7, 8, 2])


CASES = [*((Base, form) for form in FORMS), *((kind, form) for kind in MODELS[1:] for form in ("COO", "CSR"))]


@pytest.mark.parametrize(("kind", "form"), CASES, ids=[f"{kind.__name__}, {form}" for kind, form in CASES])
def test_sparse_matrices(kind: type[Base], form: str) -> None:
    model, chosen = made(kind, form)
    theta = naive_ntk(*made(kind, "dense"))
    assert torch.allclose(empirical_ntk(model, chosen, reduction="full"), theta, rtol=1e-9, atol=1e-12)
    layers = layer_ntks(model, chosen, chunk_size=4)
    assert torch.allclose(sum(layers.values()), reduced(theta, "trace"), rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = plan(model, chosen)
    assert {row.name for row in found.rows()} >= trained
    assert found.peak_bytes > 0
    assert plan(model, chosen, reduction="full", layers="trace", chunk_size=2).chunk_size == 2
    assert torch.allclose(Monitor(model, chosen).measure(0).kernel, reduced(theta, "trace"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["COO", "CSR"])
@pytest.mark.parametrize("kind", [Base, Inputs])
def test_torch_func_refuses_sparse_matrices_by_its_own_words(kind: type[Base], form: str) -> None:
    model, chosen = made(kind, form)
    for ask in (empirical_ntk, plan):
        with pytest.raises(UnsupportedModel, match=r"torch\.func cannot transform this model"):
            ask(model, chosen, engine="functional")  # type: ignore[operator]


class Sparse(nn.Module):
    """A parameter that is sparse itself."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.graph, self.a = nn.Parameter(a), nn.Linear(4, 3)
        self.register_buffer("nodes", torch.randn(N, 4))

    def forward(self, chosen: Tensor) -> Tensor:
        return torch.sparse.mm(self.graph, self.a(self.nodes))[chosen]


@pytest.mark.parametrize("form", ["COO", "COO, not coalesced", "CSR", "CSC"])
def test_sparse_parameters_are_refused_by_name(form: str) -> None:
    model, chosen = made(Sparse, form)  # type: ignore[arg-type]
    asked: list[Callable[[], Any]] = [
        lambda: empirical_ntk(model, chosen),
        lambda: layer_ntks(model, chosen),
        lambda: plan(model, chosen),
        lambda: Monitor(model, chosen),
    ]
    for ask in asked:
        with pytest.raises(UnsupportedModel, match=r"parameter graph is sparse .*torch\.sparse_coo_tensor"):
            ask()
    assert empirical_ntk(model, chosen, params="a.*").shape == (6, 6)
