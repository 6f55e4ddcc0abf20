"""Imports point one way: from a room to those below it, in both packages; nothing goes round in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

ROOMS = {
    "shards": [
        "ground",
        "images",
        "clips",
        "format",
        "stores",
        "sources",
        "cleaning",
        "conversion",
        "inspection",
        "convert_options",
        "public",
        "cli",
        "__main__",
    ],
    "largescale": [
        "distributed",
        "processes",
        "config",
        "models",
        "data",
        "clustering",
        "optim",
        "methods",
        "parallel",
        "checkpoint",
        "evaluate",
        "observe",
        "run",
        "report",
        "curate",
        "plan",
        "pretrain",
        "prune",
        "propose",
        "command_examples",
        "cli",
        "__main__",
    ],
}
"""From the lowest to the highest. A room may import what stands before it, and nothing after it."""

OF_SHARDS = {"ground", "images", "format", "stores"}
"""What training knows of `shards`: how a shard folder is found, read and decoded, not how it is made."""

MAX_LINES = 400


def modules() -> dict[str, Path]:
    """All modules of both packages by their dotted names."""
    files = [file for package in ROOMS for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imports(file: Path) -> Iterator[str]:
    """Modules of both packages that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(module: str) -> tuple[str, str]:
    """`largescale.data.order` to `largescale`, `data`."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


def arrows() -> Iterator[tuple[str, str]]:
    """Which module imports which, within and between both packages."""
    for module, file in MODULES.items():
        yield from ((module, name) for name in imports(file) if name.partition(".")[0] in ROOMS)


def test_every_room_has_a_floor():
    for package, rooms in ROOMS.items():
        there = {room(module)[1] for module in MODULES if room(module)[0] == package and room(module)[1]}
        assert there - {"sample"} == set(rooms)


def test_imports_point_down():
    for module, other in arrows():
        (package, above), (other_package, below) = room(module), room(other)
        if not above or not below or (package, above) == (other_package, below):
            continue
        if package == other_package:
            rooms = ROOMS[package]
            assert rooms.index(below) < rooms.index(above), f"{module} imports {other}, which stands above it"
        else:
            assert package == "largescale", f"{module} imports {other}: shards are made without the training package"
            assert below in OF_SHARDS or above == "cli", f"{module} imports {other}"


def test_no_import_goes_round_in_a_circle():
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, other in arrows():
        graph[module].add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_are_short():
    long = {name: lines for name, file in MODULES.items() if (lines := len(file.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_packages_hold_no_logic():
    """An `__init__` offers names: a reader looks for what is done in a file that says what."""
    for module, file in MODULES.items():
        if file.name == "__init__.py":
            extra = [
                node
                for node in ast.parse(file.read_text()).body
                if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign)
                and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            ]
            assert not extra or module in ROOMS, f"{module}: {ast.unparse(extra[0])[:60]}"
