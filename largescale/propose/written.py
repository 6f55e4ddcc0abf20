"""Choices as YAML, the reason beside each line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from largescale.methods.choice import Choice

_GROUPS = ("name", "run", "data", "model", "method", "optim", "train", "parallel", "checkpoint", "evaluate")


def written(header: list[str], choices: Mapping[str, Choice]) -> str:
    """A recipe.

    Args:
        header: lines of a comment at its top.
        choices: by dotted keys; a list of choices becomes a list with a reason beside each element.
    """
    lines = [f"# {line}".rstrip() for line in header]
    tree: dict[str, Any] = {}
    for key, choice in sorted(choices.items(), key=lambda item: _GROUPS.index(item[0].partition(".")[0])):
        *groups, name = key.split(".")
        level = tree
        for group in groups:
            level = level.setdefault(group, {})
        level[name] = choice
    for key, value in tree.items():
        lines += ["", *_lines(key, value)] if isinstance(value, dict) else _lines(key, value)
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield f"{key}:"
        for name, below in value.items():
            yield from (f"  {line}" for line in _lines(name, below))
    elif isinstance(value.value, list) and value.value and isinstance(value.value[0], Choice):
        yield f"{key}:"
        yield from (f"  {_commented(f'- {_plain(element.value)}', element.reason)}" for element in value.value)
    else:
        yield _commented(f"{key}: {_plain(value.value)}", value.reason)


def _commented(line: str, reason: str) -> str:
    return f"{line}  # {' '.join(reason.split())}" if reason else line


def _plain(value: Any) -> str:
    """A value in a line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**31, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
