"""A row at padding_idx has no gradient, although the padding token is looked up: from every door to a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkwatch.engines import empirical_ntk
from ntkwatch.engines.auto import choose
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from tests.support.oracles import naive_layers, reduced

ROWS, PAD = 7, 2


class Model(nn.Module):
    """`look` gives [n, 4] or [n, T, 4] of tokens [n, T]; the table's gradient is all that it has of them."""

    def __init__(self, look: Callable[[Any, Tensor], Tensor], table: nn.Module) -> None:
        super().__init__()
        self.table, self.look, self.out = table, look, nn.Linear(4, ROWS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.look(self, tokens))
        return self.out(h.mean(1) if h.ndim == 3 else h)[:, :3]


def embedding(**more: Any) -> nn.Embedding:
    found = nn.Embedding(ROWS, 4, padding_idx=PAD, **more)
    nn.init.normal_(found.weight)  # the row of the padding too: without a gradient it stays as it is
    return found


def bag(mode: str) -> nn.EmbeddingBag:
    found = nn.EmbeddingBag(ROWS, 4, padding_idx=PAD, mode=mode)
    nn.init.normal_(found.weight)
    return found


def tied(m: Any, tokens: Tensor) -> Tensor:
    return m.table(tokens) @ m.table.weight[:4].T


LOOKS: dict[str, Callable[[], Model]] = {
    "Embedding": lambda: Model(lambda m, t: m.table(t), embedding()),
    "Embedding, the last row": lambda: Model(lambda m, t: m.table(t), nn.Embedding(ROWS, 4, padding_idx=-1)),
    "Embedding, sparse gradients": lambda: Model(lambda m, t: m.table(t), embedding(sparse=True)),
    "Embedding, twice": lambda: Model(lambda m, t: m.table(t) * m.table(t.flip(1)), embedding()),
    "Embedding, tokens first": lambda: Model(lambda m, t: m.table(t.T).transpose(0, 1), embedding()),
    "F.embedding": lambda: Model(lambda m, t: functional.embedding(t, m.table.weight, PAD), nn.Embedding(ROWS, 4)),
    "F.embedding, from the end": lambda: Model(
        lambda m, t: functional.embedding(t, m.table.weight, PAD - ROWS), nn.Embedding(ROWS, 4)
    ),
    "F.embedding, row 0": lambda: Model(lambda m, t: functional.embedding(t, m.table.weight, 0), nn.Embedding(ROWS, 4)),
    "EmbeddingBag, sum": lambda: Model(lambda m, t: m.table(t), bag("sum")),
    "EmbeddingBag, mean": lambda: Model(lambda m, t: m.table(t), bag("mean")),
    "EmbeddingBag, max": lambda: Model(lambda m, t: m.table(t), bag("max")),
    "tied to the output": lambda: Model(tied, embedding()),
    "of a table made from the weight": lambda: Model(
        lambda m, t: functional.embedding(t, torch.tanh(m.table.weight), PAD), nn.Embedding(ROWS, 4)
    ),
}


@pytest.mark.parametrize("name", LOOKS)
def test_padding_has_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = LOOKS[name]().double()
    pad = {"Embedding, the last row": ROWS - 1, "F.embedding, row 0": 0}.get(name, PAD)
    tokens = torch.randint(0, ROWS, (6, 5))
    tokens[:, 2:4] = pad
    tokens[0] = pad  # an example of nothing else
    theirs = naive_layers(model, tokens)
    unpadded = torch.where(tokens == pad, (pad + 1) % ROWS, tokens)
    assert not torch.allclose(theirs["table.weight"], naive_layers(model, unpadded)["table.weight"]), f"{name}: in use"
    for reduction in ("full", "trace"):
        with leave_no_trace(model):  # the rules themselves: a choice of engines would take another one
            network = Network(model)
            found = Layerwise().kernel(network, tokens, reduction=reduction, layers=reduction).layers  # type: ignore[arg-type]
        for parameter, right in theirs.items():
            off = (found[parameter] - reduced(right, reduction)).abs().max() / right.abs().max().clamp(min=1e-9)
            assert off < 1e-10, f"{name}: {reduction} of {parameter} is off by {off:.1e}"
    if "tied" not in name:
        assert found["table.weight"][0].abs().max() == 0, f"{name}: an example of padding alone has no gradient"
    assert choose(network, tokens).reason.startswith("layerwise: agrees"), name
    whole = reduced(sum(theirs.values()), "trace")  # type: ignore[arg-type]
    assert torch.allclose(empirical_ntk(model, tokens, chunk_size=4), whole, rtol=1e-10, atol=1e-12), f"{name}: blocks"
