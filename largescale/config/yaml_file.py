"""Strict YAML: a key that appears twice in a mapping is an error, and so is anything but plain values.

YAML itself forbids duplicate keys, but PyYAML lets the last one win, so the first of two groups of the
same name would be lost silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}

_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
"""Numbers with an exponent that YAML 1.1 takes for text: 1e-3 has no point, 1.0e5 no sign after the e."""


_MOST_VALUES = 100_000
"""More than any recipe has; a few lines of aliases of aliases make billions."""


class _Loader(yaml.SafeLoader):
    pass


# Dates stay text: a run may be named 2026-01-31.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if tag != "tag:yaml.org,2002:timestamp"]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Written:
    """A number, true or false, and how it is written, for settings that take it as text: a run may be named 0012.

    Attributes:
        value, text: as YAML reads it, and as it stands in the file.
    """

    value: int | float | bool
    text: str

    def __str__(self) -> str:
        return self.text


class _TextKeeper(_Loader):
    def written(self, node: yaml.ScalarNode) -> Written:
        return Written(_Loader.yaml_constructors[node.tag](self, node), node.value)


for _kind in ("int", "float", "bool"):
    _TextKeeper.add_constructor(f"tag:yaml.org,2002:{_kind}", _TextKeeper.written)


class NotReadable(ValueError):
    """The text is not YAML, or not accepted here; the message is one line."""


def parse(text: str, *, keep_text: bool = False) -> Any:
    """The values in a YAML text: dicts, lists, strings, numbers, booleans and None.

    Args:
        text: to read.
        keep_text: whether numbers and booleans come as `Written`, with their text.

    Raises:
        NotReadable: not YAML, a duplicate key, a mapping or list that contains itself, or other types.
    """
    try:
        loader = _TextKeeper(text) if keep_text else _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, within=(), sizes={})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except NotReadable:
        raise
    except (yaml.YAMLError, ValueError) as error:  # such as an integer of ten thousand digits
        raise NotReadable(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise NotReadable("nested too deeply") from error


def _check(node: yaml.Node, within: tuple[int, ...], sizes: dict[int, int]) -> int:
    """Walk all nodes, aliased ones only once; returns the number of values they expand to."""
    if id(node) in within:
        raise NotReadable(f"line {_line(node)}: an alias makes it contain itself")
    if id(node) in sizes:
        return sizes[id(node)]
    if node.tag not in _PLAIN_TAGS:
        raise NotReadable(
            f"line {_line(node)}: {node.tag.removeprefix('tag:yaml.org,2002:')}: only plain values "
            f"(text, numbers, true and false, lists, mappings) are allowed"
        )
    if isinstance(node, yaml.MappingNode):
        _reject_twice(node)
    size = 1 + sum(_check(child, (*within, id(node)), sizes) for child in _children(node))
    if size > _MOST_VALUES:
        raise NotReadable(f"line {_line(node)}: aliases expand to more than {_MOST_VALUES} values")
    sizes[id(node)] = size
    return size


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _reject_twice(node: yaml.MappingNode) -> None:
    """Two `<<` count as duplicates too; a key that `<<` also brings does not, and wins over it."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise NotReadable(f"line {_line(key)}: a list or mapping cannot be a key")
        if key.value in lines:
            raise NotReadable(
                f"{key.value} appears twice, in lines {lines[key.value]} and {_line(key)}; keep one of them"
            )
        lines[key.value] = _line(key)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
