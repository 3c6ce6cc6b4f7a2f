"""Transformers as people write them: torch's own layers, and attention by hand in the common ways."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fused(nn.Module):
    """One projection in chunks, scaled_dot_product_attention."""

    def __init__(self, e: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(e, 3 * e), nn.Linear(e, e)

    def forward(self, x: Tensor) -> Tensor:
        n, t, e = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (a.view(n, t, self.heads, e // self.heads).transpose(1, 2) for a in (q, k, v))
        dropout = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=dropout)
        return self.proj(y.transpose(1, 2).reshape(n, t, e))


class Masked(nn.Module):
    """A split, a mask from a buffer, dropout on the weights: minGPT's way."""

    def __init__(self, e: int, heads: int) -> None:
        super().__init__()
        self.e, self.heads = e, heads
        self.qkv, self.proj = nn.Linear(e, 3 * e), nn.Linear(e, e)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        n, t, e = x.size()
        q, k, v = self.qkv(x).split(self.e, dim=2)
        q, k, v = (a.view(n, t, self.heads, e // self.heads).transpose(1, 2) for a in (q, k, v))
        a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        a = a.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        y = self.dropout(F.softmax(a, dim=-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(n, t, e))


class Permuted(nn.Module):
    """Thirds, heads and units in one reshape, scaled queries: timm's way."""

    def __init__(self, e: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(e, 3 * e), nn.Linear(e, e)

    def forward(self, x: Tensor) -> Tensor:
        n, t, e = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, e // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        a = ((q * (e // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((a @ v).transpose(1, 2).reshape(n, t, e))


class Three(nn.Module):
    """Three projections; `mix` of them, [n, H, T, d] each."""

    def __init__(self, e: int, heads: int, mix: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.heads, self.mix = heads, mix or F.scaled_dot_product_attention
        self.q, self.k, self.v, self.o = (nn.Linear(e, e) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(self.mix(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Embedding, positions, one pre-norm block, the mean or the last token, a head."""

    def __init__(self, e: int, attention: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.embed, self.pos = nn.Linear(5, e), nn.Parameter(torch.randn(1, 4, e) * 0.02)
        self.norms = nn.ModuleList([nn.LayerNorm(e) for _ in range(3)])
        self.attention, self.last = attention, last
        self.mlp = nn.Sequential(nn.Linear(e, 2 * e), nn.GELU(), nn.Linear(2 * e, e))
        self.head = nn.Linear(e, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.pos
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        x = self.norms[2](x)
        return self.head(x[:, -1] if self.last else x.mean(dim=1))


class Encoder(nn.Module):
    """torch's TransformerEncoderLayer between two linear layers."""

    def __init__(self, e: int, norm_first: bool, activation: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, e), nn.Linear(e, 2)
        self.layer = nn.TransformerEncoderLayer(
            e, 8, 2 * e, batch_first=True, norm_first=norm_first, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(dim=1))


class MultiHead(nn.Module):
    """nn.MultiheadAttention in a residual branch, flattened."""

    def __init__(self, e: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, e), nn.Linear(4 * e, 2)
        self.attention = nn.MultiheadAttention(e, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head((h + self.attention(h, h, h, need_weights=False)[0]).flatten(1))
