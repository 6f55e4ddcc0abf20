"""`shards convert --clips` beside the command `ffmpeg`, process beside process: a part of benchmarks/clips.py."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COPIES = 32
"""Of a video, which are decoded by a process each, and converted by one command."""

FFMPEG = ["ffmpeg", "-nostdin", "-v", "error"]
NOWHERE = ["-fps_mode", "passthrough", "-f", "null", "-"]


def measure_commands(video: Path, temporary: Path, rounds: int) -> dict[str, Any] | None:
    """CPU seconds on one thread, and wall seconds on all cores, of decoding and of converting copies of a video, each
    with the start of its processes, in turns; None where there is no `ffmpeg`.
    """
    if shutil.which("ffmpeg") is None:
        return None
    folder, cores = temporary / "copies", os.cpu_count() or 1
    folder.mkdir()
    for number in range(COPIES):
        os.link(video, folder / f"{number:02d}{video.suffix}")
    found: dict[str, list[float]] = {name: [] for name in ("ffmpeg_cpu_s", "convert_cpu_s", "ffmpeg_s", "convert_s")}
    for _ in range(rounds):
        found["ffmpeg_cpu_s"].append(_decode(folder, ["-threads", "1"])[0])
        found["convert_cpu_s"].append(_convert(folder, temporary / "commanded", 1)[0])
        found["ffmpeg_s"].append(_decode(folder, [])[1])
        found["convert_s"].append(_convert(folder, temporary / "commanded", cores)[1])
    shutil.rmtree(folder)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    pairs = (("ffmpeg_cpu_s", "convert_cpu_s"), ("ffmpeg_s", "convert_s"))
    ratios = [[one / other for one, other in zip(found[a], found[b], strict=True)] for a, b in pairs]
    return medians | {"cpu_ratios": ratios[0], "wall_ratios": ratios[1], "cores": cores}


def _decode(folder: Path, threads: list[str]) -> tuple[float, float]:
    return _timed([[*FFMPEG, *threads, "-i", str(path), *NOWHERE] for path in sorted(folder.iterdir())])


def _convert(folder: Path, out: Path, workers: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "shards", "convert", str(folder), str(out), "--clips"]
    command += ["--workers", str(workers), "--samples-per-shard", str(-(-COPIES // workers))]
    try:
        return _timed([command])
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _timed(commands: list[list[str]]) -> tuple[float, float]:
    """CPU and wall seconds of commands, one after the other."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - started


def commands_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a page."""
    cores, rounds = (next(iter(rows.values()))[key] for key in ("cores", "cpu_ratios"))
    lines = [
        "",
        f"Commands, each with the start of its processes: {COPIES} copies of a video, decoded one after the other by "
        f"`{' '.join(FFMPEG)} -i FILE {' '.join(NOWHERE)}`, and converted by one `shards convert --clips`. CPU time "
        f"with `-threads 1` and `--workers 1`; wall time with ffmpeg's own threads and `--workers {cores}`; "
        f"rounds: {len(rounds)}.",
        "",
        "| videos | ffmpeg, CPU s | converting, CPU s | ffmpeg / converting | ffmpeg, wall s | converting, wall s "
        "| ffmpeg / converting |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cpu, wall = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            for ratios in (row["cpu_ratios"], row["wall_ratios"])
        )
        lines.append(
            f"| {name} | {row['ffmpeg_cpu_s']:.2f} | {row['convert_cpu_s']:.2f} | {cpu} "
            f"| {row['ffmpeg_s']:.2f} | {row['convert_s']:.2f} | {wall} |"
        )
    return lines
