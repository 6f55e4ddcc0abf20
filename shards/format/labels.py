"""Class names and numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shards.ground.errors import InputError

_MOST_NUMBERS = 10**6
"""Every number up to the largest becomes a class; larger ones are identifiers, which are names."""


def class_names(texts: Iterable[str], before: tuple[str, ...] = (), *, numbers: bool = False) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers: sorted.

    Args:
        texts: one per file; empty for no class.
        before: those that are known already, which keep their numbers.
        numbers: texts may be the numbers of the classes, as in `cls` members of tars; they stay what they are, if all
            are written as a program writes numbers (7, not 007).
    """
    present = {text for text in texts if text} | set(before)
    if numbers and present and all(map(_is_number, present)):
        return tuple(str(number) for number in range(max(int(text) for text in present) + 1))
    return (*before, *sorted(present - set(before)))


def read_names(path: Path) -> list[str]:
    """Names of classes from a file: that of class 0 in the first line, and so on.

    Raises:
        InputError: not a file of such lines.
    """
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class-names {path}: cannot be read ({error})") from error
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise InputError(f"--class-names {path}: expected one name per line, all different, class 0 first")
    return names


def named(classes: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """Classes that are numbers, under their names; as they are where none are given.

    Raises:
        InputError: classes that have names already, or more of them than names.
    """
    if not names:
        return classes
    if classes != tuple(map(str, range(len(classes)))):
        raise InputError(f"--class-names: only for classes that are numbers; these have names, such as {classes[0]}")
    if len(classes) > len(names):
        raise InputError(f"--class-names: has {len(names)} names, there is a class {len(classes) - 1}; one per line")
    return tuple(names)


def _is_number(text: str) -> bool:
    return (
        len(text) <= len(str(_MOST_NUMBERS))
        and text.isdecimal()
        and str(int(text)) == text
        and (int(text) < _MOST_NUMBERS)
    )
