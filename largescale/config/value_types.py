"""Which values fit the type of a setting, and what messages call that type."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from largescale.config.yaml_file import Written

_FORMS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def types_of(schema: Any) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return _types_of(schema)


@cache
def _types_of(schema: Any) -> dict[str, Any]:
    hints = get_type_hints(schema, include_extras=True)  # slow, and of a schema that does not change
    return {item.name: hints[item.name] for item in fields(schema)}


def is_open(hint: Any) -> bool:
    """Whether OmegaConf has no type for it, so that it takes any value: `Annotated[Any, TYPE]` says what is meant."""
    return hint is Any or len(_alternatives(hint)) > 1


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of which a value has one."""
    meant = get_args(hint)[1] if get_origin(hint) is Annotated else hint
    return get_args(meant) if isinstance(meant, UnionType) else (meant,)


def element_type(hint: Any) -> Any:
    """The type of a list's elements."""
    return next((get_args(one)[0] for one in _alternatives(hint) if get_origin(one) is list), Any)


def as_meant(value: Any, hint: Any) -> Any:
    """A value that was read with `keep_text`, for a setting: where this is text, numbers are as they are written."""
    if isinstance(value, Written):
        return value.text if str in _alternatives(hint) else value.value
    if isinstance(value, list):
        return [as_meant(element, element_type(hint)) for element in value]
    if isinstance(value, dict):
        group = next(filter(is_dataclass, _alternatives(hint)), None)
        types = types_of(group) if group else {}
        return {as_meant(key, Any): as_meant(one, types.get(key, Any)) for key, one in value.items()}
    return value


def element_group(hint: Any) -> Any:
    """The dataclass of a list's elements; None for other types."""
    inner = get_args(hint)
    return inner[0] if get_origin(hint) is list and is_dataclass(inner[0]) else None


def form(hint: Any) -> str:
    """What a value of a type looks like, for people."""
    if group := element_group(hint):
        return f"a list of {{{', '.join(item.name for item in fields(group))}}}"
    if get_origin(hint) is list:
        forms = {int: "a list of whole numbers, such as [1, 2]", str: "a list of names, such as [x, y]"}
        return forms.get(get_args(hint)[0], "a list of numbers, [x, y]")
    if get_origin(hint) is dict:
        return "{KEY: value, ...}"
    return _FORMS.get(hint, "a value")


def misfit_of_type(value: Any, hint: Any) -> str:
    """What was expected instead of a value; empty if its type will do, or if OmegaConf will find out.

    Interpolations and strings that hold a number are left to OmegaConf, which converts them.
    """
    if is_open(hint) or (isinstance(value, str) and "${" in value):
        return "a value, not null" if value is None else ""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            return form(hint)
        inner = get_args(hint)[0]
        if is_dataclass(inner):
            return "" if all(isinstance(element, dict) for element in value) else form(hint)
        return form(hint) if any(misfit_of_type(element, inner) for element in value) else ""
    if get_origin(hint) is dict:
        return "" if isinstance(value, dict) else form(hint)
    if hint is bool:
        fits = isinstance(value, bool) or str(value).lower() in ("true", "false") or value in (0, 1)
    elif hint is str:
        fits = isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool))
    elif is_dataclass(hint):
        fits = isinstance(value, dict)
    else:
        fits = isinstance(value, int | float | str) and not isinstance(value, bool)
    return "" if fits else form(hint)
