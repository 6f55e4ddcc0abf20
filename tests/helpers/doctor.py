"""What the doctor says of signs that last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from largescale.config import Config
from largescale.observe.doctor import judge


def said_of(config: Config, signs: Mapping[str, Any]) -> str:
    """Its words for a run that is half done and had these signs in its last three lines; empty for none.

    Views in tests of methods are noise, of which no network tells images apart, so that sign is left out.
    """
    row = {name: value for name, value in signs.items() if name != "agreement_of_others"}
    return str(judge(config, 3 * [{**row, "progress": 0.5}]) or "")
