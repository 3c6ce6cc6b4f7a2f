"""Models whose peak memory is predicted, and a process of its own that measures one of them.

    python tests/support/memory_models.py NAME REDUCTION

prints {"predicted", "counted", "resident"} in bytes: what `plan` says, the tensors alive at once during a kernel, and
how much the process's resident memory rose at its highest.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkwatch.engines import memory, plan
from ntkwatch.engines.functional import Functional
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network, take
from tests.bench.models import GPT, Block, cnn, mlp, resnet18
from tests.support.device import placed
from tests.support.models_by_values import Distinct, Dropping, Experts, Packed, Ragged, ragged

assert Block
Made = tuple[nn.Module, Any]


class Last(nn.Module):
    """A recurrent network's last state and a head."""

    def __init__(self, rnn: nn.Module, size: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    """torch's own encoder, pooled."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Bag(nn.Module):
    """Embeddings of words, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(5000, 128), nn.Linear(128, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.words(x)).relu().mean(1))


class Switched(nn.Module):
    """Takes a way that the value of a buffer decides; pruned, a width too, which has no shape without the values."""

    def __init__(self, pruned: bool = False) -> None:
        super().__init__()
        self.net, self.back = nn.Sequential(nn.Linear(256, 512), nn.Tanh()), nn.Linear(256 if pruned else 512, 10)
        self.pruned = pruned
        self.register_buffer("kept", torch.arange(512) % 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        h = h.square() if self.kept.sum() > 0.5 else h
        return self.back(h.index_select(-1, self.kept.nonzero().flatten()) if self.pruned else h)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(512, 256), nn.Linear(256, 256), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        return self.head(F.linear(h, self.a.weight.t()).relu())


def _bert() -> Made:
    import transformers

    config = transformers.BertConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        vocab_size=1000,
        num_labels=4,
    )
    ids, mask = torch.randint(0, 1000, (16, 32)), torch.ones(16, 32, dtype=torch.long)
    mask[::2, 20:] = 0
    return transformers.BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": mask}


def _layer_norm_mlp() -> nn.Module:
    layers = [m for _ in range(4) for m in (nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _convolutions_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 64, 5, padding=2), nn.ReLU(), nn.Conv1d(64, 64, 5, 2, padding=2), nn.ReLU(),
        nn.Conv1d(64, 64, 5, 2, padding=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def _depthwise() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, a, 3, padding=1, groups=a), nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU6()]

    stem = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6()]
    return nn.Sequential(
        *stem, *block(32, 64), *block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def _generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 64 * 16), nn.Unflatten(1, (64, 4, 4)), nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def _group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, padding=1),
        nn.GroupNorm(8, 64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], Made]] = {
    "MLP": lambda: (mlp(), torch.randn(128, 784)),
    "CNN": lambda: (cnn(), torch.randn(32, 3, 32, 32)),
    "ResNet-18": lambda: (resnet18(), torch.randn(8, 3, 32, 32)),
    "GPT": lambda: (GPT(), torch.randint(0, 256, (16, 64))),
    "LSTM": lambda: (Last(nn.LSTM(64, 128, 2, batch_first=True), 128), torch.randn(16, 24, 64)),
    "GRU": lambda: (Last(nn.GRU(64, 128, 2, batch_first=True), 128), torch.randn(16, 24, 64)),
    "RNN": lambda: (Last(nn.RNN(64, 128, 2, batch_first=True), 128), torch.randn(16, 24, 64)),
    "TransformerEncoder": lambda: (Encoder(), torch.randn(16, 32, 128)),
    "BERT": _bert,
    "conv1d": lambda: (_convolutions_1d(), torch.randn(32, 4, 256)),
    "depthwise": lambda: (_depthwise(), torch.randn(32, 3, 32, 32)),
    "ConvTranspose": lambda: (_generator(), torch.randn(32, 32)),
    "embedding": lambda: (Bag(), torch.randint(0, 5000, (64, 50))),
    "weight-tied": lambda: (Tied(), torch.randn(256, 512)),
    "LayerNorm MLP": lambda: (_layer_norm_mlp(), torch.randn(256, 512)),
    "GroupNorm CNN": lambda: (_group_norm(), torch.randn(32, 3, 16, 16)),
    "switched": lambda: (Switched(), torch.randn(64, 256)),
    "pruned": lambda: (Switched(pruned=True), torch.randn(64, 256)),
    "token dropping": lambda: (Dropping(), torch.randn(16, 24, 64)),
    "experts": lambda: (Experts(), torch.randn(16, 24, 32)),
    "ragged": lambda: ragged(Ragged(), 48, 40, 64),
    "packed": lambda: ragged(Packed(), 16, 20, 48),
    "distinct words": lambda: (Distinct(), torch.randint(0, 500, (12, 20))),
    "wide output": lambda: (mlp(512, 2, 100), torch.randn(24, 784)),
}
BY_VALUES = ("pruned", "token dropping", "experts", "ragged", "packed", "distinct words")  # their shapes depend on them
REDUCTIONS = ("trace", "full")


def build(name: str) -> Made:
    """The model in evaluation mode, and its probes, from a seed."""
    torch.manual_seed(0)
    module, x = MODELS[name]()
    return placed(module.eval(), x)


def predicted_and_counted(
    name: str, reduction: Any, layers: Any = None, n: int | None = None, **how: Any
) -> dict[str, int]:
    """Bytes that `plan` foretells and that tensors really take, of the first n probes.

    Args:
        layers: the reduction of a kernel per parameter that is kept.
        how: chunk_size, precision.
    """
    module, x = build(name)
    x, asked = take(x, slice(0, n)), {"reduction": reduction, "layers": layers, **how}
    network, engine = Network(module), Layerwise()
    found = plan(module, x, **asked)
    with leave_no_trace(module):
        engine.points(network, x, None)
        return {"predicted": found.peak_bytes, "counted": memory.peak_bytes(lambda: engine.kernel(network, x, **asked))}


TO_TORCH_FUNC = {
    name: 8 for name in MODELS if name not in ("GRU", "RNN", "BERT", *BY_VALUES[1:])
}  # probes; the others it cannot do
TO_TORCH_FUNC |= {"ResNet-18": 3, "embedding": 4, "LayerNorm MLP": 4, "MLP": 4, "wide output": 3, "weight-tied": 32}


def functional_predicted_and_counted(
    name: str, reduction: Any, layers: Any = None, chunk_size: int | None = None
) -> dict[str, int]:
    """The same for the functional engine, on fewer probes."""
    module, x = build(name)
    x = take(x, slice(0, TO_TORCH_FUNC[name]))
    asked = {"reduction": reduction, "layers": layers, "chunk_size": chunk_size}
    found = plan(module, x, engine="functional", **asked)
    network = Network(module)
    with leave_no_trace(module):
        counted = memory.peak_bytes(lambda: Functional().kernel(network, x, **asked))
    return {"predicted": found.peak_bytes, "counted": counted}


def _status(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def resident(name: str, reduction: Any) -> int:
    """By how much one kernel raises this process's resident memory, libraries loaded and free memory given back."""
    module, x = build(name)
    network, engine = Network(module), Layerwise()
    few = {k: v[:3] for k, v in x.items()} if isinstance(x, dict) else x[:3]
    with leave_no_trace(module):
        engine.kernel(network, few, reduction=reduction, layers=None)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        engine.kernel(network, x, reduction=reduction, layers=None)
    return _status("VmHWM") - before


if __name__ == "__main__":
    name, reduction = sys.argv[1:]
    rise = resident(name, reduction)
    print(json.dumps({**predicted_and_counted(name, reduction), "resident": rise}))
