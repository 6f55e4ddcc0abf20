"""How much memory state that lives from step to step takes."""

from __future__ import annotations

from largescale.config import Config


def bytes_per_number(config: Config) -> int:
    """Bytes of a number in queues and banks, which have the precision of the weights."""
    return 8 if config.train.precision == "fp64" else 4
