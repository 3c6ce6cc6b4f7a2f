"""A bug as a pattern of Python and what stands in its place; found in the package by syntax, whatever file it is in.

Patterns are compared as syntax trees: neither layout nor comments nor the name of a file matters. A pattern that is not
found exactly once is an error, so that no bug goes missing when code is rewritten.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

LISTS = ("body", "orelse", "finalbody")  # of statements
Bound = dict[str, ast.AST]  # what each ANY of a pattern has met


class PlantingError(ValueError):
    """A pattern that does not occur exactly once in the package."""


@dataclass(frozen=True)
class Bug:
    """One planted bug.

    name: short, unique. what: the bug in one sentence. breaks: the behaviour that no longer holds.
    old, new: an expression or statements, and what replaces them. A name in `old` that begins with ANY stands for any
    expression, and in `new` for what it met.
    tests: ids below tests/, one a line, of tests of which one must fail with it.
    within: a function or class whose name others rely on, where `old` occurs more than once in the package.
    """

    name: str
    what: str
    breaks: str
    old: str
    new: str
    tests: str
    within: str | None = None

    @property
    def selection(self) -> list[str]:
        return [f"tests/{line.strip()}" for line in self.tests.strip().splitlines()]


class Source:
    """The text of a package's files, in which patterns are looked up."""

    def __init__(self, package: Path) -> None:
        self.texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}

    @cached_property
    def _nodes(self) -> dict[type, list[tuple[Path, ast.AST]]]:
        found: dict[type, list[tuple[Path, ast.AST]]] = {}
        for path, text in self.texts.items():
            for node in ast.walk(ast.parse(text)):
                found.setdefault(type(node), []).append((path, node))
        return found

    @cached_property
    def _siblings(self) -> dict[int, list[ast.AST]]:
        """Of each statement, by id: itself and the statements after it."""
        nodes = (node for found in self._nodes.values() for _, node in found)
        lists = (getattr(node, name, None) for node in nodes for name in LISTS)
        return {id(node): each[i:] for each in lists if isinstance(each, list) for i, node in enumerate(each)}

    def places(self, bug: Bug) -> list[Path]:
        """The file of each occurrence of the bug's pattern."""
        pattern, _ = _parsed(bug.old, bug.new)
        inside = None if bug.within is None else {id(node) for node in self._within(bug.within)}
        return [
            path
            for path, node in self._nodes.get(type(pattern[0]), [])
            if (inside is None or id(node) in inside)
            and _match(pattern, self._siblings.get(id(node), [node])[: len(pattern)]) is not None
        ]

    def _within(self, name: str) -> Iterator[ast.AST]:
        for kind in (ast.FunctionDef, ast.ClassDef):
            for _, node in self._nodes.get(kind, []):
                if node.name == name:  # type: ignore[attr-defined]
                    yield from ast.walk(node)

    def planted(self, bug: Bug) -> tuple[Path, str]:
        """The file that the bug is in, and its text with it.

        Raises:
            PlantingError: the pattern does not occur exactly once.
        """
        places = self.places(bug)
        if len(places) != 1:
            where = ", ".join(path.name for path in places) or "no file"
            raise PlantingError(f"{bug.name}: its pattern must occur once and is in {where}: {bug.old.strip()!r}")
        tree = _Replace(*_parsed(bug.old, bug.new), bug.within).visit(ast.parse(self.texts[places[0]]))
        return places[0], ast.unparse(ast.fix_missing_locations(tree))


class _Replace(ast.NodeTransformer):
    """Puts `new` where `old` is, inside functions and classes of one name or everywhere."""

    def __init__(self, old: list[ast.AST], new: list[ast.AST], within: str | None) -> None:
        self.old, self.new, self.within = old, new, within
        self.inside = within is None

    def visit(self, node: ast.AST) -> ast.AST:
        outside, self.inside = self.inside, self.inside or getattr(node, "name", None) == self.within
        if self.inside and not isinstance(self.old[0], ast.stmt):
            bound = _match(self.old, [node])
            if bound is not None:
                return _filled(self.new, bound)[0]
        node = self.generic_visit(node)
        if self.inside and isinstance(self.old[0], ast.stmt):
            self._statements(node)
        self.inside = outside
        return node

    def _statements(self, node: ast.AST) -> None:
        size = len(self.old)
        for each in (getattr(node, name, None) for name in LISTS):
            for i in range(len(each) - size + 1 if isinstance(each, list) else 0):
                bound = _match(self.old, each[i : i + size])
                if bound is not None:
                    each[i : i + size] = _filled(self.new, bound)
                    return


@cache
def _parsed(*codes: str) -> tuple[list[ast.AST], ...]:
    """Expressions where all are single ones, else statements."""
    bodies = [ast.parse(code.strip()).body for code in codes]
    if all(len(body) == 1 and isinstance(body[0], ast.Expr) for body in bodies):
        return tuple([body[0].value] for body in bodies)  # type: ignore[attr-defined]
    return tuple(list(body) for body in bodies)


def _match(pattern: list[ast.AST], nodes: list[ast.AST]) -> Bound | None:
    """What the ANYs of a pattern stand for in these nodes; None where they are others."""
    bound: Bound = {}
    return bound if _same(pattern, nodes, bound) else None


def _same(a: object, b: object, bound: Bound) -> bool:
    """Whether two trees are alike but for places in a file, and for whether a name is read or written."""
    if isinstance(a, ast.Name) and a.id.startswith("ANY") and isinstance(b, ast.expr):
        return _same(bound.setdefault(a.id, b), b, {})
    if isinstance(a, ast.AST):
        names = (name for name in a._fields if name not in ("ctx", "kind"))
        return type(a) is type(b) and all(_same(getattr(a, n, None), getattr(b, n, None), bound) for n in names)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(_same(x, y, bound) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _filled(code: list[ast.AST], bound: Bound) -> list[ast.AST]:
    """The replacement, its ANYs written out."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return copy.deepcopy(bound.get(node.id, node))

    return [Fill().visit(copy.deepcopy(node)) for node in code]


def write(path: Path, text: str) -> None:
    """A module's new text; what Python compiled of it before is forgotten, whatever clock and size say."""
    path.write_text(text, encoding="utf-8")
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
