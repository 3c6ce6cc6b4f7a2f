"""Whether gradients are returned by a backward pass or left in `.grad`, where they cannot be told apart by example.

A Function whose backward pass calls `torch.autograd.backward` (a checkpoint of one's own, a reversible block) adds to
`.grad` of the weights inside and returns none for them: to `torch.autograd.grad` they seem to have no part in the
outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from ntkwatch.engines.memory import is_out_of_memory
from ntkwatch.model import Network, UnsupportedModel

_MOST = 50  # names in a message


@contextlib.contextmanager
def returned_gradients(network: Network) -> Iterator[None]:
    """Raises UnsupportedModel where passes inside change `.grad` of trained parameters, naming them.

    Whatever fails inside because of that is told so too. To put `.grad` back is the guard's part.
    """
    before = {name: _mark(p) for name, p in network.parameters.items()}
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            _check(network, before, error)
        raise
    _check(network, before)


def _mark(p: Tensor) -> tuple[Tensor | None, int]:
    """Another one after any change: the gradient, and how often it was changed in place."""
    return p.grad, -1 if p.grad is None else p.grad._version


def _check(network: Network, before: dict[str, tuple[Tensor | None, int]], cause: Exception | None = None) -> None:
    changed = []
    for name, p in network.parameters.items():
        (old, version), (now, later) = before[name], _mark(p)
        if now is not old or version != later:
            changed.append(name)
    if not changed:
        return
    names = ", ".join(changed[:_MOST]) + (f" and {len(changed) - _MOST} more" if len(changed) > _MOST else "")
    raise UnsupportedModel(
        f"the gradient of {names} arrives through .grad, from a backward pass that calls torch.autograd.backward (a "
        "checkpoint of one's own, a reversible block), where it cannot be told apart by example: run the block without "
        "it where self.training is False, or with torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)"
    ) from cause
