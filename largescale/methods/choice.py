"""A value that was chosen for a corpus or a machine, and why."""

from __future__ import annotations

from typing import Any, NamedTuple


class Choice(NamedTuple):
    """A value of a setting, and the reason in a few words, for people."""

    value: Any
    reason: str
