"""The model zoo: small modules with a batch each, from the plain to the adversarial. `CASES` is all of them.

A case says whether torch.func can do it (`functional`), and what a refusal must name where none exists (`refused`).
Factories build float32 modules; `build(case, dtype)` gives them in another type, in evaluation mode, seeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.model import map_leaves
from tests.support.device import placed


@dataclass(frozen=True)
class Case:
    """name; make() -> (module, batch of n examples); C outputs; what is special."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    outputs: int
    notes: str = ""
    functional: bool = True  # torch.func can transform it
    refused: str = ""  # a kernel does not exist: the refusal's message holds this
    heavy: bool = False  # soak only
    float32_inside: bool = False  # it casts to float32 on its way: gradients of sums are not sums of gradients to 1e-10

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(outputs: int, notes: str = "", **flags: Any) -> Callable[[Callable[[], tuple[nn.Module, Any]]], Any]:
    """Registers a factory under its own name."""

    def register(make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
        CASES.append(Case(make.__name__.strip("_"), make, outputs, notes, **flags))
        return make

    return register


def build(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Any]:
    """The module in evaluation mode and its batch, floats in `dtype`, from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, batch = case.make()
    cast = map_leaves(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, batch)
    return placed(module.to(dtype).eval(), cast)


def find(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)


class Lambda(nn.Module):
    """A module that is a function of its sub-modules and raw parameters."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


# Plain layers ---------------------------------------------------------------------------------------------------------


@case(3)
def linear() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 3), torch.randn(5, 4)


@case(3, "a hidden layer of every activation")
def mlp() -> tuple[nn.Module, Any]:
    layers = [nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers), torch.randn(4, 6)


@case(1, "C = 1, outputs [n]")
def scalar_output() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.b(m.a(x).tanh()).squeeze(1), a=nn.Linear(5, 6), b=nn.Linear(6, 1))
    return net, torch.randn(6, 5)


@case(2, "no bias; one example more than features")
def deep_linear() -> tuple[nn.Module, Any]:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)), nn.Linear(4, 2, bias=False)), torch.randn(
        5, 4
    )


@case(2, "linear over positions")
def positions() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.b(m.a(x).relu()).mean(1), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    return net, torch.randn(4, 3, 5)


@case(3)
def conv1d() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv1d(4, 3, 2, dilation=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    )
    return net, torch.randn(4, 2, 9)


@case(3)
def conv2d() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, (2, 3), stride=(1, 2), padding=(0, 2)),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(100, 3),
    )
    return net, torch.randn(4, 2, 6, 5)


@case(2)
def conv3d() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        nn.Conv3d(2, 3, 2, padding=(1, 0, 1), stride=(1, 2, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(96, 2)
    )
    return net, torch.randn(3, 2, 3, 4, 3)


@case(3, "grouped, depthwise, dilated, 'same' padding with an even kernel")
def conv_groups() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(6, 6, 3, groups=6, padding=2, dilation=2),
        nn.SiLU(),
        nn.Conv2d(6, 3, 2, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return net, torch.randn(3, 4, 5, 5)


@case(2, "circular, reflect, replicate and zeros")
def conv_padding_modes() -> tuple[nn.Module, Any]:
    modes = ("circular", "reflect", "replicate", "zeros")
    net = nn.Sequential(
        *(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode) for mode in modes), nn.Flatten(), nn.Linear(32, 2)
    )
    return net, torch.randn(3, 2, 4, 4)


@case(2)
def conv_transpose() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return net, torch.randn(3, 4, 3, 4)


@case(3, "BatchNorm in evaluation mode, statistics that are not (0, 1)")
def batch_norm() -> tuple[nn.Module, Any]:
    bn1, bn2 = nn.BatchNorm2d(4), nn.BatchNorm1d(5)
    for bn in (bn1, bn2):
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2), nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), bn1, nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), bn2, nn.Tanh(), nn.Linear(5, 3)
    )
    return net, torch.randn(4, 2, 5, 5)


@case(3, "LayerNorm, GroupNorm, InstanceNorm, RMSNorm, with scales that are not 1")
def norms() -> tuple[nn.Module, Any]:
    parts = [
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm([4, 3, 3]),
        nn.LayerNorm(6),
        nn.RMSNorm(6),
    ]
    for part in parts:
        nn.init.normal_(part.weight)
    gn, inorm, ln1, ln2, rms = parts
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        gn,
        nn.ReLU(),
        inorm,
        nn.Conv2d(4, 4, 1),
        ln1,
        nn.Flatten(),
        nn.Linear(36, 6),
        ln2,
        nn.Linear(6, 6),
        rms,
        nn.Linear(6, 3),
    )
    return net, torch.randn(4, 2, 5, 5)


@case(2, "padding_idx, and a bag")
def embedding() -> tuple[nn.Module, Any]:
    net = Lambda(
        lambda m, x: m.out(m.emb(x).relu().mean(1) + m.bag(x)),
        emb=nn.Embedding(7, 4, padding_idx=0),
        bag=nn.EmbeddingBag(7, 4, mode="sum"),
        out=nn.Linear(4, 2),
    )
    return net, torch.randint(0, 7, (4, 5))


@case(2, "sparse gradients", functional=False)
def embedding_sparse() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.out(m.emb(x).tanh().sum(1)), emb=nn.Embedding(7, 4, sparse=True), out=nn.Linear(4, 2))
    return net, torch.randint(0, 7, (4, 5))


@case(2, functional=False)
def prelu_bilinear() -> tuple[nn.Module, Any]:
    net = Lambda(
        lambda m, x: m.bi(m.act1(m.a(x)), m.act2(m.a(x))),
        a=nn.Linear(4, 5),
        act1=nn.PReLU(),
        act2=nn.PReLU(5),
        bi=nn.Bilinear(5, 5, 2),
    )
    return net, torch.randn(4, 4)


@case(2)
def multihead_attention() -> tuple[nn.Module, Any]:
    mha = nn.MultiheadAttention(6, 2, batch_first=True)
    return Lambda(lambda m, x: m.out(m.att(x, x, x)[0].mean(1)), att=mha, out=nn.Linear(6, 2)), torch.randn(3, 4, 6)


@case(2, "different key and value sizes, bias_k and bias_v, zero attention")
def multihead_attention_kv() -> tuple[nn.Module, Any]:
    mha = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    net = Lambda(lambda m, x: m.out(m.att(x, x[..., :4], x[..., 1:])[0].mean(1)), att=mha, out=nn.Linear(6, 2))
    return net, torch.randn(3, 4, 6)


@case(2, "the module that has a fast path")
def transformer_encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
    net = Lambda(lambda m, x: m.out(m.enc(x)[:, 0]), enc=nn.TransformerEncoder(layer, 2), out=nn.Linear(8, 2))
    return net, torch.randn(3, 4, 8)


@case(2, "sequence first: the example is dimension 1 inside")
def transformer_sequence_first() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", norm_first=True)
    return Lambda(lambda m, x: m.out(m.enc(x.transpose(0, 1))[0]), enc=layer, out=nn.Linear(8, 2)), torch.randn(3, 3, 8)


@case(2, "a whole encoder and decoder")
def transformer() -> tuple[nn.Module, Any]:
    net = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    return Lambda(lambda m, x: m.out(m.t(x, x[:, :2]).mean(1)), t=net, out=nn.Linear(8, 2)), torch.randn(3, 4, 8)


@case(2, "two layers, both directions", functional=False)
def lstm() -> tuple[nn.Module, Any]:
    rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    return Lambda(lambda m, x: m.out(m.rnn(x)[0][:, -1]), rnn=rnn, out=nn.Linear(8, 2)), torch.randn(3, 4, 3)


@case(2, "sequence first", functional=False)
def gru() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.out(m.rnn(x.transpose(0, 1))[0][-1]), rnn=nn.GRU(3, 4), out=nn.Linear(4, 2))
    return net, torch.randn(4, 4, 3)


@case(2, functional=False)
def rnn() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.out(m.rnn(x)[1][0]), rnn=nn.RNN(3, 4, batch_first=True), out=nn.Linear(4, 2))
    return net, torch.randn(3, 5, 3)


@case(2)
def lstm_cell() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h, c = m.cell(x[:, t], (h, c))
        return m.out(h)

    return Lambda(forward, cell=nn.LSTMCell(3, 4), out=nn.Linear(4, 2)), torch.randn(3, 4, 3)
