"""The architecture holds: imports point down, packages import only their libraries, nothing works at import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import PACKAGE, PAGE, imported, imports, layers, libraries, packages, page

LAYERS, PACKAGES, LIBRARIES = layers(), packages(), libraries()
NAMES = set(PACKAGES)
WITHOUT = {"watching/schedule.py": {"torch", "numpy"}, "metrics": {"torch.nn"}, "figures": {"torch.nn"}}


def test_the_table_names_every_package_and_no_other() -> None:
    assert set(LAYERS) == NAMES, "docs/architecture.md: give each package of ntkwatch/ one row of the table"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    for path in PACKAGES[package]:
        for other in imported(path, NAMES, types=True) - {package}:
            assert LAYERS[other] <= LAYERS[package], f"{path.name} imports {other} from the layer above"
            assert LAYERS[package] > 0, f"{path.name} is on layer 0 and imports {other}"


def test_no_cycle_on_a_layer() -> None:
    graph = {name: set().union(*(imported(p, NAMES, types=True) for p in PACKAGES[name])) - {name} for name in NAMES}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name in graph if name not in done and graph[name] <= done}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("package", PACKAGES)
def test_files_of_a_package_make_no_cycle(package: str) -> None:
    modules = {_module(path): path for path in PACKAGES[package]}
    graph = {
        name: (imports(path, types=True) & set(modules)) - {name, f"ntkwatch.{package}"}
        for name, path in modules.items()
    }
    done: set[str] = {f"ntkwatch.{package}"}
    while not set(graph) <= done:
        free = {name for name in graph if name not in done and graph[name] <= done}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_have_owners(library: str) -> None:
    for package, paths in PACKAGES.items():
        for path in paths:
            assert not _uses(path, library) or package in LIBRARIES[library], f"{path.name} imports {library}"


@pytest.mark.parametrize("place", WITHOUT)
def test_pure_code_stays_pure(place: str) -> None:
    found = PACKAGE / place
    for path in [found] if found.suffix else sorted(found.rglob("*.py")):
        for library in WITHOUT[place]:
            assert not _uses(path, library), f"{path.name} must not import {library}"


def _uses(path: Path, library: str) -> bool:
    return any(name == library or name.startswith(library + ".") for name in imports(path))


def test_the_picture_is_of_today() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.architecture --write`"


def test_files_stay_short() -> None:
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300
    }
    assert not long, f"split these by idea: {long}"


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file(), "without the marker a user's type checker takes our names as Any"


def test_importing_the_package_does_no_work() -> None:
    code = "import sys, ntkwatch; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"pytorch_lightning", "lightning", "matplotlib", "wandb", "pandas", "tensorboard", "torch"} & set(loaded)
    assert not heavy, f"`import ntkwatch` loads {heavy}"
