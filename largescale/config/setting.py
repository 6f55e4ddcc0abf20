"""How a setting is declared: default, help and legal range in one place; checks and docs follow from it."""

from __future__ import annotations

import copy
import difflib
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field
from itertools import pairwise
from typing import Any

_LARGEST_INT = 2**63 - 1
"""The most that files of arrays or tensors can hold; larger whole numbers are mistakes."""


_TRUE_OR_FALSE = ("true", "false", "yes", "no", "on", "off")
"""Words that YAML reads as one of the two."""


LONGEST_WAIT_S = 1e6
LONGEST_RUN_S = 1e9
"""Bounds of settings in seconds: clocks overflow beyond them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The declaration of a setting. If the value is a list, bounds apply to each element.

    Attributes:
        help: what it means, for people.
        at_least, above, at_most, below: bounds of a number.
        one_of: the strings allowed.
        table: `module:NAME` of a table (or of a function that lists names) whose names are allowed.
        place: whether it is a path or URL, or empty for none; then words for true and false are mistakes.
        length: number of elements of a list; 0 allows any number from `min_length` up.
        ascending: elements of a list must not decrease.
        whole: numbers must be whole, for types that do not imply it.
        owners: the names in a table (of optimizers, strategies, protocols) that have it; `config.slots` fills it in.
        refused_elsewhere: whether another value than the default is an error where `used_if` does not hold; else it is
            named as without effect.
        used_if: another key that must be set (not 0, false or empty) for this one to have an effect, or
            `key=VALUE|VALUE` with the values it needs.
        free: whether a resumed run may have another value, since it does not change what is computed.
        expected: what to say about a value that does not fit; if empty, made from the rest.
        before: what versions without the key did, where that is not the default.
    """

    help: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] = ()
    table: str = ""
    place: bool = False
    length: int = 0
    min_length: int = 0
    ascending: bool = False
    whole: bool = False
    owners: tuple[str, ...] = ()
    refused_elsewhere: bool = False
    used_if: str = ""
    free: bool = False
    expected: str = ""
    before: Any = None

    def names(self) -> tuple[str, ...]:
        """The names allowed, including those of its table; empty if any text will do."""
        if not self.table:
            return self.one_of
        table = table_at(self.table)
        return tuple(table() if callable(table) else table)

    def misfit(self, value: Any) -> str:
        """What was expected instead of a value; empty if it fits."""
        if not _finite(value):
            return "finite numbers"
        expected = self._misfit_of_list(value) if isinstance(value, list) else self._misfit_of_one(value)
        return expected and (self.expected or expected)

    def _misfit_of_list(self, values: list[Any]) -> str:
        if self.length and len(values) != self.length:
            return f"{self.length} values"
        if len(values) < self.min_length:
            return f"at least {self.min_length} value{'s' * (self.min_length > 1)}"
        expected = next(filter(None, map(self._misfit_of_one, values)), "")
        if expected:
            return f"values, each {expected}"
        falls = self.ascending and any(later < earlier for earlier, later in pairwise(values))
        return "values that do not decrease" if falls else ""

    def _misfit_of_one(self, value: Any) -> str:
        if isinstance(value, str):
            return self._misfit_of_text(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "a whole number" if self.whole else ""
        if isinstance(value, int) and abs(value) > _LARGEST_INT:
            return "a number of at most 64 bits"
        if self.whole and not isinstance(value, int):
            return "a whole number"
        if self.at_least is not None and value < self.at_least:
            return "0 or more" if self.at_least == 0 else f"at least {self.at_least:.15g}"
        if self.above is not None and value <= self.above:
            return f"above {self.above:.15g}"
        if self.at_most is not None and value > self.at_most:
            return f"at most {self.at_most:.15g}" if self.at_most < 1e6 else f"at most {self.at_most:g}"
        return f"below {self.below:.15g}" if self.below is not None and value >= self.below else ""

    def _misfit_of_text(self, value: str) -> str:
        if self.whole:
            return "a whole number"
        if any(ord(character) < 32 for character in value):
            return "text without control characters"
        if self.min_length and not value.strip():
            return "a name"
        if self.place and value.lower() in _TRUE_OR_FALSE:
            return f"a path or URL, or '' for none; a folder or file of that name is ./{value}"
        if not (self.one_of or self.table) or value in self.names():
            return ""
        names = self.names()
        if self.table:
            return a_name(value, names)
        return f"{', '.join(names[:-1])} or {names[-1]}{did_you_mean(value, names)}"


def a_name(given: str, names: Iterable[str]) -> str:
    """What was expected instead of a name that is not in a table, with the closest one that is."""
    names = list(names)
    return f"one of {', '.join(names)}{did_you_mean(given, names)}"


def did_you_mean(given: str, names: Sequence[str]) -> str:
    """A question to end a message with; empty if no name is close."""
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def table_at(place: str) -> Any:
    """The table that `module:NAME` names; by name, since what is in tables imports the configuration."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _finite(value: Any) -> bool:
    """No number may be infinite: what switches something off is 0, and the help says so."""
    if isinstance(value, list | dict):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def setting(default: Any, help: str, **declared: Any) -> Any:
    """A dataclass field with its declaration; lists and groups are copied for each instance."""
    metadata = {"setting": Setting(help=help, **declared)}
    if isinstance(default, str | int | float):
        return field(default=default, metadata=metadata)
    return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


def declared(item: Field[Any]) -> Setting:
    """The declaration of a field."""
    return item.metadata.get("setting", Setting())
