"""Fixtures and the leak watch: no test may leave global state, an environment variable or a file behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.quick import sample

collect_ignore = ["typed_user.py"]  # for mypy alone: the search for doctests would run it

ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])  # of tests' processes
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):  # a shell's, or readline's in a process started by pytest
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the engines' and the trust tests put their models")
    parser.addoption("--quick", action="store_true", help="a seeded sample of each file's tests, see quick.py")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["NTKWATCH_DEVICE"] = config.getoption("--device")  # read by device.py, in processes of a test's own too


@pytest.hookimpl(trylast=True)  # of what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        kept = sample(item.nodeid for item in items)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  a user's run may draw from the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leaves_no_trace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that changes the default dtype, grad mode or working directory fails here, by name."""
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd())
    assert after == before, f"the test left global state changed: {before} -> {after}"
