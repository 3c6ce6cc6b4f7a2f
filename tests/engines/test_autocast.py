"""Models that enter autocast on their way: exact to what their half precision rounds, by the layerwise engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import empirical_ntk
from ntkwatch.engines.auto import choose
from ntkwatch.engines.base import noise_floor
from ntkwatch.engines.layouts import digits, find_layout
from ntkwatch.model import Network
from tests.support.device import placed
from tests.support.oracles import naive_ntk, reduced


class Inside(nn.Module):
    """`net` under autocast, or only its last module outside of it."""

    def __init__(self, net: nn.Sequential, dtype: torch.dtype, part: bool) -> None:
        super().__init__()
        self.net, self.dtype, self.part = net, dtype, part

    def forward(self, x: Tensor) -> Tensor:
        inside = self.net[:-1] if self.part else self.net
        with torch.autocast(x.device.type, self.dtype):
            h = inside(x)
        return self.net[-1](h.float()) if self.part else h.float()


def mlp() -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 3)), torch.randn(7, 6)


def cnn() -> tuple[nn.Sequential, Tensor]:
    layers = nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 5, 3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(180, 3)), torch.randn(5, 2, 8, 8)


def attention() -> tuple[nn.Sequential, Tensor]:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(4, 8), block, nn.LayerNorm(8), nn.Flatten(), nn.Linear(40, 3)), torch.randn(5, 5, 4)


NETS: dict[str, Callable[[], tuple[nn.Sequential, Tensor]]] = {"MLP": mlp, "CNN": cnn, "attention": attention}


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_autocast_inside_is_followed(name: str, dtype: torch.dtype, part: bool) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]()
    module, x = placed(Inside(net, dtype, part).eval(), x)
    network = Network(module)
    assert choose(network, x).engine.name == "layerwise"
    kernel = empirical_ntk(module, x, reduction="full")
    naive = reduced(naive_ntk(module, x).double(), "full")
    off = ((kernel - naive).norm() / naive.norm()).item()
    limit = 4 * torch.finfo(dtype).eps  # one example alone may round otherwise than in a batch
    assert off < limit, f"{name}, {dtype}: {off:.1e}"
    assert network.rounding(torch.float32) == dtype
    assert noise_floor(network.rounding(torch.float32), "double") > noise_floor(torch.float32, "double")


def test_layouts_of_half_precision_are_not_guessed() -> None:
    """A sum over examples whose terms happen to be near a power of two of each other belongs to nobody."""
    g = torch.tensor([[1.0, 0.9, 1.1], [1.2, 1.0, 0.8], [0.9, 1.1, 1.0]])  # 3 examples' terms of 3 entries
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes = digits(3, 4)
        coded = [(g * code[:, None]).sum(0).to(dtype) for code in codes]
        assert find_layout(g.sum(0).to(dtype), coded, 3, 4)[0] is None, dtype
