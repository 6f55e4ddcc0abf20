"""What a student is to learn from: a classifier's file, or a run that is one, such as another student."""

from __future__ import annotations

from pathlib import Path

from largescale.evaluate.classifier_files import write_own_classifier
from largescale.run.status import COMPLETE, status_of
from shards.ground.errors import InputError


def teacher_file(place: str | Path) -> Path:
    """The file of a classifier; of a run, or of one of its checkpoints, it is made.

    Args:
        place: a file, folder of a complete run, or one of a run's checkpoints.

    Raises:
        InputError: a run that is not complete, or none that classifies.

    Collectives: those of `write_own_classifier` for a folder; every rank must call it.
    """
    path = Path(place).expanduser()
    if not path.is_dir():
        return path
    if (path / "config.yaml").is_file() and (status := status_of(path)).state != COMPLETE:
        raise InputError(
            f"{place}: {status}; finish its training first (largescale pretrain {path / 'config.yaml'}), or name one "
            f"of its checkpoints"
        )
    return write_own_classifier(path)
