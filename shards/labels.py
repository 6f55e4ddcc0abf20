"""Class names and numbers."""

from __future__ import annotations

from collections.abc import Iterable


def class_names(texts: Iterable[str], before: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers: numbers stay what they are, other texts are sorted.

    Those of `before` keep their numbers.
    """
    present = {text for text in texts if text} | set(before)
    if present and all(text.isdecimal() for text in present):
        return tuple(str(number) for number in range(max(int(text) for text in present) + 1))
    return (*before, *sorted(present - set(before)))
