"""WebDataset keys from file names.

A key ends at the first dot of the base name, and everything that shares a key is one sample; so dots leave the stem,
and files of a folder that would meet under one key get different ones. Since folders differ too, keys differ.
"""

from __future__ import annotations

import re

_UNSAFE = re.compile(r"[^\w -]")


class FreshKeys:
    """Names for the files, or for the folders, of one folder; the same names in the same order always give the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}

    def of_file(self, name: str) -> str:
        """`b.c.png` becomes `b_c`; the second and later files of one name get `~2`, `~3` ..."""
        stem, dot, _ = name.rpartition(".")
        return self._unique(stem if dot and stem else name)

    def of_folder(self, name: str) -> str:
        """As for files, but all of the name counts."""
        return self._unique(name)

    def _unique(self, name: str) -> str:
        base = key = _UNSAFE.sub("_", name)
        count = self._last.get(base, 1)  # not from the first one: names without a safe letter may all share a base
        while key in self._taken:
            count += 1
            key = f"{base}~{count}"
            self._last[base] = count
        self._taken.add(key)
        return key
