"""docs/configuration.md, made from the declarations."""

from __future__ import annotations

from collections.abc import Iterable

from largescale.config.reference import Key, every_key, groups

_TOP = """# Configuration

Every key, generated from the declarations by `largescale config --markdown > docs/configuration.md`. In a terminal,
`largescale config KEY` explains a key, `largescale config GROUP` lists a group, and `largescale config KEY RECIPE`
shows its value in a recipe.

In a recipe, write `optim: {lr: 0.6}`; on the command line, `optim.lr=0.6`. Elements of lists go by number:
`data.crops.0.size=96`. A key that *may change* can have another value when a run is resumed; the others are fixed,
since another value would make it another run.

A recipe is a YAML file, or the name of one that comes with the package, such as `swav/resnet50_800ep`. It may start
from another with `extends:`, which takes both too.
"""

_MOST_NAMES = 12
"""Longer lists of names are left to the command, since they also depend on the version of a library."""


def markdown() -> str:
    """docs/configuration.md as one text."""
    parts = [_TOP, "## At the top\n", _table(key for key in every_key() if not key.group)]
    for group, about in groups().items():
        keys = [key for key in every_key() if key.group == group]
        shared = [key for key in keys if not key.method]
        parts += [f"\n## {group}\n\n{about}\n", _table(shared)] if shared else [f"\n## {group}\n\n{about}"]
        for method in dict.fromkeys(key.method for key in keys if key.method):
            own = _table(key for key in keys if key.method == method)
            parts += [f"\n### {group}, with method.name={method}\n", own]
    return "\n".join(parts).rstrip() + "\n"


def _table(keys: Iterable[Key]) -> str:
    rows = [
        f"| `{key.name}` | {_cell(key.default)} | {_values(key)} | {_cell(key.meaning)} | {key.on_resume} |"
        for key in keys
    ]
    return "\n".join(["| key | default | values | meaning | on resume |", "|---|---|---|---|---|", *rows])


def _values(key: Key) -> str:
    if len(key.setting.names()) > _MOST_NAMES:
        return f"a name that `largescale config {key.name}` lists"
    return _cell(key.values) or "see meaning"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
