"""Who owns a run's folder: `owner-N.json`, made by the process that writes there; the highest N counts.

The owner renews its file in place every few seconds. Others see from the changes that it is alive, so no two
clocks are ever compared; on the same machine they also see when its process is gone.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

_NAME = re.compile(r"owner-(\d+)\.json")
_SIZE = 1024  # bytes of the file, always the same: it is written over in place

_LONGEST_LEASE_S = 1e6
_LATEST_TIME = 1e11  # seconds; the year 5138


@dataclass(frozen=True)
class Owner:
    """What `owner-N.json` holds.

    Attributes:
        token: random; tells this owner from any other of the same number.
        machine: boot and process namespace in which `pid` is valid; empty if not known.
        process_start: of the process, in clock ticks of /proc; tells it from a later one with the same number.
        job: SLURM's number, if there is one.
        since: when it took the folder, by its own clock.
        lease_s: without a renewal for this long, others may take the folder.
        renewals: so far.
        time: of the last renewal, seconds since the epoch by its own clock.
        step: steps done.
    """

    token: str
    host: str
    machine: str
    pid: int
    process_start: int
    job: str
    since: str
    lease_s: float
    renewals: int = 0
    time: float = 0.0
    step: int = 0

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_dead(self) -> bool:
        """Whether its process is known to be gone; False also if this machine cannot tell."""
        return bool(self.machine) and self.machine == this_machine() and process_start(self.pid) != self.process_start

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self)).encode().ljust(_SIZE - 1) + b"\n"


def owner_path(run_dir: Path, number: int) -> Path:
    """The file of the owner with that number."""
    return run_dir / f"owner-{number:06d}.json"


def owner_numbers(run_dir: Path) -> list[int]:
    """Numbers of the owners that have a file, highest first."""
    with suppress(FileNotFoundError):
        found = (_NAME.fullmatch(name) for name in os.listdir(run_dir))
        return sorted((int(match.group(1)) for match in found if match), reverse=True)
    return []


def newest_owner(run_dir: Path) -> tuple[int, bytes] | None:
    """Number and file of the present owner; None if the folder has no owner."""
    for number in owner_numbers(run_dir):
        with suppress(FileNotFoundError):  # released while we looked
            return number, owner_path(run_dir, number).read_bytes()
    return None


def parse_owner(content: bytes) -> Owner | None:
    """The owner described by a file's content; None if that is half written or something else."""
    try:
        values = json.loads(content)
        owner = Owner(**{field.name: values[field.name] for field in fields(Owner)})
        possible = 0 < owner.lease_s <= _LONGEST_LEASE_S and 0 <= owner.time <= _LATEST_TIME
        return owner if possible and owner.pid > 0 and owner.step >= 0 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def this_machine() -> str:
    """Names this boot of this machine and this process namespace; empty without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> int:
    """When a process on this machine started, in clock ticks since boot; 0 if there is none, or a zombie."""
    try:
        # The name, in parentheses, may contain anything.
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(numbers[18])


def job_began() -> float:
    """When this job began, in seconds since 1970: now, or where torchrun has started this process again, when it did
    itself.
    """
    now = time.time()
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    ticks = process_start(os.getppid()) if again else 0
    since = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0
    return now - since
