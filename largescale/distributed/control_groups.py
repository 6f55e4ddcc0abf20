"""What the control groups of this process, as of a container or a job, leave it of the machine; versions 1 and 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def folders(controller: str) -> Iterator[Path]:
    """Folders of the groups of this process, and of those around them, that may limit what a controller gives."""
    lines = _GROUPS.read_text().splitlines() if _GROUPS.exists() else []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            root, parts = _ROOT if number == "0" else _ROOT / controller, path.strip("/").split("/")
            yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def usable_cpus() -> int:
    """CPUs that this process may run on, or fewer if it is given the time of fewer only, rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cpus, *(-(-quota // period) for quota, period in map(_quota, folders("cpu")) if quota > 0)])


def _quota(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU time that a group is given per period; 0 where it has no limit."""
    with suppress(OSError, ValueError):  # no such file; "max"
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota), int(period)
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota), int(period)
    return 0, 1
