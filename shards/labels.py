"""Class names and numbers."""

from __future__ import annotations

from collections.abc import Iterable

_MOST_NUMBERS = 10**6
"""Every number up to the largest becomes a class; larger ones are identifiers, which are names."""


def class_names(texts: Iterable[str], before: tuple[str, ...] = (), *, numbers: bool = False) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers: sorted.

    Args:
        texts: one a file; empty for no class.
        before: those that are known already, which keep their numbers.
        numbers: texts may be the numbers of the classes, as in `cls` members of tars; they stay what they are, if all
            are written as a program writes numbers (7, not 007).
    """
    present = {text for text in texts if text} | set(before)
    if numbers and present and all(map(_is_number, present)):
        return tuple(str(number) for number in range(max(int(text) for text in present) + 1))
    return (*before, *sorted(present - set(before)))


def _is_number(text: str) -> bool:
    return len(text) <= len(str(_MOST_NUMBERS)) and text.isdecimal() and str(int(text)) == text and (
        int(text) < _MOST_NUMBERS)
