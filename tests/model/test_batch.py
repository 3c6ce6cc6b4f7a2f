"""What of a batch are inputs and what is the target: as forward requires, never by a guess, and said in one line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from ntkwatch import Monitor, NTKWatch, empirical_ntk, layer_ntks
from ntkwatch.probes import choose_probes, encode_targets
from ntkwatch.probes.targets import describe_targets

N, D = 6, 4
G = torch.Generator().manual_seed(0)
X, Z = (torch.randn(N, D, generator=G, dtype=torch.float64) for _ in range(2))
Y = torch.tensor([0, 1, 1, 0, 1, 0])
GROUP = torch.tensor([0, 0, 1, 1, 2, 2])
PATHS = [f"{i}.png" for i in range(N)]
LENGTHS = torch.tensor([4, 3, 2, 1, 4, 2])


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Fields:
    x: Tensor
    y: Tensor


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def model(forward: Callable[..., Any]) -> nn.Module:
    """A module of Base's layers with that forward."""
    return type("Made", (Base,), {"forward": forward})()


def one(self: Any, x: Tensor) -> Tensor:
    return self.net(x)


def with_mask(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return self.net(x if mask is None else x * mask[:, None])


def two(self: Any, x1: Tensor, x2: Tensor) -> Tensor:
    return self.net(x1) * self.net(x2)


def lengths_too(self: Any, x: Tensor, lengths: Tensor) -> Tensor:
    return self.net(x * (torch.arange(D) < lengths[:, None]))


def coordinates(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.net(torch.cat([x, y], 1))


def any_arguments(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    return two(self, *args, **kwargs)


def keywords(self: Any, **batch: Any) -> Tensor:
    return self.net(batch["x"])


def whole(self: Any, batch: Any) -> Tensor:
    return self.net(batch[0] if isinstance(batch, tuple) else batch["image"])


def encoder_decoder(self: Any, x: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    if labels is None:
        raise ValueError("You have to specify either decoder_input_ids or decoder_inputs_embeds")
    return self.net(x) * (1 + labels.double())[:, None]


MASKED = X * (torch.arange(D) < LENGTHS[:, None])

# batch, forward; the outputs that a loop differentiates, of one example's rows; targets; what is said
Right = Callable[[nn.Module, int], Tensor]
CASES: dict[str, tuple[Any, Callable[..., Any], Right, Tensor | None, str]] = {
    "tensor": (X, one, lambda m, i: m.net(X[i]), None, "inputs: x float64 [6, 4]; targets: none"),
    "(x, y)": ((X, Y), one, lambda m, i: m.net(X[i]), Y, "targets: item 2 of 2, int64 [6], 2 classes"),
    "(x,)": ((X,), one, lambda m, i: m.net(X[i]), None, "targets: none"),
    "[x, y]": ([X, Y], one, lambda m, i: m.net(X[i]), Y, "targets: item 2 of 2"),
    "(x, y, group)": ((X, Y, GROUP), one, lambda m, i: m.net(X[i]), Y, "ignored: item 3 of 3"),
    "(x, y, group) and an optional mask": (
        (X, Y, GROUP), with_mask, lambda m, i: m.net(X[i]), Y, "forward is called without its optional mask",
    ),
    "((x, mask), y) and an optional mask": (
        ((X, MASKED), Y), with_mask, lambda m, i: m.net(X[i]), Y, "mask; ignored: item 2 of item 1 of 2",
    ),
    "(x, y, weight)": ((X, Y, torch.rand(N)), one, lambda m, i: m.net(X[i]), Y, "ignored: item 3"),
    "(x, y, path)": ((X, Y, PATHS), one, lambda m, i: m.net(X[i]), Y, "targets: item 2 of 3"),
    "(x, path, y)": ((X, PATHS, Y), one, lambda m, i: m.net(X[i]), Y, "targets: item 3 of 3"),
    "(x, y, idx)": ((X, Y, torch.arange(N)), one, lambda m, i: m.net(X[i]), Y, "targets: item 2 of 3"),
    "(x, lengths, y)": ((X, LENGTHS, Y), lengths_too, lambda m, i: m.net(MASKED[i]), Y, "lengths int64 [6]"),
    "(x1, x2) of two": ((X, Z), two, lambda m, i: m.net(X[i]) * m.net(Z[i]), None, "x2 float64 [6, 4]; targets: none"),
    "(x1, x2, y) of two": ((X, Z, Y), two, lambda m, i: m.net(X[i]) * m.net(Z[i]), Y, "targets: item 3 of 3"),
    "(x1, x2, y) of any": ((X, Z, Y), any_arguments, lambda m, i: m.net(X[i]) * m.net(Z[i]), Y, "item 3 of 3"),
    "(v1, v2) of one": ((X, Z), one, lambda m, i: m.net(X[i]), Z, "targets: item 2 of 2, float64 [6, 4], values"),
    "((v1, v2), y) of two": (((X, Z), Y), two, lambda m, i: m.net(X[i]) * m.net(Z[i]), Y, "targets: item 2 of 2"),
    "((v1, v2), y) of one": (((X, Z), Y), one, lambda m, i: m.net(X[i]), Y, "targets: item 2 of 2"),
    "namedtuple": (Pair(X, Y), one, lambda m, i: m.net(X[i]), Y, "targets: y, item 2 of 2"),
    "(x, t) as coordinates": (
        (X[:, :2], X[:, 2:]), coordinates, lambda m, i: m.net(X[i]), None, "y float64 [6, 2]; targets: none",
    ),
    "x and y as coordinates": (
        {"x": X[:, :2], "y": X[:, 2:]}, coordinates, lambda m, i: m.net(X[i]), None, "y float64 [6, 2]; targets: none",
    ),
    "coordinates and labels": (
        {"x": X[:, :2], "y": X[:, 2:], "label": Y}, coordinates, lambda m, i: m.net(X[i]), Y, "targets: label, int64",
    ),
    "dict of x, y, id": (
        {"x": X, "y": Y, "id": torch.arange(N)}, one, lambda m, i: m.net(X[i]), Y, "targets: y, int64 [6], 2 classes; ",
    ),
    "dict of x, label, path": ({"x": X, "label": Y, "path": PATHS}, one, lambda m, i: m.net(X[i]), Y, "ignored: path"),
    "dict of image, label, path": (
        {"image": X, "label": Y, "path": PATHS}, one, lambda m, i: m.net(X[i]), Y, "x float64 [6, 4]; targets: label",
    ),
    "dict and an optional mask": ({"x": X, "y": Y}, with_mask, lambda m, i: m.net(X[i]), Y, "targets: y"),
    "dict of the optional mask": (
        {"x": X, "mask": LENGTHS.double(), "y": Y}, with_mask, lambda m, i: m.net(X[i] * LENGTHS[i]), Y, "mask float64",
    ),
    "dict by keywords": ({"x": X, "label": Y, "path": PATHS}, keywords, lambda m, i: m.net(X[i]), Y, "x float64"),
    "whole dict": ({"image": X, "label": Y}, whole, lambda m, i: m.net(X[i]), Y, "targets: label"),
    "whole tuple": ((X, Y), whole, lambda m, i: m.net(X[i]), Y, "batch tuple of float64 [6, 4], int64 [6]"),
    "labels to run": (
        {"x": X, "labels": Y}, encoder_decoder, lambda m, i: m.net(X[i]) * (1 + Y[i].double()), Y, "labels int64 [6]",
    ),
    "meta as a dict": ({"x": X, "y": Y, "meta": {"size": 3}}, one, lambda m, i: m.net(X[i]), Y, "ignored: meta"),
}  # fmt: skip


def naive(module: nn.Module, right: Right) -> Tensor:
    """The trace kernel by a loop of backward passes."""
    rows = []
    for i in range(N):
        columns = [torch.autograd.grad(out, list(module.parameters()), retain_graph=True) for out in right(module, i)]
        rows.append(torch.stack([torch.cat([g.flatten() for g in column]) for column in columns]))
    j = torch.stack(rows)
    return torch.einsum("ncp,mcp->nm", j, j) / j.shape[1]


@pytest.mark.parametrize("case", CASES)
def test_what_goes_in_and_what_is_the_target(case: str) -> None:
    batch, forward, right, targets, said = CASES[case]
    module = model(forward)
    want = naive(module, right)
    monitor = Monitor(module, batch)
    torch.testing.assert_close(monitor.measure(0).kernel, want, rtol=1e-10, atol=1e-12, msg=case)
    torch.testing.assert_close(empirical_ntk(module, batch), want, rtol=1e-10, atol=1e-12, msg=case)
    assert said in monitor.taken, f"{case}: {monitor.taken}"
    if targets is None:
        assert monitor.probes.targets is None, f"{case}: {monitor.taken}"
    else:
        assert torch.equal(monitor.probes.targets, targets), f"{case}: {monitor.taken}"


def test_with_outputs_given_the_target_is_the_item_after_what_forward_requires() -> None:
    for case, (batch, forward, _, targets, _) in CASES.items():
        if case in ("((v1, v2), y) of one", "(x1, x2, y) of any"):
            continue  # how the model takes them is not seen where it is not called
        module = model(forward)
        monitor = Monitor(module, batch, outputs=lambda m, batch: m.net(X[: len(_first(batch))]))
        expected = None if targets is None else targets.tolist()
        found = None if monitor.probes.targets is None else monitor.probes.targets.tolist()
        assert found == expected, f"{case}: {monitor.taken}"
        assert monitor.taken.startswith("inputs: what outputs="), case


def _first(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return batch


def test_a_partial_forward_requires_what_it_leaves() -> None:
    module = model(two)
    module.forward = functools.partial(module.forward, x2=Z[:1])  # type: ignore[method-assign]
    monitor = Monitor(module, (X, Y, GROUP))
    assert monitor.probes.targets.tolist() == Y.tolist(), monitor.taken
    want = naive(module, lambda m, i: m.net(X[i]) * m.net(Z[0]))
    torch.testing.assert_close(monitor.measure(0).kernel, want, rtol=1e-10, atol=1e-12)


def test_ntk_outputs_gets_the_whole_batch() -> None:
    class Own(Base):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not called")

        def ntk_outputs(self, batch: Any) -> Tensor:
            return self.net(batch[0]) * (1 + batch[2].double())[:, None]

    monitor = Monitor(Own(), (X, Y, GROUP))
    assert monitor.probes.targets.tolist() == Y.tolist(), monitor.taken
    want = naive(monitor.model, lambda m, i: m.net(X[i]) * (1 + GROUP[i].double()))
    torch.testing.assert_close(monitor.measure(0).kernel, want, rtol=1e-10, atol=1e-12)


def test_the_second_batch_is_read_as_the_first() -> None:
    module = model(with_mask)
    both = empirical_ntk(module, (X, Y, GROUP))
    assert torch.allclose(empirical_ntk(module, (X[:2], Y[:2], GROUP[:2]), (X[2:], Y[2:], GROUP[2:])), both[:2, 2:])
    layers = layer_ntks(module, (X, Y, GROUP))
    assert torch.allclose(torch.stack(list(layers.values())).sum(0), both)


def test_targets_that_are_given_stay() -> None:
    for targets in (GROUP, lambda batch: batch[2]):
        monitor = Monitor(model(one), (X, Y, GROUP), targets=targets)
        assert monitor.probes.targets.tolist() == GROUP.tolist()
        assert "targets: those given, int64 [6]" in monitor.taken


def test_a_dataclass_goes_in_whole() -> None:
    def of_fields(self: Any, batch: Fields) -> Tensor:
        return self.net(batch.x)

    module = model(of_fields)
    kernel = Monitor(module, Fields(X, Y)).measure(0).kernel
    torch.testing.assert_close(kernel, naive(module, lambda m, i: m.net(X[i])), rtol=1e-10, atol=1e-12)


# ── classes ──────────────────────────────────────────────────────────────────────────────────────────────────────

PLUS = torch.tensor([-1.0, 1, 1, -1, 1, -1])  # of Y
ONE_HOT = torch.nn.functional.one_hot(Y, 2).double()
TARGETS: dict[str, tuple[Tensor, int, Tensor | None]] = {
    "floats 0 and 1, one output": (Y.float(), 1, PLUS[:, None]),
    "floats 0 and 1, two outputs": (Y.float(), 2, ONE_HOT),
    "floats 0 and 1, three outputs": (Y.float(), 3, torch.nn.functional.one_hot(Y, 3)),
    "floats -1 and 1, one output": (PLUS, 1, PLUS[:, None]),
    "floats -1 and 1, two outputs": (PLUS, 2, ONE_HOT),
    "a column of -1 and 1": (PLUS[:, None], 1, PLUS[:, None]),
    "a column of -1 and 1, two outputs": (PLUS[:, None], 2, ONE_HOT),
    "floats that are ids": (2 * Y.float(), 3, torch.nn.functional.one_hot(2 * Y, 3)),
    "floats that are no ids": (Y * 0.5 + 0.25, 2, ONE_HOT),
    "bfloat16": (Y.bfloat16(), 1, PLUS[:, None]),
    "one class": (torch.ones(6), 1, None),
    "three values": (torch.tensor([0.0, 1, 2, 0, 1, 2]), 1, torch.tensor([0.0, 1, 2, 0, 1, 2])[:, None]),
    "a column of 0 and 1 is values": (Y.float()[:, None], 1, Y.float()[:, None]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_floats_of_two_values_are_classes(case: str) -> None:
    raw, outputs, want = TARGETS[case]
    found, why = encode_targets(raw, outputs)
    if want is None:
        assert found is None, case
        assert "constant" in str(why), case
        return
    want = want.double()
    if "values" in case:
        want = (want - want.mean(0)) / want.std(0, correction=0)
    assert found is not None, f"{case}: {why}"
    torch.testing.assert_close(found, want, msg=case)
    assert ("classes" in describe_targets(raw, outputs)) == ("values" not in case), (
        f"{case}: {describe_targets(raw, outputs)}"
    )


M = 400
RARE = torch.arange(M) % 20 == 0
POINTS = torch.randn(M, D, generator=G)
FLAG = (torch.arange(M) % 2).long()
BALANCED: dict[str, tuple[Any, int]] = {  # a dataset, how many items of a tuple the model takes
    "(x, y, group)": (TensorDataset(POINTS, RARE.long(), FLAG), 1),
    "(x1, x2, y)": (TensorDataset(POINTS, POINTS, RARE.long()), 2),
    "(x, lengths, y, idx)": (TensorDataset(POINTS, FLAG, RARE.long(), torch.arange(M)), 2),
    "float labels": (TensorDataset(POINTS, RARE.float(), FLAG), 1),
    "a column of -1 and 1": (TensorDataset(POINTS, 2 * RARE.float()[:, None] - 1), 1),
    "a part of them": (Subset(TensorDataset(POINTS, RARE.long(), FLAG), range(0, M, 2)), 1),
    "items of a list": ([(x, int(y), f"{i}.png") for i, (x, y) in enumerate(zip(POINTS, RARE, strict=True))], 1),
    "float items": ([(x, float(y), 0.5 * i) for i, (x, y) in enumerate(zip(POINTS, RARE, strict=True))], 1),
    "pairs before labels": ([((x, x), int(y)) for x, y in zip(POINTS, RARE, strict=True)], 2),
    "lengths that collate adds": ([(x, int(y)) for x, y in zip(POINTS, RARE, strict=True)], 2),
    "paths before labels": ([(x, f"{i}.png", int(y)) for i, (x, y) in enumerate(zip(POINTS, RARE, strict=True))], 1),
}


@pytest.mark.parametrize("case", BALANCED)
def test_probes_are_balanced_over_the_label_and_nothing_else(case: str) -> None:
    dataset, leading = BALANCED[case]
    probes = choose_probes(DataLoader(dataset, 8), 20, leading=leading)
    x = probes.batch[0] if isinstance(probes.batch[0], Tensor) else probes.batch[0][0]
    rare = {tuple(row.tolist()) for row in POINTS[RARE]}
    share = sum(tuple(row.tolist()) in rare for row in x)
    assert share == 10, f"{case}: {share} of 20 are of the rare class; {probes.how}"
    assert "balanced over 2 classes" in probes.how, f"{case}: {probes.how}"


# ── in a run ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.net(x if mask is None else x * mask[:, None])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(dataset: Any, folder: Path, **settings: Any) -> NTKWatch:
    watch = NTKWatch(every=[0, 3], budget=None, probes=16, **settings)
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", callbacks=[watch], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, default_root_dir=folder,
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    trainer.fit(Module(), DataLoader(dataset, 16))
    return watch


def test_a_group_beside_the_label_changes_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    y = (POINTS[:, 0] > 0).long()
    with caplog.at_level(logging.INFO):
        plain = fit(TensorDataset(POINTS, y), tmp_path / "a").last
        assert "inputs: x float32 [16, 4]; targets: item 2 of 2, int64 [16], 2 classes" in caplog.text
        caplog.clear()
        grouped = fit(TensorDataset(POINTS, y, FLAG), tmp_path / "b").last
        assert "targets: item 2 of 3, int64 [16], 2 classes" in caplog.text
        assert "forward is called without its optional mask; ignored: item 3 of 3" in caplog.text
    again = fit(TensorDataset(POINTS, y, FLAG), tmp_path / "c", outputs=lambda model, batch: model(batch[0])).last
    for other in (grouped, again):
        assert plain is not None
        assert other is not None
        for name in ("centered_alignment", "centered_alignment_z", "kernel_angle", "taylor_ratio"):
            assert other.metrics[name] == plain.metrics[name], name


def test_fresh_probes_are_read_in_the_same_way(tmp_path: Path) -> None:
    y = (POINTS[:, 0] > 0).long()
    fresh = fit(TensorDataset(POINTS, y, FLAG), tmp_path / "a", resample=True).last
    plain = fit(TensorDataset(POINTS, y), tmp_path / "b", resample=True).last
    assert fresh is not None
    assert plain is not None
    assert fresh.metrics["centered_alignment"] == plain.metrics["centered_alignment"]
