"""WebDataset keys from file paths.

A key ends at the first dot of the base name, and everything that shares a key is one sample; so dots leave the stem,
and files that would meet under one key get different ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath

_UNSAFE = re.compile(r"[^\w/ -]")


def sample_keys(paths: Iterable[PurePath]) -> list[str]:
    """One key a relative path, in order; the same paths always give the same keys.

    `a/b.c.png` becomes `a/b_c`; the second and later files of one key get `~2`, `~3` ...
    """
    taken: set[str] = set()
    keys = []
    for path in paths:
        stem = path.name[: len(path.name) - len(path.suffix)] if path.suffix else path.name
        base = key = _UNSAFE.sub("_", (path.parent / stem).as_posix())
        count = 1
        while key in taken:
            count += 1
            key = f"{base}~{count}"
        taken.add(key)
        keys.append(key)
    return keys
