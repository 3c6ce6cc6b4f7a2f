"""Cases of strange constructions: weights that are computed, complex, shared with inputs, scripted, quantised."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from tests.support.cases import Lambda, case

Made = tuple[nn.Module, Any]


@case(2, "the old hooks of weight and spectral normalisation")
def old_normalisations() -> Made:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = weight_norm(nn.Linear(4, 5)), spectral_norm(nn.Linear(5, 5))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 4)


@case(2, "weight norm on a recurrent cell, orthogonal weight on a shared layer")
def parametrized_reused() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = (m.h(h) + m.x(x[:, t])).tanh()
        return m.out(m.h(h))

    return Lambda(
        forward, h=parametrizations.orthogonal(nn.Linear(4, 4)), x=parametrizations.weight_norm(nn.Linear(3, 4)),
        out=nn.Linear(4, 2),
    ), torch.randn(3, 3, 3)  # fmt: skip


@case(2, "checkpointing that enters autograd anew")
def reentrant_checkpoint() -> Made:
    net = Lambda(
        lambda m, x: m.b(checkpoint(lambda h: m.mid(h).relu(), m.a(x), use_reentrant=True)), a=nn.Linear(3, 4),
        mid=nn.Linear(4, 4), b=nn.Linear(4, 2),
    )  # fmt: skip
    return net, torch.randn(4, 3)


@case(2, "a scripted block inside a module")
def scripted() -> Made:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.tanh(self.a(x)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(Block()), nn.Linear(3, 2)), torch.randn(4, 3)


@case(2, "F.linear of a product of two parameters, a low-rank update, a frozen base")
def low_rank() -> Made:
    base = nn.Linear(5, 4).requires_grad_(False)
    net = Lambda(
        lambda m, x: m.out((m.base(x) + F.linear(x, m.up @ m.down) * 2).tanh()), base=base, up=torch.randn(4, 2),
        down=torch.randn(2, 5), out=nn.Linear(4, 2),
    )  # fmt: skip
    return net, torch.randn(4, 5)


@case(2, "weights that are quantised on the way, with a straight-through gradient")
def straight_through() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w + (m.w.round() - m.w).detach()
        s = m.s.clamp(0.1, 2)
        return m.out(F.linear(x, w * s).relu())

    return Lambda(forward, w=torch.randn(4, 3), s=torch.rand(4, 1), out=nn.Linear(4, 2)), torch.randn(5, 3)


@case(2, "batch norm by function, statistics as buffers, weights as parameters")
def functional_batch_norm() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.batch_norm(m.conv(x), m.mean, m.var, m.w, m.b).relu().mean((2, 3)))

    net = Lambda(forward, conv=nn.Conv2d(2, 3, 2), out=nn.Linear(3, 2), w=torch.randn(3), b=torch.randn(3))
    net.register_buffer("mean", torch.randn(3))
    net.register_buffer("var", torch.rand(3) + 0.5)
    return net, torch.randn(3, 2, 4, 4)


@case(2, "buffers that are inputs, and a parameter that is one")
def parameter_as_input() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        queries = m.enc(torch.cat([m.queries, m.fixed]))
        a = (queries @ m.enc(x).transpose(1, 2)).softmax(-1)
        return m.out((a @ x).flatten(1))

    net = Lambda(forward, enc=nn.Linear(3, 4), queries=torch.randn(2, 3), out=nn.Linear(9, 2))
    net.register_buffer("fixed", torch.randn(1, 3))
    return net, torch.randn(3, 5, 3)


@case(2, "prototypes: distances to learned centres, and a learned temperature", functional=False)
def prototypes() -> Made:
    net = Lambda(
        lambda m, x: -torch.cdist(m.a(x), m.centres) * m.temperature.exp(), a=nn.Linear(3, 4),
        centres=torch.randn(2, 4), temperature=torch.tensor(0.3),
    )  # fmt: skip
    return net, torch.randn(5, 3)


@case(2, "a graph network: messages over edges that the batch shares")
def message_passing() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, (sources, targets) = x, torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]], device=x.device)
        for _ in range(2):
            messages = m.message(torch.cat([h[:, sources], h[:, targets]], -1)).relu()
            h = m.update(torch.zeros_like(h).index_add(1, targets, messages) + h).tanh()
        return m.out(h.mean(1))

    return Lambda(forward, message=nn.Linear(6, 3), update=nn.Linear(3, 3), out=nn.Linear(3, 2)), torch.randn(3, 4, 3)


@case(2, "a state-space scan written as a loop and a cumulative product")
def scan() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        decay = m.decay.sigmoid()
        u = m.inp(x)
        state, ys = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            state = state * decay + u[:, t]
            ys.append(state)
        weights = decay.expand(x.shape[1], -1).cumprod(0)
        return m.out(torch.stack(ys, 1).mul(weights).mean(1))

    return Lambda(forward, inp=nn.Linear(3, 4), out=nn.Linear(4, 2), decay=torch.randn(4)), torch.randn(3, 5, 3)


@case(2, "packed sequences of unequal length", functional=False)
def packed_sequences() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.out(self.rnn(packed)[1][0][-1])

    return Net(), {"x": torch.randn(4, 5, 3), "lengths": torch.tensor([5, 2, 4, 3])}


@case(2, "nested tensors of unequal length", refused="nested")
def nested_tensors() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nested = torch.nested.as_nested_tensor([row[:k] for row, k in zip(x, lengths.tolist(), strict=True)])
                h = self.a(nested).relu()
                return self.out(torch.stack([part.mean(0) for part in h.unbind()]))

    return Net(), {"x": torch.randn(4, 5, 3), "lengths": torch.tensor([5, 2, 4, 3])}


@case(2, "gradients of an inner loss as features: second order", functional=False)
def inner_gradient() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.detach().requires_grad_()
        energy = m.b(m.a(h).tanh()).sum()
        (g,) = torch.autograd.grad(energy, h, create_graph=True)
        return m.out(g)

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 1), out=nn.Linear(3, 2)), torch.randn(4, 3)


@case(2, "a solve and an inverse of a matrix of parameters")
def linear_solve() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.a @ m.a.T + torch.eye(3).to(x)
        return m.out(torch.linalg.solve(a, x.T).T + x @ torch.linalg.inv(a))

    return Lambda(forward, a=torch.randn(3, 3), out=nn.Linear(3, 2)), torch.randn(4, 3)


@case(2, "per-example weights made by a network (dynamic convolution)")
def dynamic_convolution() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = m.make(x.mean((2, 3))).view(n * 3, c, 2, 2)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n).view(n, 3, h - 1, w - 1)
        return m.out(m.post(y).relu().mean((2, 3)))

    net = Lambda(forward, make=nn.Linear(2, 24), post=nn.Conv2d(3, 3, 1), out=nn.Linear(3, 2))
    return net, torch.randn(3, 2, 4, 4)


@case(2, "the batch folded into channels of one grouped convolution")
def batch_in_channels() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, c, t = x.shape
        w = m.w.repeat(n, 1, 1)
        return m.out(F.conv1d(x.reshape(1, n * c, t), w, groups=n * c).view(n, c, -1).relu().mean(2))

    return Lambda(forward, w=torch.randn(2, 1, 3), out=nn.Linear(2, 2)), torch.randn(3, 2, 6)


@case(2, "weights stored twice as large and sliced, stacked layers in one tensor")
def sliced_weights() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        for w, b in zip(m.stack.unbind(0), m.bias, strict=True):
            x = (x @ w[:3, :3] + b).tanh()
        return x @ m.stack[0, :3, 3:5] + m.stack.sum() * 0.01

    return Lambda(forward, stack=torch.randn(3, 4, 5), bias=torch.randn(3, 3)), torch.randn(4, 3)


@case(2, "an addmm with scales, baddbmm, addmv, addcmul and lerp")
def scaled_products() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0)
        t = torch.baddbmm(m.b3, h[:, None], m.w3.expand(len(x), -1, -1), beta=3.0, alpha=0.5)[:, 0]
        t = torch.addcmul(t, m.s, h, value=0.7)
        t = torch.lerp(t, h, m.mix)
        v = torch.addmv(m.v0.expand(len(x)), t, m.v, alpha=1.5)
        return torch.stack([v, t.sum(1)], 1)

    return Lambda(
        forward, b=torch.randn(4), w=torch.randn(3, 4), b3=torch.randn(1, 1, 4), w3=torch.randn(4, 4),
        s=torch.randn(4), mix=torch.tensor(0.3), v=torch.randn(4), v0=torch.randn(1),
    ), torch.randn(5, 3)  # fmt: skip


@case(2, "matmuls that broadcast on both sides, and one-dimensional operands")
def broadcasting() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.left @ x[:, None]
        y = (h @ m.right).sum(1).tanh()
        return torch.stack([y @ m.vector @ m.time, (m.time @ y) @ m.vector], 1)

    return Lambda(
        forward, left=torch.randn(2, 5, 4), right=torch.randn(2, 3, 6), vector=torch.randn(6), time=torch.randn(5)
    ), torch.randn(3, 4, 3)


@case(2, "a mixture of precisions inside: a block in float32", float32_inside=True)
def mixed_inside() -> Made:
    net = Lambda(lambda m, x: m.b(m.a(x).float().softmax(-1).to(x.dtype)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return net, torch.randn(4, 3)


@case(2, "keyword-only inputs, one without a batch dimension")
def keyword_only() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, x: Tensor, scale: Tensor, flags: list[str] | None = None) -> dict[str, Tensor]:
            return {"logits": self.b(self.a(x).tanh() * scale)}

    return Net(), {"x": torch.randn(4, 3), "scale": torch.tensor(2.0), "y": torch.zeros(4)}


@case(2, "a parameter that is complex itself", functional=False)
def complex_parameter() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
            self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            self.w.data = self.w.data.to(torch.cdouble if self.a.weight.dtype == torch.float64 else torch.cfloat)
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.fft.ifft(torch.fft.fft(self.a(x)) @ self.w).abs().real)

    return Net(), torch.randn(4, 3)


class _ProductAndSquare(torch.autograd.Function):
    """x·w and (x·w)² from one function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x * w, (x * w) ** 2

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        both = g + 2 * x * w * h
        return both * w, (both * x).sum(0)


@case(2, "a function of one's own whose two outputs are both used", functional=False)
def two_outputs() -> Made:
    def forward(m: Any, x: Tensor) -> Tensor:
        once, squared = _ProductAndSquare.apply(m.a(x), m.w)
        return m.b(once.tanh() + squared)

    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), w=torch.randn(4)), torch.randn(4, 3)
