"""Waits for a shard folder whose disk or network is away for a moment, as for a store."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from shards.format.manifest import MANIFEST_NAME
from shards.ground.errors import InputError
from shards.ground.pauses import pause

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.4, 30.0

_SPEAKS_AFTER_S = 3.0

_log = logging.getLogger(__name__)


class FolderPatience:
    """The attempts to open one shard of a local folder.

    Args:
        root: the shard folder.
        patience_s: how long it may be away.
    """

    def __init__(self, root: Path, patience_s: float) -> None:
        self.root, self.patience_s = root, patience_s
        self._began, self._pause, self._spoke = time.monotonic(), _FIRST_PAUSE_S, False

    def is_away(self) -> bool:
        """Whether the whole folder is missing, rather than one of its files."""
        try:
            (self.root / MANIFEST_NAME).stat()
        except OSError:
            return True
        return False

    def check(self, why: str) -> None:
        """Warn once if the folder has been away for seconds. InputError: it has been away for `patience_s`."""
        away_s = time.monotonic() - self._began
        if away_s + self._pause > self.patience_s:
            raise InputError(
                f"{self.root}: away for {away_s:.0f} s ({why}); mount its disk or network again, or raise "
                f"data.store_patience_s={self.patience_s:g}"
            )
        if away_s > _SPEAKS_AFTER_S and not self._spoke:
            self._spoke = True
            _log.warning("%s: away for %.0f s; waiting for it, up to %.0f s", self.root, away_s, self.patience_s)

    def pause(self) -> None:
        """Wait before the next attempt, longer each time."""
        pause(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
