"""What of a batch are inputs and what is the target: as forward requires, never by a guess, and said in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, empirical_ntk, layer_ntks

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
