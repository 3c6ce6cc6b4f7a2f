"""Examples that are coupled: in any place of a model, in batches of any size that is run."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch.engines import UnsupportedModel, empirical_ntk, layer_ntks, sign_ntk
from ntkwatch.engines.auto import choose
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from ntkwatch.output_scaling import output_scale
from tests.support.oracles import naive_ntk, reduced

COUPLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "relative to row 0": lambda h: h - h[:1],
    "over the largest": lambda h: h / h.abs().max(),
    "over the largest, held fixed": lambda h: h / h.detach().abs().max(),
    "times the maximum": lambda h: h * h.max(),
    "less the median": lambda h: h - h.median(),
}


class Coupled(nn.Module):
    """Couples the examples of batches of some sizes."""

    def __init__(self, couple: Callable[[Tensor], Tensor], sizes: Container[int] = range(1, 1000)) -> None:
        super().__init__()
        self.a, self.b, self.couple, self.sizes = nn.Linear(6, 16), nn.Linear(16, 3), couple, sizes

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(self.couple(h) if len(h) in self.sizes else h)


@pytest.mark.parametrize("n", [2, 5, 20, 70])
@pytest.mark.parametrize("name", COUPLINGS)
def test_coupled_examples_are_refused_wherever_the_coupling_sits(name: str, n: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model, x = Coupled(COUPLINGS[name]).double(), torch.randn(n, 6).double()
        with pytest.raises(UnsupportedModel, match="other examples"):
            empirical_ntk(model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("start", ["a readout of zeros", "less itself at the start"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_coupling_shows_where_outputs_are_zero(name: str, start: str, dtype: torch.dtype) -> None:
    """The kernel is not zero there, and it is coupled."""
    torch.manual_seed(0)
    model, x = Coupled(COUPLINGS[name]).to(dtype), torch.randn(9, 6).to(dtype)
    if start == "a readout of zeros":
        nn.init.zeros_(model.b.weight)
        nn.init.zeros_(model.b.bias)
    else:
        model = output_scale(model, 0.1).eval()
    assert float(model(x).detach().abs().max()) == 0
    with pytest.raises(UnsupportedModel, match="other examples"):
        empirical_ntk(model, x)


def test_weak_coupling_of_ordinary_outputs_is_still_found() -> None:
    """What excuses a small difference is its size against outputs at other weights, not that there is one."""
    for strength in (2e-3, 1e-2):
        torch.manual_seed(0)
        model, x = Coupled(lambda h, s=strength: h + s * h.mean(0)), torch.randn(9, 6)  # type: ignore[misc]
        with pytest.raises(UnsupportedModel, match="other examples"):
            empirical_ntk(model, x)


# n1, n2 (None: x1 alone), probes per block, the sizes of batch in which examples are coupled.
LATER: dict[str, tuple[int, int | None, int | None, Container[int]]] = {
    "x2 is longer": (5, 12, None, range(10, 1000)),
    "x2 is shorter": (12, 5, None, range(4, 9)),
    "x2 of two rows, x1 of one": (1, 2, None, range(2, 1000)),
    "x2 of more than is run at first": (70, 90, None, range(80, 1000)),
    "blocks": (24, None, 7, range(5, 9)),
    "the last block": (24, None, 7, range(3, 4)),
    "blocks of x2": (3, 24, 7, range(5, 9)),
    "more rows than are run at first": (80, None, None, range(70, 1000)),
}


@pytest.mark.parametrize("couple", COUPLINGS)
@pytest.mark.parametrize("name", LATER)
def test_coupling_is_found_in_batches_of_any_size_that_is_run(name: str, couple: str) -> None:
    torch.manual_seed(0)
    n1, n2, chunk, sizes = LATER[name]
    model, x1 = Coupled(COUPLINGS[couple], sizes).double(), torch.randn(n1, 6).double()
    x2 = None if n2 is None else torch.randn(n2, 6).double()
    for measure in (empirical_ntk, layer_ntks, sign_ntk):
        with pytest.raises(UnsupportedModel, match="other examples"):
            measure(model, x1, x2, chunk_size=chunk)
    if n2 is not None and chunk is None and n2 <= 64:
        with pytest.raises(UnsupportedModel, match="other examples"):
            empirical_ntk(model, x1, x2, engine="functional")


@pytest.mark.parametrize("name", LATER)
def test_coupling_in_batches_of_no_size_that_is_run_is_no_reason_to_refuse(name: str) -> None:
    torch.manual_seed(0)
    n1, n2, chunk, _ = LATER[name]
    asked = [n for n in (n1, n2) if n is not None]
    run = {min(n1, 64), *range(4), *(min(chunk or n, n) for n in asked), *(n % chunk for n in asked if chunk)}
    others = [size for size in range(100) if size not in run]
    model, x1 = Coupled(COUPLINGS["times the maximum"], others).double(), torch.randn(n1, 6).double()
    x2 = None if n2 is None else torch.randn(n2, 6).double()
    found = empirical_ntk(model, x1, x2, chunk_size=chunk)
    assert torch.allclose(found, reduced(naive_ntk(model, x1, x2), "trace"), rtol=1e-10), name


def test_sizes_are_looked_at_once() -> None:
    """A monitor measures the same probes again and again."""
    model, x = Coupled(COUPLINGS["less the median"], ()).double(), torch.randn(80, 6).double()
    network, passes = Network(model), []
    model.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    with leave_no_trace(model):
        engine: Any = choose(network, x).engine
        for _ in range(3):
            passes.clear()
            engine.kernel(network, x, chunk_size=30)
    assert sorted(passes) == [20, 30, 30, 30, 30, 30], passes  # six pairs of blocks, each row of which shares one
