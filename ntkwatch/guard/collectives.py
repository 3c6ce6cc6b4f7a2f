"""A rank that measures alone sends nothing: a collective would wait for ranks that do not take part in it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ntkwatch.guard.interruption import ProbeEnded, check

# An operation that communicates takes an argument of one of these names.
COMMUNICATION_ARGUMENTS = ("process_group", "group_name", "ranks", "peer")
GROUP_NAMING = "_process_group_name"  # what torch calls first for every new group, before it counts or waits
# Functions of dispatch modes, which lie on the stack between an operation and the code that asked for it.
MODE_FUNCTIONS = ("__torch_dispatch__", "refuse", "refuse_group")
LIBRARIES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")


class CollectiveError(RuntimeError):
    """The probed code communicates between ranks; nothing has been sent."""


class RefuseCollectives(TorchDispatchMode):
    """Inside, an operation that communicates with another rank ends the probe before anything is sent.

    Backward passes run under it too, since autograd gives its threads the modes of the thread that asked. It does not
    see threads that a model starts, nor libraries that communicate without torch.

    Attributes:
        refused: the error of the first one, also where the model's own code has caught it.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.refused: CollectiveError | None = None
        self._local: set[Any] = set()  # operations that are known not to communicate
        self._ended = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: a probe compiles nothing, and to say so anyway loads torch's whole compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._ended:
            self._check()
        if func not in self._local:
            partners = _participants(func, args, kwargs or {})
            if partners is None:
                self._local.add(func)
            elif not _is_single_rank(partners):
                self.refuse(str(func))
        return func(*args, **(kwargs or {}))

    def _check(self) -> None:
        """At any operation, so that a long pass ends too: once, since what then puts the model back is operations."""
        try:
            check()
        except ProbeEnded:
            self._ended = True
            raise

    def refuse(self, operation: str) -> None:
        """Ends the probe."""
        error = CollectiveError(f"{_caller()} communicates between ranks ({operation}), and rank 0 measures alone")
        self.refused = self.refused or error
        raise ProbeEnded(error)


@contextlib.contextmanager
def refuse_collectives() -> Iterator[None]:
    """Context in which one rank runs the user's code by itself; it also refuses to create a new process group.

    Creating a group would make torch wait for every rank.

    Raises:
        ProbeEnded: with a CollectiveError, where the code communicates with another rank; nothing has been sent.
    """
    mode, thread = RefuseCollectives(), threading.get_ident()
    name_group = getattr(dist.distributed_c10d, GROUP_NAMING)

    def refuse_group(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            mode.refuse("torch.distributed.new_group")
        return name_group(*args, **kwargs)

    setattr(dist.distributed_c10d, GROUP_NAMING, refuse_group)
    try:
        with mode:
            yield
    finally:
        setattr(dist.distributed_c10d, GROUP_NAMING, name_group)
    if mode.refused is not None:
        raise ProbeEnded(mode.refused)


def _participants(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Who takes part in an operation; None where it is one that does not communicate."""
    schema = getattr(func, "_schema", None)  # higher-order operations have none
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return next((given.get(name, name) for name in COMMUNICATION_ARGUMENTS if name in names), None)


def _is_single_rank(group: Any) -> bool:
    """Whether it is a group, or the name of one, that has this rank alone; False where it is unknown."""
    try:
        named = isinstance(group, str)
        found: Any = dist.distributed_c10d._resolve_process_group if named else dist.ProcessGroup.unbox
        return int(found(group).size()) == 1
    except (AttributeError, RuntimeError, TypeError, ValueError, KeyError):
        return False


def _caller() -> str:
    """The innermost function of the run's own between the probe and the operation, and its place."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code, room = frame.f_code, frame.f_globals.get("__name__", "").partition(".")[0]
        if room == __name__.partition(".")[0] and code.co_name not in MODE_FUNCTIONS:
            break  # the probe itself
        if room not in (*LIBRARIES, __name__.partition(".")[0]):
            name = getattr(code, "co_qualname", code.co_name)
            return f"{name} ({Path(code.co_filename).name}, line {frame.f_lineno})"
        frame = frame.f_back
    return "the model"
