"""Imported once before the cases' processes are forked, so that each starts in a moment; touches no device.

Where something here is missing, the forkserver passes over it and each case says what it lacks.
"""

from __future__ import annotations

import largescale.methods
import largescale.parallel

__all__ = ["largescale"]
