"""Kills conversions at random moments and compares what comes of them with an undisturbed one.

    python -m tests.shards.kills --kills 50

Prints how many of them met a conversion at work.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.images import write_photographs
from shards.conversion.convert import Options, convert
from shards.format.manifest import read_manifest
from tests.helpers.commands import ROOT

_OPTIONS = ["--name", "pile", "--labels", "folder", "--samples-per-shard", "7", "--shuffle", "5", "--workers", "2"]


def kill_again_and_again(source: Path, out: Path, *, kills: int, seed: int) -> int:
    """Convert under kills of all processes, then to the end; returns how many kills met a conversion at work."""
    chance, met = random.Random(seed), 0
    command = [sys.executable, "-m", "shards", "convert", str(source), str(out), *_OPTIONS, "--force"]
    while met < kills:
        with subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        ) as process:
            deadline = time.monotonic() + chance.uniform(0.1, 0.9)
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                met += 1
        if command[-1] == "--force" and (out / "plan").exists():
            command.pop()  # from here on it goes on
        if (out / "manifest.json").exists() and met < kills:
            command.append("--force")
    if not (out / "manifest.json").exists():
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert read_manifest(out).num_samples > 0
    leftovers = [str(path.relative_to(out)) for path in out.rglob(".*")]
    assert not leftovers, leftovers
    return met


def main() -> None:
    """Kill, compare, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(3):
            write_photographs(folder / "source" / f"class{number}", 40, seed=number)
        convert(
            folder / "source",
            folder / "expected",
            Options("pile", labels="folder", samples_per_shard=7, shuffle=5, workers=2),
        )
        expected = {path.name: path.read_bytes() for path in (folder / "expected").iterdir() if path.is_file()}
        done = runs = 0
        while done < arguments.kills:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            done += kill_again_and_again(
                folder / "source", out, kills=min(5, arguments.kills - done), seed=arguments.seed + runs
            )
            runs += 1
            assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == expected
            print(f"{done} of {arguments.kills} kills, {runs} conversions end as the undisturbed one", flush=True)


if __name__ == "__main__":
    main()
