"""What is known of a sample as JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: dict[str, Any]) -> str:
    """JSON as people write it; with escapes if it would not be valid text (half of a character)."""
    allowed = plain(value)
    text = json.dumps(allowed, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(allowed, default=str)
    return text


def plain(value: Any) -> Any:
    """A value without what JSON cannot hold: numbers that are none become null, as in empty cells of a table."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
