"""Whether a test launches a command, read from its source.

A test counts together with all of the suite that it refers to, by name and over modules: functions,
fixtures, constants. Somewhere among their texts must stand the program and each of the options.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

MARKERS = ("slow", "gpu", "slurm")
"""Of pytest, for tests that are not among the fast ones."""


@dataclass
class Module:
    """What the names of a test module stand for."""

    tree: ast.Module
    definitions: dict[str, list[ast.AST]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name -> module it is from, name there ("" for the module itself)."""


def tests_that_launch(root: Path, test_file: Path, wanted: set[str]) -> dict[str, str]:
    """Tests of a file whose texts hold all the words `wanted`; the marker of each, "" if fast."""
    module = _read(root / test_file)
    of_all = _markers(_assigned(module, "pytestmark"))
    found = {}
    for name, nodes in module.definitions.items():
        if name.startswith("test_") and wanted <= _words(root, root / test_file, name):
            own = _markers(node for n in nodes for node in n.decorator_list)
            found[name] = next(iter(own + of_all), "")
    return found


def missing_words(root: Path, test_file: Path, wanted: set[str]) -> set[str]:
    """Those of `wanted` that the most fitting test of the file lacks."""
    names = [name for name in _read(root / test_file).definitions if name.startswith("test_")]
    rest = (wanted - _words(root, root / test_file, name) for name in names)
    return min(rest, key=len, default=wanted)


@cache
def _read(path: Path) -> Module:
    module = Module(ast.parse(path.read_text(encoding="utf-8")))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module.imports[alias.asname or alias.name.split(".")[0]] = (alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module.imports[alias.asname or alias.name] = (node.module or "", alias.name)
    for node in module.tree.body:
        for name in _names_defined(node):
            module.definitions.setdefault(name, []).append(node)
    return module


def _names_defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


@cache
def _words(root: Path, path: Path, name: str) -> frozenset[str]:
    """Words of all texts that `name` of the module at `path` leads to, and modules it calls."""
    words: set[str] = set()
    seen: set[tuple[Path, str]] = set()
    waiting = [(path, name)]
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        module = _read(place[0])
        for node in (n for top in module.definitions.get(place[1], []) for n in ast.walk(top)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words |= _split(node.value)
            referred = _referred(node)
            if referred in module.definitions:
                waiting.append((place[0], referred))
            elif referred in module.imports:
                origin, inner = module.imports[referred]
                words |= {origin.rpartition(".")[2], inner}
                waiting += _places(root, origin, inner, node)
    return frozenset(words)


def _referred(node: ast.AST) -> str:
    """The name that a node refers to: a variable, or an argument, which may be a fixture."""
    if isinstance(node, ast.Name):
        return node.id
    return node.arg if isinstance(node, ast.arg) else ""


def _places(root: Path, origin: str, inner: str, node: ast.AST) -> list[tuple[Path, str]]:
    """Where what is imported from another module of the suite is defined: itself, or all of it."""
    path = root / f"{origin.replace('.', '/')}.py"
    if origin.startswith("tests") and path.exists():
        return [(path, inner)]
    path = root / f"{origin.replace('.', '/')}/{inner}.py"
    if origin.startswith("tests") and path.exists():  # a module as a whole
        return [(path, name) for name in _read(path).definitions]
    return []


def _split(text: str) -> set[str]:
    """Words of a text as they could stand on a command line: options, and last parts of paths."""
    words = text.split()
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    return {word.rpartition("/")[2] for word in words} | options


def _assigned(module: Module, name: str) -> Iterator[ast.AST]:
    for node in module.definitions.get(name, []):
        assert isinstance(node, ast.Assign)
        yield node.value


def _markers(nodes: Iterator[ast.AST]) -> list[str]:
    inner = (node for top in nodes for node in ast.walk(top))
    return [n.attr for n in inner if isinstance(n, ast.Attribute) and n.attr in MARKERS]
