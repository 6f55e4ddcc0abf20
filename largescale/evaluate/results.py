"""Result files of a run: the newest of each protocol, and all that were ever measured.

    eval/
      knn.json                                    the newest result of a protocol
      results/knn-test-step-00001000-1a2b3c4d.json    every result, by test shards, checkpoint and stamp

Each says what it was measured on (`made_from`, see `evaluate/made_from.py`) and has a checksum, so that a number that
has been tampered with or damaged is not shown. Files are written whole, and a different stamp means a different name,
so commands that run at the same time lose nothing of each other's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from largescale.checkpoint.folder import Checkpoint, newest_first
from largescale.evaluate.made_from import VERSION, identity, weights_stamp
from shards.ground.files import atomic_write, names_in

Record = dict[str, Any]

_CHECKSUM = "checksum"
_NOT_MEASURED_BY = ("train_shards", "batch")


@dataclass(frozen=True)
class Results:
    """What `eval/` of a run holds.

    Attributes:
        newest: the newest result of each protocol; where its file is lost, the last measured of those that are left.
        all: every result, those of `newest` first.
        refused: names of the files that are not what was measured, or do not say on what.
    """

    newest: dict[str, Record] = field(default_factory=dict)
    all: list[Record] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def write_result(run_dir: Path, record: Record) -> Path:
    """Write a result under a name of its own, and as the newest of its protocol unless that is of a later checkpoint.

    Returns:
        The name of its own.
    """
    content = (json.dumps({**record, _CHECKSUM: _checksum(record)}, indent=1) + "\n").encode()
    own = run_dir / "eval" / "results" / f"{_name(record)}.json"
    newest = run_dir / "eval" / f"{record['protocol']}.json"
    for path in (own, newest) if _is_newest(record, _read(newest), run_dir) else (own,):
        with atomic_write(path) as file:
            file.write(content)
    return own


def read_results(run_dir: Path) -> Results:
    """The results of a run; one that cannot be told what it was measured on is refused, not shown."""
    results = Results()
    folders = (run_dir / "eval", run_dir / "eval" / "results")
    for path in [folder / name for folder in folders for name in names_in(folder) if name.endswith(".json")]:
        record = _read(path)
        if record is None:
            results.refused.append(str(path.relative_to(run_dir)))
            continue
        if path.parent.name == "eval":
            results.newest[record["protocol"]] = record
        if _name(record) not in map(_name, results.all):
            results.all.append(record)
    for record in sorted(results.all, key=lambda one: one["measured"], reverse=True):
        results.newest.setdefault(record["protocol"], record)
    return results


def age(record: Record, run_dir: Path) -> str:
    """Why a result is not one of the run's newest checkpoint, in words; empty if it is."""
    checkpoints = newest_first(run_dir / "checkpoints")
    weights = record["made_from"]["weights"]
    if not checkpoints:
        return f"its checkpoint (step {weights['step']}) is no longer here"
    newest = checkpoints[0]
    if weights == weights_stamp(newest):
        return ""
    if weights["step"] == newest.step or weights["step"] > newest.step or _replaced(weights, checkpoints):
        return f"measured on other weights than these: those of step {weights['step']} of an earlier run"
    return f"measured at step {weights['step']}; the newest checkpoint is of step {newest.step}"


def _is_newest(record: Record, known: Record | None, run_dir: Path) -> bool:
    """Whether a result belongs in place of the known one: that is of no later checkpoint, or of an earlier run.

    Checkpoints that no result is of do not count: one may be saved while another is measured, or be damaged.
    """
    if known is None or (known["checkpoint_step"] or 0) <= (record["checkpoint_step"] or 0):
        return True
    checkpoints, weights = newest_first(run_dir / "checkpoints"), known["made_from"]["weights"]
    return all(one.step < weights["step"] for one in checkpoints) or _replaced(weights, checkpoints)


def _replaced(weights: dict[str, Any], checkpoints: list[Checkpoint]) -> bool:
    return any(weights["step"] == one.step and weights != weights_stamp(one) for one in checkpoints)


def _name(record: Record) -> str:
    test = re.sub(r"[^\w.-]+", "-", record["made_from"]["test_shards"]["name"])[:60]
    own = {
        key: value
        for key, value in record["settings"].items()
        if key not in _NOT_MEASURED_BY and (key == "baselines" or _is_own(key, record["protocol"]))
    }
    stamp = identity({"made_from": record["made_from"], "settings": own})
    step = "" if record["checkpoint_step"] is None else f"-step-{record['checkpoint_step']:08d}"
    return f"{record['protocol']}-{test}{step}-{stamp}"


def _is_own(key: str, protocol: str) -> bool:
    """Whether a setting is of a protocol: `linear_cached_strengths` of `linear-cached`."""
    return key.startswith(f"{protocol.replace('-', '_')}_")


def _checksum(record: Record) -> str:
    content = {key: value for key, value in record.items() if key != _CHECKSUM}
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def _read(path: Path) -> Record | None:
    """What `write_result` wrote; None for anything else."""
    try:
        record = json.loads(path.read_text())
        whole = record["made_from"]["version"] == VERSION and record[_CHECKSUM] == _checksum(record)
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
