"""All keys, and the one that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

from largescale.config.schema import Config
from largescale.config.slots import method_in, methods_with
from largescale.config.value_types import element_group, types_of
from largescale.config.values import enumerated


def unknown_key(key: str, schema: type[Config]) -> str:
    """What is wrong with a key that is not in a schema: which methods have it, or which key may have been meant."""
    group, _, name = re.sub(r"[.\[]\d.*", "", key).partition(".")
    if group == "method" and (owners := methods_with(name)):
        have = "have" if owners[1:] else "has"
        return f"{group}.{name} is unknown for method {method_in(schema)}; {enumerated(owners, 'and')} {have} it"
    # A crop group's own augmentation has the keys of all views'.
    best = likeliest(re.sub(r"^data\.crops\W\d+\W+augment\.", "data.augment.", key), all_keys(schema))
    ending = f"did you mean {' or '.join(best)}?" if best else "`largescale config` lists all keys"
    return f"unknown key {key}; {ending}"


def likeliest(key: str, known: Sequence[str]) -> list[str]:
    """The key that was probably meant; two if they are equally likely, none if nothing is close."""
    key = re.sub(r"[.\[]\d+\]?", "[0]", key)
    group, _, tail = key.rpartition(".")
    if mistyped := _mistyped(group, tail, known):
        return [mistyped]
    # Part of a name in the given group (train.batch), or the same name in another group (data.seed).
    begun = [name for name in known if name.startswith(f"{group}.") and tail in name.rpartition(".")[2].split("_")]
    elsewhere = [name for name in known if name.rpartition(".")[2] == tail]
    return [*begun[:1], *elsewhere[:1]] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)


def _mistyped(group: str, tail: str, known: Sequence[str]) -> str:
    """The key of the group whose name is nearly this one (data.shard); empty if there is none."""
    names = [name.removeprefix(f"{group}.") for name in known if name.startswith(f"{group}.")]
    near = difflib.get_close_matches(tail, names, n=1, cutoff=0.85)
    return f"{group}.{near[0]}" if near else ""


def all_keys(schema: type[Config]) -> list[str]:
    """The dotted names of all keys, in schema order; those of a list's elements as LIST[0].KEY."""
    return [key for key, _, _ in declarations(schema)]


def declarations(schema: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every key of a schema with its field and type, named and ordered as in `all_keys`."""
    hints = types_of(schema)
    for item in fields(schema):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from declarations(hint, f"{key}.")
            continue
        yield key, item, hint
        if group := element_group(hint):
            yield from declarations(group, f"{key}[0].")
