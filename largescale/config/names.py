"""All keys there are, and the one that somebody meant."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_type_hints

from largescale.config.schema import Config
from largescale.config.slots import methods_with
from largescale.config.value_types import element_group


def did_you_mean(key: str, schema: type[Config]) -> str:
    """A question that ends the message of an unknown key: the likeliest key, two where they are equally likely."""
    key, known = re.sub(r"[.\[]\d+\]?", "[0]", key), all_keys(schema)
    group, _, tail = key.rpartition(".")
    if group == "method" and (owners := methods_with(tail)):
        return f" for this method.name; {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
    # A part of a name in the group that was named (train.batch), or the name in another group (data.seed).
    begun = [name for name in known if name.startswith(f"{group}.") and tail in name.rpartition(".")[2].split("_")]
    elsewhere = [name for name in known if name.rpartition(".")[2] == tail]
    best = [*begun[:1], *elsewhere[:1]] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not best:
        return "; `largescale pretrain CONFIG --print` lists all keys"
    return f"; did you mean {' or '.join(best)}?"


@cache
def all_keys(schema: type[Config]) -> list[str]:
    """Every key by its dotted name, in the order of the schema; those of a list's elements as LIST[0].KEY."""
    return _keys(schema, "")


def _keys(schema: type, prefix: str) -> list[str]:
    hints = get_type_hints(schema)
    keys: list[str] = []
    for item in fields(schema):
        name = f"{prefix}{item.name}"
        keys += _keys(hints[item.name], f"{name}.") if is_dataclass(hints[item.name]) else [name]
        if group := element_group(hints[item.name]):
            keys += _keys(group, f"{name}[0].")
    return keys
