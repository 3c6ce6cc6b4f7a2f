"""Where the engines' tests put their models: `pytest --device cuda` measures on a GPU what the others do on the CPU."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor, nn

from ntkwatch.model import map_leaves

DEVICE = torch.device(os.environ.get("NTKWATCH_DEVICE", "cpu"))  # set by conftest.py
T = TypeVar("T")


def placed(module: nn.Module, batch: T) -> tuple[nn.Module, T]:
    """Both on the device of this run."""
    return module.to(DEVICE), map_leaves(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, batch)
