"""The architecture as docs/architecture.md says it, and as the imports have it.

    python -m tests.architecture [--write]

prints the picture of packages and imports, or writes it into the page. `tests/test_architecture.py` holds the code to
the page's table and the page to this picture.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE, PAGE = ROOT / "ntkwatch", ROOT / "docs" / "architecture.md"
_ROW = re.compile(r"^\| (\d) \| `(\w+)` \|.*\| ([\w, .]*) \|$", re.MULTILINE)
_PICTURE = re.compile(r"(<!-- picture -->\n).*?(<!-- end of picture -->)", re.DOTALL)


def layers() -> dict[str, int]:
    """Package → layer, from the page's table."""
    return {name: int(layer) for layer, name, _ in _ROW.findall(PAGE.read_text())}


def libraries() -> dict[str, set[str]]:
    """Library → the packages that may import it, from the page's table."""
    found: dict[str, set[str]] = {}
    for _, package, names in _ROW.findall(PAGE.read_text()):
        for name in filter(None, names.split(", ")):
            found.setdefault(name, set()).add(package)
    return found


def packages() -> dict[str, list[Path]]:
    """Package (or single module) → its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if not name.startswith("__"):
            found.setdefault(name, []).append(path)
    return found


def imports(path: Path, types: bool = False) -> set[str]:
    """Every module that the file imports, at the top or inside a function; `types`: for type checking too."""
    found: set[str] = set()
    for node in _walk(ast.parse(path.read_text()), types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write absolute imports"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _walk(node: ast.AST, types: bool) -> Iterator[ast.AST]:
    yield node
    is_test = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    below = node.orelse if isinstance(node, ast.If) and is_test and not types else ast.iter_child_nodes(node)
    for child in below:
        yield from _walk(child, types)


def imported(path: Path, known: set[str], types: bool = False) -> set[str]:
    """The packages of ours that a file imports."""
    named = {name.split(".")[1] for name in imports(path, types) if name.startswith("ntkwatch.")}
    return named & known


def arrows() -> Counter[tuple[str, str]]:
    """(importer, imported) → how many files of the importer do."""
    found, known = Counter[tuple[str, str]](), set(packages())
    for package, paths in packages().items():
        for path in paths:
            found.update((package, other) for other in imported(path, known) - {package})
    return found


def picture() -> str:
    """A Mermaid graph: packages by layer, an arrow for each import between them."""
    placed = layers()
    lines = ["```mermaid", "graph TD"]
    for layer in sorted(set(placed.values()), reverse=True):
        names = [name for name, at in placed.items() if at == layer]
        lines += [f'  subgraph L{layer}["layer {layer}"]', *(f"    {name}" for name in names), "  end"]
    lines += [f"  {a} --> {b}" for a, b in sorted(arrows())]
    return "\n".join([*lines, "```", ""])


def page() -> str:
    """The page with the picture of today."""
    return _PICTURE.sub(lambda found: found[1] + picture() + found[2], PAGE.read_text())


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(picture())
