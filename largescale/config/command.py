"""`largescale config`: explains keys, or shows what a recipe sets."""

from __future__ import annotations

from collections.abc import Sequence

from largescale.config import explain, page
from largescale.config.loading import load_config
from largescale.config.recipes import packaged_recipe
from shards.ground.errors import InputError


def run(words: Sequence[str], *, markdown: bool) -> str:
    """What the command prints.

    Args:
        words: a key or a group, a recipe, and overrides of it; any of them may be missing.
        markdown: whether to print all keys, as the page of them has it.

    Raises:
        InputError: a key or recipe that is not there, several of one, or overrides without a recipe.
    """
    if markdown:
        return page.markdown()
    what, recipe, overrides = _sorted_out(words)
    config = load_config(recipe, overrides, default_shards="(not set)") if recipe else None
    if what:
        text = explain.explain(what, config)
    else:
        text = explain.overview() if config is None else explain.of_recipe(config)
    return text + "\n"


def _sorted_out(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """A key or group, a recipe (both may be empty) and overrides."""
    overrides = [word for word in words if "=" in word]
    recipes = [
        word
        for word in words
        if "=" not in word and ("/" in word or word.endswith((".yaml", ".yml")) or packaged_recipe(word))
    ]
    keys = [word for word in words if word not in overrides and word not in recipes]
    for given, what in ((keys, "key or group"), (recipes, "recipe")):
        if len(given) > 1:
            raise InputError(f"{' '.join(given)}: expected one {what} at a time")
    if overrides and not recipes:
        raise InputError(f"{overrides[0]}: overrides need a recipe; pass the recipe too")
    return "".join(keys), "".join(recipes), overrides
