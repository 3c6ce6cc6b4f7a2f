"""Guards that leave no trace: whatever a probe may disturb in a run is saved before it and restored after it.

In: the modules of a run. Out: the same modules, bit for bit, also when the probe fails.
Read `leave_no_trace` below, then `modules` and `process` (what is saved), `values` (how), `objects` (datasets),
`interruption` and `collectives` (signals and ranks), `default_device`.

Out of reach, because modules do not hold them: data loaders and their samplers, optimizers, and what a user's forward
hook writes into other objects. Forward hooks run (weight norm needs them); backward and gradient hooks, which observe
training, do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ntkwatch.guard.default_device import cpu_default_device
from ntkwatch.guard.modules import Modules
from ntkwatch.guard.objects import preserve_objects
from ntkwatch.guard.process import guard_flags, guard_generators
from ntkwatch.guard.values import GuardError, Undo, put_back

__all__ = ["GuardError", "leave_no_trace", "preserve_objects"]


@contextmanager
def leave_no_trace(*modules: nn.Module) -> Iterator[None]:
    """Inside, `modules` are in evaluation mode with gradients on and reduced precision off; after, all is as before.

    Put back bit by bit: buffers, tensors and generators that modules keep as attributes, embeddings with `max_norm`.
    Put back by reference: `.grad`, `.data`, hooks, every attribute of every module, and what its lists and dicts hold.
    Put back by value: training flags, requires_grad, global flags, the random state of python, numpy and torch.
    Inside, `.grad` is None, so that a backward pass cannot add to the run's gradients. Guards may be nested.

    Raises:
        GuardError: before anything is touched, for a lazy module that is not initialised; after all else is back, for
            a parameter that was changed in place (its `_version` moved). A signal on its way up is never replaced.
    """
    undo: list[Undo] = []
    with cpu_default_device(), torch.inference_mode(False):
        try:
            try:
                tree = Modules(modules)
                guard_flags(undo, tree.recurrent_on_gpu())
                guard_generators(undo)
                tree.guard(undo)
                yield
            except BaseException as error:
                _finish(undo, error)
                raise
            _finish(undo, None)
        finally:
            put_back(undo)  # what is left where a signal cut `_finish` off


def _finish(undo: list[Undo], error: BaseException | None) -> None:
    """Put everything back; then raise what went wrong in that, unless a signal is already on its way up."""
    troubles = put_back(undo)
    signals = [trouble for trouble in troubles if not isinstance(trouble, Exception)]
    faults = [trouble for trouble in troubles if isinstance(trouble, Exception)]
    said = "; ".join(str(fault) for fault in faults)
    if signals or (error is not None and not isinstance(error, Exception)):
        if faults:
            warnings.warn(f"ntkwatch: {said}", stacklevel=4)
        if error is None or isinstance(error, Exception):
            troubles.clear()  # as in `put_back`: the signal is to be held by nobody here
            raise signals.pop(0)
    elif faults:
        raise GuardError(said) from (error or faults[0])
