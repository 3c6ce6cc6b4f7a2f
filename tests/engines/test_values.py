"""What a pass over real tensors notes of values is what a pass over tensors without memory is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ntkwatch.engines.memory import Forward, LiveStorages


def _shuttled(x: Tensor, w: Tensor) -> Tensor:
    """Rows go in and come back by two masks of one shape, kept as views of one tensor."""
    masks = torch.stack([x[:, 0] > 0, x[:, 1] > 0.5])
    out = x.clone()
    out[masks[0]] = x[masks[0]] @ w
    out[masks[1]] = x[masks[1]] @ w
    return out


# Functions of x [6, 4] and a weight [4, 4]: each asks for values in another way.
ASKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "nonzero": lambda x, w: (x > 0).nonzero(),
    "nonzero, as a tuple": lambda x, w: torch.where(x > 0),
    "masked_select": lambda x, w: x.masked_select(x > 0),
    "rows by a mask": lambda x, w: x[x[:, 0] > 0] @ w,
    "entries by a mask": lambda x, w: x[x > 0],
    "columns by a mask": lambda x, w: x[:, x[0] > 0],
    "a mask of bytes": lambda x, w: x[(x[:, 0] > 0).byte()],
    "two masks, in and out": _shuttled,
    "unique": lambda x, w: x.round().unique(return_inverse=True, return_counts=True),
    "unique rows": lambda x, w: x.round().unique(dim=0),
    "unique, one after the other": lambda x, w: x.round().flatten().sort().values.unique_consecutive(),
    "repeated": lambda x, w: x.repeat_interleave((x[:, 0] > 0).long() + 1, 0),
    "counted": lambda x, w: (4 * x[:, 0]).abs().long().bincount(),
    "a number": lambda x, w: x[: int((x[:, 0] > 0).sum())],
    "numbers": lambda x, w: x.split([*(n := (x[:5, 0] > 0).long().tolist()), 6 - sum(n)]),
    "a comparison": lambda x, w: x @ w if (x[0, 0] > x[1, 0]) == torch.equal(x, x + 0) else x[:1],
    "packed": lambda x, w: (
        torch.nn.utils.rnn.pack_padded_sequence(
            x[None].expand(3, -1, -1), torch.tensor([5, 3, 1]), batch_first=True
        ).data
    ),
    "checkpointed": lambda x, w: checkpoint(lambda t: t[t[:, 0] > 0] @ w, x, use_reentrant=False),
}


def _shapes(result: Any) -> Any:
    return tree_map_only(Tensor, lambda t: (tuple(t.shape), t.dtype), result)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("name", ASKS)
def test_shapes_are_those_that_were_noted(name: str) -> None:
    """Twice over: the same answers come again, for recomputed parts and further passes."""
    ask, generator = ASKS[name], torch.Generator().manual_seed(3)
    x, w = (torch.randn(shape, generator=generator) for shape in ((6, 4), (4, 4)))
    w.requires_grad_()
    with Forward() as forward:
        real = ask(x, w)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_x, fake_w = mode.from_tensor(x), mode.from_tensor(w)
        with LiveStorages(forward.noted.again()):
            for _ in range(2):
                assert _shapes(ask(fake_x, fake_w)) == _shapes(real), name


@pytest.mark.parametrize("name", ["rows by a mask", "two masks, in and out", "checkpointed"])
def test_backward_passes_are_told_too(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(shape, generator=generator) for shape in ((6, 4), (4, 4)))
    w.requires_grad_()
    with Forward() as forward:
        ASKS[name](x, w)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_x, fake_w = mode.from_tensor(x), mode.from_tensor(w.detach()).requires_grad_()
        with LiveStorages(forward.noted.again()):
            (gradient,) = torch.autograd.grad(ASKS[name](fake_x, fake_w).sum(), fake_w)
    assert gradient.shape == w.shape, name


def test_without_notes_nothing_is_invented() -> None:
    with FakeTensorMode() as mode, LiveStorages(Forward().noted):
        x = mode.from_tensor(torch.randn(6, 4))
        with pytest.raises(RuntimeError):
            (x > 0).nonzero()
        with pytest.raises(RuntimeError):
            bool((x > 0).all())


def test_operations_that_ask_for_no_values_are_not_noted() -> None:
    with Forward() as forward:
        x = torch.randn(6, 4)
        F.layer_norm(x @ x.T, (6,)).softmax(-1).gather(1, x.argsort(1))[:, [0, 2]].where(x[:, :1] > 0, 0.0)
    assert not forward.noted
