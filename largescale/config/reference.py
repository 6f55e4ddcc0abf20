"""Every key, under every method, with its declaration in words."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_origin

from largescale.config.checks import default_of
from largescale.config.names import declarations
from largescale.config.schema import Config
from largescale.config.setting import Setting, declared
from largescale.config.slots import method_names, schema_for
from largescale.config.value_types import form, is_open, types_of
from largescale.config.values import enumerated, written


@dataclass(frozen=True)
class Key:
    """A key, and the method it belongs to.

    Attributes:
        name: dotted; with `[0]` for an element of a list.
        item, hint: its field and type.
        method: the only method that has it; empty if all have it.
    """

    name: str
    item: Field[Any]
    hint: Any
    method: str = ""

    @property
    def setting(self) -> Setting:
        """Its declaration."""
        return declared(self.item)

    @property
    def group(self) -> str:
        """Its group; empty at the top level."""
        return self.name.partition("[")[0].rpartition(".")[0]

    @property
    def default(self) -> str:
        """Its default, as one would write it."""
        value = default_of(self.item)
        return "none: it must be set" if value == "???" else written(value)

    @property
    def values(self) -> str:
        """The values it takes; empty where its help says it better."""
        setting = self.setting
        if names := setting.names():
            return f"one of {', '.join(names)}"
        if setting.expected or is_open(self.hint):
            return setting.expected
        each = " each" if get_origin(self.hint) is list else ""
        limits = _limits(setting)
        return f"{form(self.hint)},{each} {limits}" if limits else form(self.hint)

    @property
    def used(self) -> str:
        """What else must be set for it to have an effect; empty if nothing."""
        key, _, names = self.setting.used_if.partition("=")
        if names:
            return f"only with {key}={enumerated(names.split('|'), 'or')}"
        if self.setting.owners and not key:  # the protocols of `largescale evaluate`, which its first argument names
            return f"only by `largescale {self.group} {enumerated(self.setting.owners, 'and')}`"
        return f"only if {key} is set (not 0 or false)" if key else ""

    @property
    def meaning(self) -> str:
        """Its help, and what else must be set."""
        return f"{self.setting.help} Used {self.used}." if self.used else self.setting.help

    @property
    def on_resume(self) -> str:
        """Whether a resumed run may have another value."""
        return "may change" if self.setting.free else "fixed"


@cache
def every_key() -> tuple[Key, ...]:
    """Every key of every method, group by group in the order of the schema."""
    found: list[Key] = []
    for place, method in enumerate(method_names()):
        for name, item, hint in declarations(schema_for(method)):
            own = name.startswith("method.") and name != "method.name"
            if own or place == 0:
                found.append(Key(name, item, hint, method if own else ""))
    order = ["", *groups()]
    return tuple(sorted(found, key=lambda key: order.index(key.group)))


@cache
def groups() -> dict[str, str]:
    """What each group is about, by its dotted name; those that a method's settings hold come after `method`."""
    found: dict[str, str] = {}

    def visit(schema: type, prefix: str) -> None:
        hints = types_of(schema)
        for item in fields(schema):
            hint = hints[item.name]
            if isinstance(hint, type) and is_dataclass(hint):
                name = f"{prefix}{item.name}"
                found.setdefault(name, str(hint.__doc__).partition("\n")[0])
                visit(hint, f"{name}.")
                for method in method_names() if name == "method" else ():
                    visit(types_of(schema_for(method))["method"], "method.")

    visit(Config, "")
    return found


@cache
def earlier_names() -> dict[str, str]:
    """Renamed keys by their old names."""
    return {old: new for method in method_names() for old, new in types_of(schema_for(method))["method"].moved.items()}


def _limits(setting: Setting) -> str:
    """The bounds, in words."""
    if setting.at_least is not None and setting.at_most is not None:
        return f"from {_number(setting.at_least)} to {_number(setting.at_most)}"
    bounds = {"at least": setting.at_least, "above": setting.above, "at most": setting.at_most, "below": setting.below}
    return " and ".join(f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None)


def _number(value: float) -> str:
    """Write large powers of two by their exponent: 2^31 says more than 2147483648."""
    whole = int(value)
    if whole == value and whole >= 2**16 and whole & (whole - 1) == 0:
        return f"2^{whole.bit_length() - 1}"
    return f"{value:.15g}" if abs(value) < 1e6 else f"{value:g}".replace("e+0", "e").replace("e+", "e")
