"""Detection of gradients that a backward pass leaves in `.grad`, where they cannot be separated by example.

A Function whose backward pass calls `torch.autograd.backward` (a custom checkpoint, a reversible block) adds to `.grad`
of the weights inside and returns no gradients for them: to `torch.autograd.grad`, they do not affect the outputs.
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
    """Checks that passes inside the context leave `.grad` of trained parameters unchanged; the guard restores it.

    Raises:
        UnsupportedModel: `.grad` has changed, also if another error followed; the message names the parameters.
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
    """The gradient and its version counter, which differ after any change."""
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
