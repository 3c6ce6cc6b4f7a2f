"""The device that new tensors go to where nobody names one: the CPU for us, and a script's own for its code.

A script may say `torch.set_default_device("cuda")`. Its model and its `outputs` are called under that, while all that a
probe makes for itself would else land there as well, beside what lies on the CPU or on the model's device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_USERS_DEVICE: ContextVar[torch.device | None] = ContextVar(
    "users_default_device", default=None
)  # the script's, while the CPU is in force


@contextlib.contextmanager
def cpu_default_device() -> Iterator[None]:
    """The CPU, whatever a script has set. May be nested."""
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    token = _USERS_DEVICE.set(device)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _USERS_DEVICE.reset(token)


@contextlib.contextmanager
def users_default_device() -> Iterator[None]:
    """Inside `cpu_default_device`, what the script has set: for calls of its own code."""
    device = _USERS_DEVICE.get()
    if device is None:
        yield
        return
    with torch.device(device):
        yield
