"""What `largescale config` says about a key, a group of keys, and a recipe."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from largescale.config.checks import holds, settings_of
from largescale.config.names import likeliest, unknown_key
from largescale.config.reference import Key, earlier_names, every_key, groups
from largescale.config.schema import Config
from largescale.config.values import written
from shards.ground.errors import InputError

_WIDTH = 100
_OF_GROUP = "data.crops[0].augment."


def overview() -> str:
    """The groups, and how many keys each has."""
    rows = [(key.name, key.setting.help) for key in every_key() if not key.group]
    for group, about in groups().items():
        rows.append((group, f"{about} {_num_keys(group)}"))
    width = max(len(name) for name, _ in rows) + 2
    lines = [line for name, about in rows for line in _wrapped(about, first=f"  {name:<{width}}")]
    return "\n".join(["The groups of keys. Pass a group to see its keys, a key to have it explained.", "", *lines])


def of_recipe(config: Config) -> str:
    """The values of a configuration that differ from the defaults."""
    lines = [
        _setting_line(key, config)
        for key in _keys_under(config)
        if "[" not in key.name and _value(key, config) != key.default
    ]
    return "\n".join(["Values that differ from the defaults:", "", *(f"  {line}" for line in lines)])


def explain(what: str, config: Config | None = None) -> str:
    """A key, or all keys of a group; with a configuration, also their values there.

    Raises:
        InputError: there is no such key or group.
    """
    what = re.sub(r"[.\[](\d+|N)\]?(?=\.|$)", "[0]", what.strip())
    present = earlier_names().get(what, what)
    of_group = present.startswith(_OF_GROUP)
    if of_group:
        present = "data.augment." + present.removeprefix(_OF_GROUP)
    keys = _keys_under(config)
    if found := [key for key in keys if key.name == present]:
        if of_group:
            note = [f"{what} overrides {present} for the views of one crop group:"]
        else:
            note = [f"{what} is now called {present}."] if present != what else []
        return "\n\n".join([*note, *(_block(key, config) for key in found)])
    if what in groups():
        inside = [key for key in keys if key.name.startswith(f"{what}.")]
        return "\n".join([f"{what}: {groups()[what]}", *_listing(inside, config)])
    raise InputError(_unknown(what, config))


def _keys_under(config: Config | None) -> list[Key]:
    """All keys, or those of a configuration."""
    return [key for key in every_key() if config is None or key.method in ("", config.method.name)]


def _num_keys(group: str) -> str:
    methods = [key.method for key in every_key() if key.group == group]
    common = methods.count("")
    of_methods = [f"{methods.count(method)} of {method}" for method in dict.fromkeys(methods) if method]
    return f"({', '.join([f'{common} key' + 's' * (common != 1), *of_methods])})"


def _unknown(what: str, config: Config | None) -> str:
    known = [key.name for key in every_key()]
    if config is not None and what in known:
        return unknown_key(what, type(config))
    near = likeliest(what, [*groups(), *known])
    ending = f"did you mean {' or '.join(near)}?" if near else "`largescale config` lists the groups"
    return f"unknown key {what}; {ending}"


def _block(key: Key, config: Config | None) -> str:
    """Everything about a key."""
    facts = {
        "default": key.default,
        "values": key.values,
        "used": key.used,
        "resume": "may change: a run can continue with another value"
        if key.setting.free
        else "fixed: a run continues with the value it started with",
    }
    if config is not None:
        without = "" if _has_effect(key, config) else ", without effect here"
        facts = {"value": _value(key, config) + without, **facts}
    lines = [_title(key), *_wrapped(key.setting.help, first="  "), ""]
    for name, fact in facts.items():
        lines += _wrapped(fact, first=f"  {name:<9}") if fact else []
    return "\n".join(lines)


def _title(key: Key) -> str:
    return f"{key.name}, with method.name={key.method}" if key.method else key.name


def _listing(keys: Iterable[Key], config: Config | None) -> list[str]:
    """Two lines per key: its value, and what it means."""
    lines, method = [], ""
    for key in keys:
        if key.method != method:
            method = key.method
            lines += ["", f"with method.name={method}:"]
        lines += ["", f"  {_setting_line(key, config)}", *_wrapped(key.meaning, first="      ")]
    return lines


def _setting_line(key: Key, config: Config | None) -> str:
    value = key.default if config is None else _value(key, config)
    default = f"  (default {key.default})" if value != key.default and len(key.default) <= _WIDTH // 2 else ""
    return f"{key.name} = {value}{default}"


def _value(key: Key, config: Config) -> str:
    """The value of a key in a configuration; those of all elements if it is in a list."""
    return ", ".join(
        written(value) for name, _, value in settings_of(config) if re.sub(r"\[\d+\]", "[0]", name) == key.name
    )


def _has_effect(key: Key, config: Config) -> bool:
    return not key.setting.used_if or holds(config, key.setting.used_if)


def _wrapped(text: str, *, first: str) -> list[str]:
    """Lines of a text; those after the first are indented to its start."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
