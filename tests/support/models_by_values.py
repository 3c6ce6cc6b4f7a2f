"""Models whose shapes depend on values: which tokens are kept, where they are sent, how long a sequence is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Dropping(nn.Module):
    """A block sees only the tokens of a high score, and puts what it makes of them back in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.score, self.head = nn.Linear(64, 128), nn.Linear(128, 1), nn.Linear(128, 10)
        self.block = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        kept = self.score(h)[..., 0] > 0
        new = h.clone()
        new[kept] = h[kept] + self.block(h[kept])
        return self.head(new.mean(1))


class Experts(nn.Module):
    """Every token goes to one expert, which takes its tokens of the whole batch together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.head = nn.Linear(32, 64), nn.Linear(64, 4), nn.Linear(64, 10)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh().flatten(0, 1)
        weight, chosen = self.gate(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)[0]
            if len(rows):
                out = out.index_add(0, rows, expert(h.index_select(0, rows)) * weight[rows, None])
        return self.head(out.unflatten(0, x.shape[:2]).mean(1))


class Ragged(nn.Module):
    """Sequences of many lengths, one after the other without padding, and each pooled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128)), nn.Linear(128, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        held = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        each = self.net(x[held]).split(lengths.tolist())
        return self.head(torch.stack([h.amax(0) for h in each]))


class Packed(nn.Module):
    """A recurrent network over sequences of many lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(48, 96, batch_first=True), nn.Linear(96, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0])


class Distinct(nn.Module):
    """Makes features of every word that occurs once, and looks them up."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.net = nn.Embedding(500, 32), nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        self.a, self.b = nn.Linear(32, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        words, places = x.unique(return_inverse=True)
        return self.b(self.a(self.net(self.words(words))[places]).relu().mean(1))


def ragged(module: nn.Module, n: int, longest: int, size: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model of sequences, and n of them of many lengths."""
    return module, {"x": torch.randn(n, longest, size), "lengths": torch.randint(4, longest + 1, (n,))}
