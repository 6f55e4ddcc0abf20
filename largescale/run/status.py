"""How far a run is: `status.json`, what its owner's lease says, and the last line of its metrics."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.checkpoint.folder import newest_first
from largescale.observe.metrics import last_row
from largescale.run.owner import Owner, newest_owner, parse_owner, this_machine
from shards.ground.errors import InputError
from shards.ground.files import write_even_if_full

STATUS = "status.json"
COMPLETE, NOT_STARTED = "complete", "not started"

_WATCH_S = 15.0


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        state: not started, running, not running, stopped, failed, or complete; or whatever a later version writes.
        since: time of that state, for people.
        why: more about the state; may be empty.
        saved: step of the newest checkpoint, None if there is none.
    """

    state: str
    step: int
    steps: int
    since: str
    why: str
    saved: int | None

    def __str__(self) -> str:
        when = {"running": "", "not running": f" since {self.since}"}.get(self.state, f" at {self.since}")
        progress = f"{self.step} of {self.steps} steps"
        said = f"not running{when}, {progress}" if self.state == "not running" else f"{self.state}, {progress}{when}"
        said = self.state if self.state == NOT_STARTED else said
        saved = "none" if self.saved is None else f"step {self.saved}"
        return f"{said}; newest checkpoint: {saved}{'; ' if self.why else ''}{self.why}"


def write_status(run_dir: Path, state: str, step: int, steps: int, **more: object) -> None:
    """Write `status.json`; what is None is left out."""
    row = {"state": state, "step": step, "steps": steps, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    row |= {key: value for key, value in more.items() if value is not None}
    write_even_if_full(run_dir / STATUS, json.dumps(row) + "\n")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of `status.json`; None if there is none.

    Raises:
        InputError: it is not a status.
    """
    path = run_dir / STATUS
    try:
        row = json.loads(path.read_bytes())
        return {**row, "state": str(row["state"]), "step": int(row["step"]), "steps": int(row["steps"])}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is not the status of a run; remove it, the next start writes a new one") from error


def is_run(run_dir: Path) -> bool:
    """Whether a training has written to a folder."""
    return any((run_dir / name).exists() for name in (STATUS, "config.yaml", "checkpoints"))


def status_of(run_dir: Path, *, watch: bool = True) -> RunStatus:
    """Where a run stands now, without asking its processes.

    Args:
        run_dir: folder of the run.
        watch: where an owner on another machine seems silent, look for some seconds whether it renews its lease, since
            its clock may differ from ours; else our clock decides at once.

    Raises:
        InputError: its status.json cannot be read.
    """
    row = read_status(run_dir)
    found = newest_owner(run_dir)
    owner = parse_owner(found[1]) if found else None
    saved = next((checkpoint.step for checkpoint in newest_first(run_dir / "checkpoints")), None)
    if row is None and owner is None:
        return RunStatus(NOT_STARTED, 0, 0, "never", "", saved)
    row = row or {"state": "running", "step": 0, "steps": 0}
    state, step, since, why = row["state"], row["step"], str(row.get("time", "?")), str(row.get("reason", ""))
    now, last_sign, who = _by_owner(run_dir, owner, since, watch=watch)
    if now == "running" or state == "running":
        state, since, why = now, last_sign, who
        logged = last_row(run_dir)
        step = max(step, int(logged["step"]) + 1 if logged else 0, owner.step if owner else 0)
    return RunStatus(state, step, row["steps"], since, why, saved)


def _by_owner(run_dir: Path, owner: Owner | None, since: str, *, watch: bool) -> tuple[str, str, str]:
    """State, since when, and why, for a run that has not recorded its end."""
    if owner is None:
        return "not running", since, "it ended without saying why"
    silent_s = time.time() - owner.time
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.time))
    if owner.is_dead():
        return "not running", last, f"{owner}, is gone"
    by_clock = abs(silent_s) <= owner.lease_s
    if owner.machine == this_machine() or by_clock:
        lives, clock = silent_s <= owner.lease_s, ""
    elif not watch:
        lives, clock = silent_s <= owner.lease_s, " by the clock here"
    else:  # its clock may be hours off
        lives, clock = _renews(run_dir, owner), " by its own clock"
    if not lives:
        return "not running", last, f"{owner}, has given no sign of life since then{clock}"
    return "running", last, str(owner)


def _renews(run_dir: Path, owner: Owner) -> bool:
    """Whether an owner renews its lease while we watch; no two clocks are compared."""
    deadline = time.monotonic() + min(_WATCH_S, owner.lease_s / 2)  # some renewals
    while time.monotonic() < deadline:
        time.sleep(0.1)
        found = newest_owner(run_dir)
        if found and (now := parse_owner(found[1])) and now != owner:
            return True
    return False
