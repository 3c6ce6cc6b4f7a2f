"""Leaves that all examples share, of as many rows as there are examples, or as there are in a block of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ntkwatch import Monitor, NTKWatch, empirical_ntk, layer_ntks, load_run, plan
from ntkwatch.probes import choose_probes

T, D = 5, 4
Batch = Any


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, attn_mask=mask)[0].mean(1))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(9, D), nn.Embedding(T, D), nn.Linear(D, 2)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids) + self.positions(positions)).mean(1))


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(D, D)

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        return (self.query(x) @ bank.T).softmax(1) @ bank


class Zero(Bank):
    """Its readout starts at zero, so that every output does."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(D, 2)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        return self.readout(torch.tanh(super().forward(x, bank)))


class Weighted(Bank):
    """A bank that all share, and a weight for each example."""

    def forward(self, x: Tensor, bank: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, bank) * weight[:, None]


class Classes(nn.Module):
    """Scores against class prototypes, of which there are as many as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(D, 3)

    def forward(self, x: Tensor, prototypes: Tensor, temperature: Tensor) -> Tensor:
        return (torch.tanh(self.embed(x))[:, None] - prototypes).square().sum(2) / temperature


class First(Attention):
    """The shared leaf comes first."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, mask)


MASK = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
# the model, n examples of a batch and the names of the leaves that have a row for each
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]], tuple[str, ...]]] = {
    "a causal mask": (Attention, lambda n: {"x": noise(n, T, D), "mask": MASK}, ("x",)),
    "positions": (Positions, lambda n: {"ids": noise(n, T).mul(9).long() % 9, "positions": torch.arange(T)}, ("ids",)),
    "a bank of contexts": (Bank, lambda n: {"x": noise(n, D), "bank": noise(T, D)}, ("x",)),
    "behind a readout of zeros": (Zero, lambda n: {"x": noise(n, D), "bank": noise(T, D)}, ("x",)),
    "a bank and a weight for each": (
        Weighted, lambda n: {"x": noise(n, D), "bank": noise(T, D), "weight": noise(n)}, ("x", "weight"),
    ),
    "two shared leaves": (
        Classes, lambda n: {"x": noise(n, D), "prototypes": noise(T, 3), "temperature": 1 + torch.arange(T)}, ("x",),
    ),
    "the shared leaf first": (First, lambda n: {"mask": MASK, "x": noise(n, T, D)}, ("x",)),
}  # fmt: skip


def built(case: str, n: int) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """Model, batch, and the Jacobian [n, C, P] from a loop over examples."""
    torch.manual_seed(0)
    make, batch_of, own = CASES[case]
    model, batch, rows = make().double().eval(), batch_of(n), []
    for i in range(n):
        f = model(**{key: value[i : i + 1] if key in own else value for key, value in batch.items()})[0]
        columns = [torch.autograd.grad(y, list(model.parameters()), retain_graph=True) for y in f]
        rows.append(torch.stack([torch.cat([g.flatten() for g in column]) for column in columns]))
    return model, batch, torch.stack(rows)


def kernel(j1: Tensor, j2: Tensor) -> Tensor:
    return torch.einsum("ncp,mcp->nm", j1, j2) / j1.shape[1]


@pytest.mark.parametrize("n", [2, T, 2 * T])  # T is the coincidence; blocks of T are another
@pytest.mark.parametrize("case", CASES)
def test_a_shared_leaf_is_no_examples(case: str, n: int) -> None:
    model, batch, j = built(case, n)
    want = kernel(j, j)
    for engine, chunk in (("auto", None), ("layerwise", T), ("functional", 3)):
        found = empirical_ntk(model, batch, engine=engine, chunk_size=chunk)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12, msg=f"{case}, {engine}, blocks of {chunk}")
    assert torch.allclose(Monitor(model, batch).measure(0).kernel, want, rtol=1e-9), case


@pytest.mark.parametrize("case", CASES)
def test_across_batches_of_other_sizes(case: str) -> None:
    model, batch, j = built(case, T)
    for n, engine in ((1, "auto"), (7, "functional")):
        _, other, k = built(case, n)
        for one, two, left, right in ((batch, other, j, k), (other, batch, k, j)):
            found = empirical_ntk(model, one, two, engine=engine)
            torch.testing.assert_close(found, kernel(left, right), rtol=1e-9, atol=1e-12, msg=f"{case}, {n}")


@pytest.mark.parametrize("case", CASES)
def test_through_outputs_of_the_users_own(case: str) -> None:
    model, batch, j = built(case, T)

    def outputs(model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch["inputs"])

    nested = {"inputs": batch, "label": torch.arange(T) % 2}
    layers = layer_ntks(model, nested, outputs=outputs, chunk_size=2)
    total = torch.stack(list(layers.values())).sum(0)
    torch.testing.assert_close(total, kernel(j, j), rtol=1e-9, atol=1e-12, msg=case)
    assert plan(model, nested, outputs=outputs).chunk_size == T, case
    monitor = Monitor(model, nested, outputs=outputs)
    assert torch.allclose(monitor.measure(0).kernel, kernel(j, j), rtol=1e-9), case
    assert monitor.probes.targets.tolist() == [0, 1, 0, 1, 0]


def test_probes_that_are_chosen_from_a_dataset() -> None:
    """A collate function adds the mask, whose side is the number of probes."""
    torch.manual_seed(0)
    model = Attention().double().eval()
    data = TensorDataset(noise(20, T, D), torch.arange(20) % 2)

    def collate(items: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(items)
        return {"x": x, "mask": MASK, "label": y}

    for n in (T, T + 3):
        probes = choose_probes(DataLoader(data, batch_size=4, collate_fn=collate), n)
        want = empirical_ntk(model, probes.batch["x"], outputs=lambda m, x: m(x, MASK))
        assert torch.allclose(Monitor(model, probes).measure(0).kernel, want, rtol=1e-9), n


class Stream(IterableDataset):
    """Gives batches whose mask all examples share."""

    def __init__(self, size: int) -> None:
        self.size, self.x = size, noise(20, T, D).float()

    def __iter__(self) -> Iterator[Any]:
        for i in range(0, 20, self.size):
            x = self.x[i : i + self.size]
            yield {"x": x, "mask": MASK, "label": torch.arange(len(x)) % 2}


class Run(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Attention()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x, mask)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self(batch["x"], batch["mask"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(("size", "probes"), [(T, 16), (T, 3), (4, 10), (T, T)])
def test_probes_of_a_stream(size: int, probes: int, tmp_path: Path) -> None:
    """Batches of T rows are joined and cut, and the mask is left whole."""
    data = Stream(size)
    watch = NTKWatch(probes=probes, every=[0], budget=None)
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", callbacks=[watch], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Run(), DataLoader(data, batch_size=None))
    run = load_run(watch.record)
    want = empirical_ntk(Run().net, data.x[:probes], outputs=lambda model, x: model(x, MASK))
    assert torch.allclose(torch.as_tensor(run.kernel(0)), want, rtol=1e-5), (size, probes)


def test_the_outputs_tell_n_where_the_first_leaf_is_shared() -> None:
    for n in (2, 3, 2 * T):
        model, batch, j = built("the shared leaf first", n)
        found = empirical_ntk(model, batch, chunk_size=2)
        torch.testing.assert_close(found, kernel(j, j), rtol=1e-9, atol=1e-12, msg=str(n))
        assert torch.allclose(Monitor(model, batch).measure(0).kernel, kernel(j, j), rtol=1e-9), n


def test_what_was_learned_of_a_batch_is_not_asked_again() -> None:
    model, batch, _ = built("a bank of contexts", T)
    monitor, sizes = Monitor(model, batch), []
    monitor.measure(0)
    model.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(len(kwargs["x"])), with_kwargs=True)
    monitor.measure(1)
    assert set(sizes) == {T}, sizes  # no few of them
