"""The settings that make a recipe's student learn from a classifier's file."""

from __future__ import annotations

import json
from pathlib import Path

from largescale.models.image_classifier import checksum, read_classifier


def taught_by(teacher: str | Path) -> list[str]:
    """Overrides of a recipe: the file, what identifies it, and the names of its classes.

    Raises:
        InputError: no file of a classifier.
    """
    found = read_classifier(teacher)
    return [
        f"method.teacher={json.dumps(str(teacher))}",
        f"method.teacher_sha256={json.dumps(checksum(teacher))}",
        f"method.classes={json.dumps(found.classes)}",
    ]
