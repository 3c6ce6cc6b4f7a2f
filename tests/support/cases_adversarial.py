"""Cases that have fooled engines: in-place, tied, reused, raw, checkpointed, routed, coupled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from tests.support.cases import Lambda, case


@case(2, "the activation overwrites the layer's output")
def inplace_activation() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.SiLU(inplace=True), nn.Linear(6, 2)
    ), torch.randn(4, 4)


@case(2, "add_, mul_ and slice assignment", functional=False)
def inplace_arithmetic() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h.add_(m.shift).mul_(m.scale)
        y = torch.zeros(len(x), 6, dtype=x.dtype, device=x.device)
        y[:, 1:5] = h[:, :4]
        y[:, 0] = m.first
        return m.b(y)

    return Lambda(
        forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2), shift=torch.randn(6), scale=torch.randn(6), first=torch.randn(1)
    ), torch.randn(4, 4)


@case(4, "decoder tied to encoder by transposition")
def tied_linear() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.t()), a=nn.Linear(4, 3))
    return net, torch.randn(5, 4)


@case(6, "embedding tied to the readout")
def tied_embedding() -> tuple[nn.Module, Any]:
    emb, out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    out.weight = emb.weight
    return Lambda(lambda m, x: m.out(m.emb(x).mean(1).tanh()), emb=emb, out=out), torch.randint(0, 6, (4, 3))


@case(2, "one layer called three times")
def reused_layer() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.out(m.a(m.a(m.a(x).relu()).tanh())), a=nn.Linear(4, 4), out=nn.Linear(4, 2))
    return net, torch.randn(4, 4)


@case(2, "one convolution called at two sizes")
def reused_conv() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.a(m.a(x).relu()).mean((2, 3)), a=nn.Conv2d(2, 2, 3))
    return net, torch.randn(3, 2, 7, 7)


@case(2, "one module under two names")
def shared_module() -> tuple[nn.Module, Any]:
    a = nn.Linear(4, 4)
    return nn.Sequential(a, nn.Tanh(), a, nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(4, 4)


@case(2, "class token, position table, layer scale")
def raw_parameters() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1) + m.table
        return m.out((x + m.gamma * m.b(x).relu())[:, 0] * m.temperature)

    return Lambda(
        forward,
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 4),
        out=nn.Linear(4, 2),
        token=torch.randn(1, 1, 4),
        table=torch.randn(4, 4),
        gamma=torch.randn(4),
        temperature=torch.tensor(1.5),
    ), torch.randn(3, 3, 3)


@case(2, "x @ W, W @ x, einsum per head")
def raw_products() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x @ m.w1
        h = (m.w2 @ h.transpose(1, 2)).transpose(1, 2).tanh()
        h = torch.einsum("nthd,hde->nthe", h.unflatten(2, (2, 2)), m.heads).flatten(2)
        return torch.einsum("ntd,dc->nc", h, m.w3) + torch.tensordot(h[:, 0], m.w3, 1)

    return Lambda(
        forward, w1=torch.randn(3, 5), w2=torch.randn(4, 5), heads=torch.randn(2, 2, 3), w3=torch.randn(6, 2)
    ), torch.randn(3, 4, 3)


@case(2, "position embeddings looked up once for all examples, T = 3 = n")
def learned_positions() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.tok(x) + m.pos(torch.arange(x.shape[1], device=x.device)[None])
        return m.out(m.ln(h).relu().mean(1))

    return Lambda(
        forward, tok=nn.Embedding(6, 4), pos=nn.Embedding(5, 4), ln=nn.LayerNorm(4), out=nn.Linear(4, 2)
    ), torch.randint(0, 6, (3, 3))


@case(2, "a table of relative positions, indexed, shared by two layers")
def relative_bias() -> tuple[nn.Module, Any]:
    index = (torch.arange(4)[:, None] - torch.arange(4)[None]) + 3

    def forward(m: Any, x: Tensor) -> Tensor:
        bias = m.table[index].permute(2, 0, 1)
        for layer in (m.a, m.b):
            q = layer(x)
            x = x + (torch.einsum("ntd,nsd->nts", q, x)[:, None] + bias).softmax(-1).mean(1) @ q
        return m.out(x.mean(1))

    return Lambda(
        forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3), out=nn.Linear(3, 2), table=torch.randn(7, 2)
    ), torch.randn(3, 4, 3)


@case(2, "tokens flattened into the batch, and interleaved the other way")
def flattened_tokens() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, d = x.shape
        h = m.a(x.reshape(n * t, d)).relu()
        h = m.b(h.view(n, t, -1).transpose(0, 1).reshape(t * n, -1)).tanh()
        return m.out(h.view(t, n, -1).mean(0))

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 2)), torch.randn(3, 5, 3)


@case(2, "images cut into windows before convolution and attention")
def windows() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        n = len(x)
        w = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 2, 2, 2)
        h = m.conv(w).flatten(1).relu()
        return m.out(m.lin(h).view(n, 4, -1).mean(1))

    return Lambda(forward, conv=nn.Conv2d(2, 3, 2, padding=1), lin=nn.Linear(27, 4), out=nn.Linear(4, 2)), torch.randn(
        3, 2, 4, 4
    )


@case(2, "examples in chunks, so that a layer sees fewer rows")
def chunked_forward() -> tuple[nn.Module, Any]:
    net = Lambda(
        lambda m, x: m.b(torch.cat([m.a(part).relu() for part in x.split(2)])), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )
    return net, torch.randn(5, 3)


@case(2, "rows in reverse, and repeated twice")
def permuted_rows() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x.flip(0)).relu().repeat_interleave(2, 0)
        return m.b(h).view(len(x), 2, -1).sum(1).flip(0)

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(4, 3)


@case(2, "tokens sent to experts by their own values", functional=False)
def mixture_of_experts() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = m.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate((m.e0, m.e1, m.e2)):
            rows = (chosen == i).nonzero()[:, 0]
            out.index_add_(0, rows, expert(flat[rows]).tanh() * weights[rows, None])
        return m.out(out.view_as(x).mean(1))

    experts = {f"e{i}": nn.Linear(4, 4) for i in range(3)}
    return Lambda(forward, gate=nn.Linear(4, 3), out=nn.Linear(4, 2), **experts), torch.randn(5, 3, 4)


@case(2, "checkpointed without re-entry", functional=False)
def checkpointed() -> tuple[nn.Module, Any]:
    net = Lambda(
        lambda m, x: m.out(checkpoint(m.body, x, use_reentrant=False)),
        body=nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)),
        out=nn.Linear(4, 2),
    )
    return net, torch.randn(4, 4)


@case(2, "weight norm, spectral norm, orthogonal")
def parametrized() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(5, 4)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )
    return net, torch.randn(4, 4)


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


@case(2, "a parametrization of one's own, on a convolution's weight too")
def parametrized_own() -> tuple[nn.Module, Any]:
    conv, lin = parametrizations.weight_norm(nn.Conv2d(2, 3, 2)), nn.Linear(12, 12)
    parametrize.register_parametrization(lin, "weight", _Symmetric())
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), lin, nn.Tanh(), nn.Linear(12, 2)), torch.randn(3, 2, 3, 3)


@case(2, "some parameters frozen, one unused")
def frozen_and_unused() -> tuple[nn.Module, Any]:
    net = Lambda(
        lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 5),
        c=nn.Linear(5, 2),
        unused=nn.Linear(3, 3),
    )
    net.a.requires_grad_(False)
    net.b.bias.requires_grad_(False)
    return net, torch.randn(4, 4)


@case(2, "a dict batch with labels and a mask")
def dict_batch() -> tuple[nn.Module, Any]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
            h = self.a(x).tanh() * mask[..., None]
            return {"logits": self.b(h.sum(1) / mask.sum(1, keepdim=True))}

    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]])
    return Model(), {"x": torch.randn(3, 3, 3), "mask": mask, "labels": torch.tensor([0, 1, 0])}


@case(2, "control flow on the data", functional=False)
def control_flow() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h.relu() if bool(x.isfinite().all()) else h)

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(4, 3)


@case(2, "keeps tensors of its last forward")
def caching_module() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.__dict__["last"] = m.a(x).relu()
        return m.b(m.__dict__["last"])

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(4, 3)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x @ w) ** 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        d = 3 * g * (x @ w) ** 2
        return d @ w.T, x.T @ d


@case(2, "an autograd.Function of one's own around a weight", functional=False)
def custom_function() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.b(_Cube.apply(m.a(x), m.w)), a=nn.Linear(3, 4), b=nn.Linear(3, 2), w=torch.randn(4, 3))
    return net, torch.randn(4, 3)


@case(2, "weights made by a network from an embedding of its own")
def hypernetwork() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.make(m.code.tanh()).view(4, 3)
        return m.out(F.linear(x, w).relu())

    return Lambda(forward, make=nn.Linear(2, 12), out=nn.Linear(4, 2), code=torch.randn(2)), torch.randn(4, 3)


@case(3, "some examples have no gradient in a layer at all")
def dead_examples() -> tuple[nn.Module, Any]:
    net = Lambda(lambda m, x: m.b(m.a(x).relu() * (x[:, :1] > 0)), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return net, torch.randn(6, 3) * torch.tensor([[-1.0], [1], [-1], [1], [1], [-1]]).abs()


@case(2, "BatchNorm without running statistics", refused="BatchNorm1d")
def coupled_batch_norm() -> tuple[nn.Module, Any]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 2))
    return net, torch.randn(5, 3)


@case(4, "the batch mean is taken off", refused="other examples")
def coupled_mean() -> tuple[nn.Module, Any]:
    return Lambda(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(3, 4)), torch.randn(4, 3)
