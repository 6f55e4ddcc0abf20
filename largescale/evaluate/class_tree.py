"""How relevant a class is to queries of another one: by being the same, or by how near both are in a tree of classes.

In a tree, relevance is 20 less the number of edges between two classes, at least 0 (Arandjelovic and Zisserman, arXiv
1712.06651, section 3.4)::

    names           the names of classes are paths: animals/birds/crow and animals/dog are 3 edges apart
    FILE            lines of a class, a tab and what it belongs to: violin<TAB>strings, strings<TAB>music

Classes whose paths have no beginning in common meet in a root above both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shards.ground.errors import InputError

NAMES = "names"
"""Asks for the tree in the names of classes."""

_HIGHEST = 20
_KEY = "evaluate.cross_modal_tree"


def class_relevance(classes: Sequence[str], tree: str) -> Tensor:
    """Relevance of classes to queries of each class, [C, C].

    Args:
        classes: their names.
        tree: `names`, a file, or empty: then a class is relevant to itself alone, by 1.

    Raises:
        InputError: the file cannot be read, is no tree, or lacks a class; there are no classes, or none whose name is a
            path.
    """
    if not tree:
        return torch.eye(len(classes))
    if not classes:
        raise InputError(f"{_KEY}={tree}: the test clips have no classes; leave it out")
    return (_HIGHEST - _distances(_paths(classes, tree))).clamp_min(0)


def _paths(classes: Sequence[str], tree: str) -> list[tuple[str, ...]]:
    """Of each class, what leads to it from the root, itself last."""
    if tree != NAMES:
        parents = _parents(Path(tree))
        return [_path(name, parents, tree) for name in classes]
    if not any("/" in name for name in classes):
        raise InputError(
            f"{_KEY}={NAMES}: no name of a class is a path, as animals/birds is; name a file, or leave it out"
        )
    return [tuple(name.split("/")) for name in classes]


def _parents(file: Path) -> dict[str, str]:
    """What each class of a file belongs to."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{_KEY}={file}: cannot be read ({error})") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = (part.strip() for part in line.split("\t"))
        if len(rest) != 1 or not name or not rest[0]:
            raise InputError(
                f"{file}, line {number}: expected a class, a tab and what it belongs to, got {line[:60]!r}"
            )
        if found.setdefault(name, rest[0]) != rest[0]:
            raise InputError(
                f"{file}, line {number}: {name} belongs to {found[name]} already; a tree has one place for each"
            )
    return found


def _path(name: str, parents: dict[str, str], file: str) -> tuple[str, ...]:
    if name not in parents and name not in parents.values():
        raise InputError(f"{_KEY}={file}: lacks the class {name!r}; add a line for it")
    path = [name]
    while path[-1] in parents:
        path.append(parents[path[-1]])
        if path[-1] in path[:-1]:
            raise InputError(f"{_KEY}={file}: {path[-1]!r} belongs to itself, by way of {path[-2]!r}")
    return tuple(reversed(path))


def _distances(paths: Sequence[tuple[str, ...]]) -> Tensor:
    """Edges between the ends of paths, [C, C]."""
    beginnings: dict[tuple[str, ...], int] = {}
    lengths = torch.tensor([len(path) for path in paths])
    numbers = torch.full((len(paths), int(lengths.max())), -1)
    for row, path in enumerate(paths):
        for depth in range(len(path)):
            numbers[row, depth] = beginnings.setdefault(path[: depth + 1], len(beginnings))
    shared = torch.zeros(len(paths), len(paths), dtype=torch.long)
    for level in numbers.T:
        shared += (level == level[:, None]) & (level >= 0)
    return (lengths + lengths[:, None] - 2 * shared).double()
