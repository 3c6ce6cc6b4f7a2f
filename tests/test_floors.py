"""The house stands: imports point down, rooms touch only what they own, nothing works at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ntkwatch"
FLOORS = {
    4: {
        "callback",
        "opening",
        "gathering",
        "settings",
        "beginning",
        "trainer",
        "following",
        "followable",
        "failures",
        "joint",
        "grid",
        "environment",
        "cli",
        "demo",
        "interventions",
        "place",
        "continuation",
    },
    3: {
        "session",
        "resume",
        "checkpoint",
        "monitor",
        "manifest",
        "baseline",
        "initial",
        "diagnostics",
        "instruments",
        "checks",
        "derived",
        "forecast",
        "costs",
        "limit",
    },
    2: {"engines"},
    1: {
        "default_device",
        "collectives",
        "plain",
        "batch",
        "reading",
        "calling",
        "examples",
        "parts",
        "output",
        "model",
        "statistics",
        "guard",
        "probes",
        "sinks",
        "compare",
        "report",
        "words",
        "losses",
        "misfits",
        "outcome",
        "optimizers",
        "shadow",
    },
    0: {"schedule", "interruption", "metrics", "infinite", "distributed", "record", "figures", "slopes"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Which rooms may import a library at all: whoever else does has stepped into another's room.
OWNERS = {
    "pytorch_lightning": {"callback", "demo"},
    "lightning": {"callback", "demo"},
    "wandb": {"sinks"},
    "tensorboard": {"sinks"},
    "matplotlib": {"figures"},
    "safetensors": {"record"},
    "filelock": {"record"},
    "pandas": {"compare", "record", "report", "figures", "cli", "slopes", "words"},
    "scipy": {"slopes", "compare", "metrics", "infinite"},
    "typer": {"cli"},
    "rich": {"cli", "demo"},
    "jinja2": {"report"},
    "torch.distributed": {"distributed", "collectives"},
    "torch.fx": {"infinite"},
    "sklearn": {"demo"},
    "torchmetrics": set(),
}
FORBIDDEN = {"schedule": {"torch", "numpy"}, "metrics": {"torch.nn"}, "figures": {"torch.nn"}}


def _rooms() -> dict[str, list[Path]]:
    rooms: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if not room.startswith("__"):
            rooms.setdefault(room, []).append(path)
    return rooms


def _imports(path: Path) -> set[str]:
    """Every module that the file imports, at the top or inside a function, but for type checking only."""
    found: set[str] = set()
    for node in _walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write absolute imports"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    yield node
    for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    below = node.orelse if isinstance(node, ast.If) and for_types else ast.iter_child_nodes(node)
    for child in below:
        yield from _walk(child)


def _ours(imports: set[str]) -> set[str]:
    return {name.split(".")[1] for name in imports if name.startswith("ntkwatch.") and name.split(".")[1] in FLOOR_OF}


ROOMS = _rooms()


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_floor(room: str) -> None:
    assert room in FLOOR_OF, f"{room} stands on no floor: add it to the table here and to the design"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    for path in ROOMS[room]:
        for other in _ours(_imports(path)) - {room}:
            assert FLOOR_OF[other] <= FLOOR_OF[room], f"{path.name} imports {other} from the floor above"
            assert FLOOR_OF[room] > 0, f"{path.name} is on floor 0 and imports {other}"


def test_no_cycle_on_a_floor() -> None:
    graph = {room: set().union(*(_ours(_imports(p)) for p in paths)) - {room} for room, paths in ROOMS.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {room for room in graph if room not in done and graph[room] <= done}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_have_owners(library: str) -> None:
    for room, paths in ROOMS.items():
        for path in paths:
            used = {name for name in _imports(path) if name == library or name.startswith(library + ".")}
            assert not used or room in OWNERS[library], f"{path.name} imports {library}; its owners: {OWNERS[library]}"


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_stay_out_of(room: str) -> None:
    for path in ROOMS.get(room, []):
        imports = _imports(path)
        for library in FORBIDDEN[room]:
            used = {name for name in imports if name == library or name.startswith(library + ".")}
            assert not used, f"{path.name} must not touch {library}"


def test_files_stay_short() -> None:
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 330
    }
    assert not long, f"split these by idea: {long}"


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file(), "without the marker a user's type checker takes our names as Any"


def test_importing_the_package_does_no_work() -> None:
    code = "import sys, ntkwatch; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"pytorch_lightning", "lightning", "matplotlib", "wandb", "pandas", "tensorboard", "torch"} & set(loaded)
    assert not heavy, f"`import ntkwatch` loads {heavy}"
