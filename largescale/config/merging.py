"""Layers of settings, one after the other, into one configuration: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
from typing import Any, cast, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largescale.config.data_settings import AugmentConfig, CropGroup
from largescale.config.names import unknown_key
from largescale.config.schema import Config
from largescale.config.value_types import as_meant, element_group, element_type, form, misfit_of_type, types_of
from largescale.config.yaml_file import NotReadable, parse
from shards.ground.errors import InputError

REFUSALS = (OmegaConfBaseException, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What OmegaConf raises for values it cannot take."""


class Override:
    """A `key=value` from the command line, parsed.

    Attributes:
        key: dotted, elements of lists by number: `data.crops.0.size`.
        text, value: as typed, and as parsed by YAML, numbers with their text.

    Raises:
        InputError: it has no key, or is not YAML.
    """

    def __init__(self, item: str) -> None:
        key, equals, self.text = item.partition("=")
        self.key = re.sub(r"\[(\d+)\]", r".\1", key.strip())
        if not equals or not self.key:
            raise InputError(f"override {item!r}: expected key=value, for example optim.lr=0.6")
        try:
            self.value = parse(self.text, keep_text=True)
        except NotReadable as error:
            raise InputError(f"override {item!r}: not readable as YAML ({error})") from error

    def nested(self) -> dict[str, Any]:
        """The override as a layer of its own, nested like a file."""
        content = self.value
        for part in reversed(self.key.split(".")):
            content = {part: content}
        return content


class Merged:
    """A configuration built up layer by layer.

    Args:
        schema: of the configuration.

    Attributes:
        values: what is set so far.
    """

    def __init__(self, schema: type[Config]) -> None:
        self.schema = schema
        self.values = defaults(schema)
        self._moved = types_of(schema)["method"].moved

    def apply(self, content: dict[str, Any], origin: str) -> set[str]:
        """Set all keys of a layer; returns their names.

        Raises:
            InputError: naming `origin`, the key, what it got and what it expects.
        """
        return self._set_all(self._leaves(self._with_present_names(content, origin), self.schema, origin, ""), origin)

    def override(self, given: Override) -> set[str]:
        """Apply an override; returns the keys it sets.

        Raises:
            InputError: naming the key, what it got and what it expects.
        """
        key, value = self._present_name(given.key), given.value
        hint = self._hint(key)
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"{key} is a group of keys, not a value; set {key}.KEY")
            groups = self._with_present_names({key: value}, "")
            return self._set_all(
                leaf
                for name, content in groups.items()
                for leaf in self._leaves(content, self._hint(name), "", f"{name}.")
            )
        if given.text.strip() == "":
            value = given.text
        self._set(self.values, key, key, value, hint, "")
        return {key}

    def misfit_of_resolved(self) -> str:
        """Find a `${...}` that resolves to the wrong type: OmegaConf does not name its key if that is a list.

        Returns:
            The key and what was expected; empty if all fit.
        """
        content = cast(dict[str, Any], OmegaConf.to_container(self.values))
        leaves = list(self._leaves(content, self.schema, "", ""))
        for place, element in enumerate(content["data"]["crops"]):
            leaves += self._leaves(element, CropGroup, "", f"data.crops[{place}].")
        for key, value, hint in leaves:
            try:
                OmegaConf.select(self.values, key)
            except REFUSALS:
                return f"{key}={value}: expected {form(hint)}"
        return ""

    def _set_all(self, leaves: Iterable[tuple[str, Any, Any]], origin: str = "") -> set[str]:
        leaves = list(leaves)  # an unknown key among them is found before the first is set
        for key, value, hint in leaves:
            self._set(self.values, key, key, value, hint, origin)
        return {key for key, _, _ in leaves}

    def _present_name(self, key: str) -> str:
        for old, new in self._moved.items():
            if key == old or key.startswith(f"{old}."):
                return new + key.removeprefix(old)
        return key

    def _with_present_names(self, content: dict[str, Any], origin: str) -> dict[str, Any]:
        """A layer with renamed keys under their present names."""
        for old, new in self._moved.items():
            (group, key), (new_group, new_key) = old.split("."), new.split(".")
            if not isinstance(content.get(group), dict) or key not in content[group]:
                continue
            others = content.get(new_group) or {}
            if isinstance(others, dict) and new_key in others:
                raise InputError(f"{origin}{old} is now called {new}, which is set too; leave out {old}")
            rest = {name: value for name, value in content[group].items() if name != key}
            content = {**content, group: rest, new_group: {new_key: content[group][key], **others}}
        return content

    def _hint(self, key: str) -> Any:
        """The type of a key, whose path may lead through elements of lists.

        Raises:
            InputError: there is no such key or element.
        """
        hint: Any = self.schema
        parts = key.split(".")
        for place, part in enumerate(parts):
            parent = ".".join(parts[:place])
            if get_origin(hint) is dict:
                hint = AugmentConfig  # the one mapping of free keys is that of a crop group's own augmentation
            if is_dataclass(hint):
                hints = types_of(hint)
                if part not in hints:
                    raise InputError(unknown_key(key, self.schema))
                hint = hints[part]
                continue
            present = OmegaConf.select(self.values, parent)
            if not OmegaConf.is_list(present) or not part.isdecimal():
                raise InputError(f"unknown key {key}: {parent} is not a group of keys")
            if int(part) >= len(present):
                raise InputError(
                    f"unknown key {key}: {parent} has {len(present)} elements, from 0; set the whole "
                    f"list, {parent}=[...]"
                )
            hint = element_type(hint)
        return hint

    def _leaves(
        self, content: dict[str, Any], schema: type, origin: str, prefix: str
    ) -> Iterator[tuple[str, Any, Any]]:
        """Walk a layer along a schema: key, value and type; stop at the first key that is not in the schema."""
        hints = types_of(schema)
        for name, value in content.items():
            key = f"{prefix}{name}"
            if name not in hints:
                raise InputError(f"{origin}{unknown_key(key, self.schema)}")
            if not is_dataclass(hints[name]):
                yield key, value, hints[name]
            elif isinstance(value, dict):
                yield from self._leaves(value, hints[name], origin, f"{key}.")
            else:
                raise InputError(f"{origin}{key} is a group of keys, not a value; set {key}.KEY")

    def _set(self, node: DictConfig, name: str, key: str, value: Any, hint: Any, origin: str) -> None:
        """Set entry `name` of `node`, which is `key` in the whole configuration."""
        value = as_meant(value, hint)
        expected = misfit_of_type(value, hint)
        try:
            if not expected and (group := element_group(hint)):
                value = [
                    self._element(element, group, f"{key}[{place}].", origin) for place, element in enumerate(value)
                ]
            if not expected and get_origin(hint) is dict and isinstance(value, dict):
                self._element(value, AugmentConfig, f"{key}.", origin)
            if not expected:
                OmegaConf.update(node, name, value, merge=False)
        except InputError:
            raise
        except REFUSALS as error:
            expected = form(hint)
            if isinstance(value, str) and "${" in value:
                expected = f"a ${{...}} that can be resolved ({str(error).splitlines()[0]})"
        if expected:
            raise InputError(f"{origin}{key}={value}: expected {expected}")

    def _element(self, content: dict[str, Any], schema: type, prefix: str, origin: str) -> DictConfig:
        """An element of a list of groups, with defaults for what it does not set."""
        element = defaults(schema)
        for key, value, hint in self._leaves(content, schema, origin, prefix):
            self._set(element, key.removeprefix(prefix), key, value, hint, origin)
        return element


def defaults(schema: type) -> DictConfig:
    """A new tree of the defaults of a schema."""
    return cast(DictConfig, pickle.loads(_packed_defaults(schema)))


@cache
def _packed_defaults(schema: type) -> bytes:
    """The tree, which takes longer to make than all the rest of loading; a deep copy takes six times as long."""
    return pickle.dumps(OmegaConf.structured(schema))
