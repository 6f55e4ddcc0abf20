"""What tests of messages need to know of the methods there are."""

from __future__ import annotations

from dataclasses import fields

from largescale.methods import METHODS


def those_with(key: str) -> str:
    """Names of the methods with a setting, as messages list them: "swav, mocov1 and mocov2"."""
    names = [name for name, method in METHODS.items() if key in {one.name for one in fields(method.Settings)}]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
