"""Imported once before the cases' processes are forked, so that each starts in a moment.

Nothing here may ask for a device, not even whether there is one: CUDA does not survive a fork.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

for _name in (
    "largescale.parallel.strategies",
    "largescale.run.folder",
    "largescale.data.stream",
    "largescale.plan.planner",
    "largescale.observe.meter",
):
    with suppress(ImportError):  # each case says what it lacks
        importlib.import_module(_name)
