"""Jobs that a monitor meets in the wild: models, data and trainers with state in unusual places."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from tests.support.trust_configs import CLASSES, FEATURES, Augmented, Job, Net, PytorchLightningTask, loader, task


class Stateful(Net):
    """Moves a state of its own in every forward pass, evaluation included; `felt` there too, or in training alone."""

    def __init__(self, felt: bool = False) -> None:
        super().__init__()
        self.felt = felt
        self.setup_state()

    def setup_state(self) -> None: ...

    def shift(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift(x)
        return super().forward(x + shift if self.training or self.felt else x)


class OwnGenerators(Stateful):
    """Noise from generators of its own."""

    def setup_state(self) -> None:
        self.torch_rng = torch.Generator().manual_seed(1)
        self.numpy_rng, self.python_rng = np.random.default_rng(1), random.Random(1)

    def shift(self, x: Tensor) -> Tensor:
        noise = torch.randn(FEATURES, generator=self.torch_rng)
        return 0.01 * (noise.to(x) + self.numpy_rng.standard_normal() + self.python_rng.random())


class Counters(Stateful):
    """Counts and keeps in plain python attributes."""

    def setup_state(self) -> None:
        self.calls, self.history, self.recent = 0, [0.0], deque([0.0], maxlen=3)
        self.cache: dict[str, Any] = {"seen": {"calls": 0}}

    def shift(self, x: Tensor) -> float:
        self.calls += 1
        self.cache["seen"]["calls"] += 1
        self.history.append(0.001 * self.calls)
        self.recent.append(0.001 * self.calls)
        return self.history[-1] + sum(self.recent) + 0.001 * self.cache["seen"]["calls"]


class Buffers(Stateful):
    """Buffers moved in place, by reassignment, and one kept in a list."""

    def setup_state(self) -> None:
        self.register_buffer("total", torch.zeros(FEATURES))
        self.register_buffer("mean", torch.zeros(FEATURES), persistent=False)
        self.kept = [torch.zeros(FEATURES)]

    def shift(self, x: Tensor) -> Tensor:
        self.total.add_(0.001)
        self.mean = self.mean * 0.9 + 0.0001
        self.kept[0] = self.kept[0] + 0.001
        return self.total + self.mean + self.kept[0].to(x)


class Metric(Stateful):
    """A metric module that gathers in every forward."""

    def setup_state(self) -> None:
        self.metric = torchmetrics.MeanMetric()

    def shift(self, x: Tensor) -> float:
        self.metric.update(x.detach().mean())
        return 0.0


class Normed(Net):
    """Weight norm and spectral norm, new and old style; the norm's power iteration moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.utils.parametrizations.weight_norm(self.stem)
        self.head = nn.utils.parametrizations.spectral_norm(self.head)
        self.block[0] = nn.utils.spectral_norm(self.block[0])


class Renormed(nn.Module):
    """An embedding whose forward renormalises its weight in place, with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4, max_norm=0.5), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.table(x[..., :3].abs().long() % 7).mean(-2), 0.1, self.training))


class Hooked(Net):
    """The user's own hooks: on gradients, after accumulation, backward and forward ones, all with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = {"grad": 0, "accumulated": 0, "backward": 0}
        self.stem.weight.register_hook(lambda g: g * (1 + 0.01 * self.hear("grad")))
        self.head.weight.register_post_accumulate_grad_hook(self.accumulated)
        self.block.register_full_backward_hook(lambda m, gi, go: (gi[0] * (1 + 0.01 * self.hear("backward")),))

    def accumulated(self, p: Tensor) -> None:
        p.grad.mul_(1 + 0.01 * self.hear("accumulated"))

    def hear(self, what: str) -> int:
        self.heard[what] += 1
        return self.heard[what]


class LogsInForward(PytorchLightningTask):
    """Logs from within forward, as many do."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.log("output_norm", out.detach().norm(), on_epoch=True, on_step=False)
        return out


class OwnRngData(Dataset[tuple[Tensor, Tensor]]):
    """Augments with generators that hang on the dataset: indexing it moves them."""

    def __init__(self) -> None:
        self.inner = Augmented(24, 1)
        self.targets = self.inner.targets
        self.numpy_rng, self.python_rng = np.random.default_rng(2), random.Random(2)
        self.torch_rng, self.accesses = torch.Generator().manual_seed(2), 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.accesses += 1
        noise = torch.randn((), generator=self.torch_rng) + self.numpy_rng.standard_normal() + self.python_rng.random()
        x, y = self.inner[index]
        return x + 0.01 * noise + 0.001 * self.accesses, y


class Mixing:
    """A collate function with a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __call__(self, rows: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in rows]) * self.rng.uniform(0.9, 1.1), torch.stack([y for _, y in rows])


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Rows without an index; iterating draws from the global generators."""

    def __iter__(self) -> Any:
        inner = Augmented(24, 1)
        return (inner[int(i)] for i in torch.randperm(24))


class RandomSplits(pl.LightningDataModule):
    """Makes its loaders, splits and all, whenever it is asked: from the global generator and from its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rng, self.asked = torch.Generator().manual_seed(4), 0

    def train_dataloader(self) -> DataLoader:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(1)

    def _loader(self, part: int) -> DataLoader:
        self.asked += 1
        halves = random_split(Augmented(40, self.asked), [24, 16], generator=self.rng)
        halves = random_split(halves[part], [0.5, 0.5])
        return DataLoader(halves[0], 4, shuffle=part == 0)


class Swapped(pl.Callback):
    """Puts other tensors under the parameters' names for validation, through `.data`."""

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.kept = {name: p.data for name, p in module.named_parameters()}
        for p in module.parameters():
            p.data = p.data * 0.5

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for name, p in module.named_parameters():
            p.data = self.kept[name]


def rows(dataset: Callable[[], Any], collate: Callable[[], Any] = lambda: None, shuffle: bool = True) -> Any:
    """Training on `dataset()`, without validation: the probes come from the training data."""
    return lambda: (DataLoader(dataset(), 4, shuffle=shuffle, collate_fn=collate()), None)


def with_net(net: Callable[[], nn.Module]) -> Callable[[str], Any]:
    return lambda import_name: PytorchLightningTask(net=net())


def lbfgs(import_name: str) -> Any:
    module = PytorchLightningTask()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)
    return module


def thawing(import_name: str) -> Any:
    """Freezes the head from the second epoch on."""
    module = PytorchLightningTask()
    module.on_train_epoch_start = lambda: module.net.head.requires_grad_(module.current_epoch == 0)
    return module


def own_generator() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(6)
    return DataLoader(Augmented(24, 1), 4, shuffle=True, generator=generator), loader(8, 2, False)


def two_train_loaders() -> tuple[Any, Any]:
    return DataLoader(TensorDataset(torch.randn(24, FEATURES), torch.arange(24) % CLASSES), 4, shuffle=True), None


def two_validation_loaders() -> tuple[Any, Any]:
    return loader(24, 1, True), [loader(8, 2, False), loader(8, 3, True)]


UNSTEADY = [
    Job("generators felt in evaluation", with_net(lambda: OwnGenerators(felt=True))),
    Job("counters felt in evaluation", with_net(lambda: Counters(felt=True))),
    Job("buffers felt in evaluation", with_net(lambda: Buffers(felt=True))),
]
"""Two evaluations at the same weights differ: there is no kernel to measure, and training must go on unchanged."""
EXOTICS = [
    Job("generators on the module", with_net(OwnGenerators)),
    Job("counters on the module", with_net(Counters)),
    Job("buffers moved by every forward", with_net(Buffers)),
    Job("metric in forward", with_net(Metric)),
    Job("weight norm, spectral norm", with_net(Normed)),
    Job("embedding with max_norm", with_net(Renormed)),
    Job("hooks of the user's", with_net(Hooked)),
    Job("self.log in forward", lambda name: LogsInForward()),
    Job("LBFGS", lbfgs),
    Job("frozen in mid-run", thawing),
    Job("generators on the training data", task(), loaders=rows(OwnRngData)),
    Job("generator in collate_fn", task(), loaders=rows(lambda: Augmented(24, 1), Mixing)),
    Job("iterable dataset", task(), loaders=rows(Stream, shuffle=False)),
    Job("generator of the loader", task(), loaders=own_generator),
    Job("tensors, no validation", task(), loaders=two_train_loaders),
    Job("one batch", task(), {"limit_train_batches": 1, "max_epochs": 6}),
    Job("splits made when asked", task(), loaders=lambda: (RandomSplits(), None)),
    Job(
        "splits made anew each epoch",
        task(),
        {"reload_dataloaders_every_n_epochs": 1},
        loaders=lambda: (RandomSplits(), None),
    ),
    Job("overfit_batches", task(), {"overfit_batches": 2}),
    Job("anomaly detection", task(), {"detect_anomaly": True}),
    Job("deterministic", task(), {"deterministic": True}),
    Job("bf16-true", task(), {"precision": "bf16-true"}),
    Job("gradient clipping", task(), {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
    Job("weight averaging by hand", task(), callbacks=lambda pl: [Swapped()]),
    Job("two validation loaders", task(), loaders=two_validation_loaders),
    Job("validation without inference mode", task(), {"inference_mode": False, "val_check_interval": 2}),
]

# Its parameters are renamed in mid-run: measured until then, then refused by name.
PRUNING = Job("pruning", task(), callbacks=lambda pl: [pl.callbacks.ModelPruning("l1_unstructured", amount=0.2)])
