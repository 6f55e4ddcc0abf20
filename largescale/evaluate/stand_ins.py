"""Samples that cannot be read, and for which others stand in: named in the log, and a doubt about what is measured."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from largescale.data.loaded import Batch
from largescale.evaluate.shares import from_all_ranks
from largescale.processes import rank

_log = logging.getLogger(__name__)


class StandIns:
    """Notes them, each once, while batches are taken.

    Attributes:
        reasons: by sample.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def noting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        for batch in batches:
            self.reasons.update({f"{row['shard']}, key {row['key']}": row["reason"] for row in batch.skipped})
            yield batch

    def doubts(self, what: str) -> list[str]:
        """Warn of each on rank 0; a sentence, if there are any, in which `what` says which samples cannot do what.
        Collectives: those of `from_all_ranks`.
        """
        reasons = from_all_ranks(self.reasons)
        for sample, reason in reasons.items() if rank() == 0 else ():
            _log.warning("%s: another stands in for it: %s", sample, reason)
        return [f"{len(reasons):,} {what}; others stand in for them"] if reasons else []
