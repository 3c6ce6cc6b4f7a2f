"""Cases of strange layouts: routing, windows, batches that move, masks, convolutions in every form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Lambda, case

Made = tuple[nn.Module, Any]


@case(2, "top-2 routing, tokens of one example to several experts, gates multiplied in", functional=False)
def top_k_routing() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = m.gate(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(m.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return m.out(out.view_as(x).mean(1))

    experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)) for _ in range(4))
    return Lambda(forward, gate=nn.Linear(4, 4), experts=experts, out=nn.Linear(4, 2)), torch.randn(3, 5, 4)


@case(2, "windows rolled and partitioned into the batch, with a bias per window")
def shifted_windows() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        t = x.roll((-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = m.qkv(t).chunk(3, -1)
        a = (q @ k.transpose(1, 2) + m.bias).softmax(-1) @ v
        a = m.proj(a).view(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c).roll((1, 1), (1, 2))
        return m.out((x + a).mean((1, 2)))

    net = Lambda(forward, qkv=nn.Linear(3, 9), proj=nn.Linear(3, 3), out=nn.Linear(3, 2), bias=torch.randn(4, 4))
    return net, torch.randn(3, 4, 4, 3)


@case(2, "as many positions as examples, as many channels as both")
def everything_three() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x.transpose(0, 1)).relu().transpose(0, 1)
        h = torch.einsum("nts,ij->nij", h, m.w) + m.b(x.transpose(1, 2)).tanh()
        return m.out(h.sum(1))

    return Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3), out=nn.Linear(3, 2), w=torch.randn(3, 3)), torch.randn(
        3, 3, 3
    )


@case(2, "one example")
def one_example() -> Made:
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)), torch.randn(1, 2, 4)


@case(2, "two examples, two features, two positions")
def two_examples() -> Made:
    net = Lambda(lambda m, x: m.b(m.a(x).relu()).mean(1), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    return net, torch.randn(2, 2, 2)


@case(2, "every example has zero gradient in one layer, one example in all")
def zero_gradients() -> Made:
    net = Lambda(
        lambda m, x: m.c((m.a(x) - 100).relu() + m.b(x)) * (x[:, :1] != 0), a=nn.Linear(3, 4), b=nn.Linear(3, 4),
        c=nn.Linear(4, 2, bias=False),
    )  # fmt: skip
    return net, torch.randn(5, 3) * torch.tensor([[1.0], [1], [0], [1], [1]])


@case(2, "the same example several times")
def duplicates() -> Made:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2, 3)[[0, 1, 0, 0, 1]]


@case(2, "a cache that grows with every call")
def growing_cache() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        keys: list[Tensor] = []
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            keys.append(m.k(x[:, t]))
            stacked = torch.stack(keys, 1)
            h = h + torch.einsum("nd,ntd->nt", m.q(x[:, t]), stacked).softmax(-1).unsqueeze(1).bmm(stacked)[:, 0]
        m.__dict__["cache"] = keys
        return m.out(h)

    return Lambda(forward, q=nn.Linear(3, 4), k=nn.Linear(3, 4), out=nn.Linear(4, 2)), torch.randn(3, 4, 3)


@case(2, "complex weights and a Fourier transform")
def complex_weights() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(m.a(x), dim=1) * torch.view_as_complex(m.w)
        return m.out(torch.fft.irfft(spectrum, n=x.shape[1], dim=1).mean(1))

    return Lambda(forward, a=nn.Linear(3, 4), out=nn.Linear(4, 2), w=torch.randn(4, 4, 2)), torch.randn(3, 6, 3)


@case(2, "weights in Fourier space, mixed by complex einsum (a Fourier neural operator)")
def fourier_operator() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :3]
        mixed = torch.einsum("nix,iox->nox", modes, torch.complex(m.real, m.imaginary))
        return m.out((torch.fft.irfft(mixed, n=x.shape[-1]) + m.skip(x)).relu().mean(-1))

    net = Lambda(
        forward, real=torch.randn(2, 3, 3), imaginary=torch.randn(2, 3, 3), skip=nn.Conv1d(2, 3, 1), out=nn.Linear(3, 2)
    )
    return net, torch.randn(3, 2, 8)


@case(2, "einsums with weights in every place, and with the batch last")
def einsums() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum("ntd,hdk->hntk", x, m.w)
        h = torch.einsum("hntk,hsk->nhts", h, m.keys).softmax(-1)
        y = torch.einsum("nhts,hsd->dtn", h, m.values)
        return torch.einsum("dtn,dc,t->nc", y, m.out, m.time)

    return Lambda(
        forward, w=torch.randn(2, 3, 4), keys=torch.randn(2, 5, 4), values=torch.randn(2, 5, 3), out=torch.randn(3, 2),
        time=torch.randn(4),
    ), torch.randn(3, 4, 3)  # fmt: skip


@case(2, "a bilinear form of two inputs in a tuple")
def bilinear_tuple() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bi, self.out = nn.Bilinear(3, 4, 5), nn.Linear(5, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out(self.bi(a, b).tanh())

    return Net(), (torch.randn(4, 3), torch.randn(4, 4), torch.zeros(4, dtype=torch.long))


@case(2, "grouped, dilated, strided and transposed, in one, two and three dimensions")
def every_convolution() -> Made:
    net = Lambda(
        lambda m, x: m.out(
            torch.cat(
                [
                    m.t1(m.c1(x.flatten(2))).mean(2), m.t2(m.c2(x)).mean((2, 3)),
                    m.t3(m.c3(x[:, :, None])).mean((2, 3, 4)),
                ], 1,
            )
        ),
        c1=nn.Conv1d(4, 6, 5, stride=3, padding=2, dilation=2, groups=2), t1=nn.ConvTranspose1d(6, 4, 3, 2, groups=2),
        c2=nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(0, 1), groups=4, padding_mode="reflect"),
        t2=nn.ConvTranspose2d(4, 4, 3, stride=(1, 2), padding=1, dilation=2, groups=4, bias=False),
        c3=nn.Conv3d(4, 2, (1, 3, 3), dilation=(1, 2, 1)), t3=nn.ConvTranspose3d(2, 4, 2, groups=2),
        out=nn.Linear(12, 2),
    )  # fmt: skip
    return net, torch.randn(3, 4, 5, 6)


@case(2, "convolutions whose weight is shared over scales and flipped")
def scales() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.conv.weight
        h = m.conv(x) + F.conv2d(x, w.flip(-1), padding=1) + F.conv2d(x, w.transpose(2, 3), m.conv.bias, padding=1)
        return (h + F.interpolate(m.conv(F.avg_pool2d(x, 2)), scale_factor=2)).relu().mean((2, 3))

    return Lambda(forward, conv=nn.Conv2d(2, 2, 3, padding=1)), torch.randn(3, 2, 6, 6)


@case(3, "PReLU per channel on images, a learned threshold, a learned power", functional=False)
def learned_activations() -> Made:
    net = Lambda(
        lambda m, x: m.p(m.conv(x)).sub(m.threshold).relu().add(0.1).pow(m.power).mean((2, 3)),
        conv=nn.Conv2d(2, 3, 2), p=nn.PReLU(3), threshold=torch.randn(3, 1, 1), power=torch.tensor(1.3),
    )  # fmt: skip
    return net, torch.randn(3, 2, 4, 4)


@case(2, "bags of unequal size with weights per sample, by offsets")
def embedding_bags() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        offsets = torch.arange(0, x.numel(), x.shape[1], device=x.device)
        weighted = m.weighted(x.reshape(-1), offsets, per_sample_weights=m.scale[x.reshape(-1)])
        return m.out(weighted + m.mean(x))

    return Lambda(
        forward, weighted=nn.EmbeddingBag(7, 4, mode="sum"), mean=nn.EmbeddingBag(7, 4, mode="mean"),
        scale=torch.rand(7), out=nn.Linear(4, 2),
    ), torch.randint(0, 7, (4, 5))  # fmt: skip


@case(2, "embedding bag by maximum")
def embedding_bag_max() -> Made:
    net = Lambda(lambda m, x: m.out(m.bag(x).tanh()), bag=nn.EmbeddingBag(7, 4, mode="max"), out=nn.Linear(4, 2))
    return net, torch.randint(0, 7, (4, 5))


@case(2, "attention and encoder-decoder with causal, padding and additive masks")
def masked_transformer() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t, self.out = nn.Transformer(8, 2, 1, 1, 12, dropout=0.1, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            hidden = padding.to(x.dtype) * -1e9
            h = self.t(x, x, tgt_mask=causal, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
            return self.out(h[:, -1])

    padding = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()
    return Net(), {"x": torch.randn(3, 4, 8), "padding": padding}


@case(2, "grouped-query attention by scaled_dot_product_attention, causal")
def grouped_query() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = m.q(x).view(n, t, 4, 2).transpose(1, 2)
        k, v = (f(x).view(n, t, 2, 2).transpose(1, 2).repeat_interleave(2, 1) for f in (m.k, m.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.out(h.transpose(1, 2).flatten(2)).mean(1)

    return Lambda(forward, q=nn.Linear(6, 8), k=nn.Linear(6, 4), v=nn.Linear(6, 4), out=nn.Linear(8, 2)), torch.randn(
        3, 4, 6
    )
