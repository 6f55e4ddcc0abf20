"""Conversion against the tools that people would take instead, paired in one run.

    python benchmarks/convert.py [--images 10000] [--large 120] [--rounds 3] [--img2dataset SITE_PACKAGES]
                                 [--only pass_through|resize|many|index]

- pass-through: `tar` packs the same files (one process, as it does); ours with one process and with one a core, with
  and without decoding every image. Wall time with start-up, until the bytes are on the disk.
- resize: photographs of 3 megapixels to a longer side of 512; img2dataset's resizer (if it is installed, here or in
  another environment) on the same bytes in the same process, one core, CPU time.
- verify: checksums alone, wall time with start-up, one process and one a core.
- index: tars of 20,000 tiny labelled samples, 200,000 and 2 million in all; seconds, peak memory of the command and of
  its largest worker.
- planning and memory: folders of 10^4 and 10^6 tiny images; seconds of planning, peak memory of planning and writing.

Writes benchmarks/results/convert.json and convert.md; with `--only` the other parts stay as they were.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from images import write_photographs
from PIL import Image

from largescale.run.environment import environment
from shards.cleaning.rules import Cleaning
from shards.format.writer import ShardWriter
from shards.images.names import IMAGE_FORMATS
from shards.images.reading import ImageFacts

RESULTS = Path(__file__).resolve().parent / "results"

MEASURED = """
import sys, time
from pathlib import Path
from shards.conversion.convert import Options, convert
started = time.perf_counter()
convert(Path(sys.argv[1]), Path(sys.argv[2]), Options("many", shuffle=0, task=(0, 0), samples_per_shard=1000))
planned = time.perf_counter() - started
convert(Path(sys.argv[1]), Path(sys.argv[2]), Options("many", shuffle=0, samples_per_shard=1000))
[line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(planned, time.perf_counter() - started, 1024 * int(line.split()[1]))
"""


def wall(command: list[str]) -> float:
    """Seconds that a command takes."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def pass_through(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of `tar`, and of ours; the caches are warm for all."""
    source = folder / "photographs"
    times: dict[str, list[float]] = {}
    shards = [sys.executable, "-m", "shards"]
    for number in range(rounds + 1):
        out = folder / f"out-{number}"
        packed = folder / "packed.tar"
        convert = [*shards, "convert", str(source), str(out), "--samples-per-shard", "625"]
        row = {
            "tar": wall(["sh", "-c", f"tar -C {source} -cf {packed} . && sync {packed}"]),
            "convert --no-decode --workers 1": wall([*convert, "--no-decode", "--workers", "1"]),
            "convert --no-decode": wall([*convert, "--no-decode", "--force"]),
            "verify --no-decode --workers 1": wall([*shards, "verify", str(out), "--no-decode", "--workers", "1"]),
            "verify --no-decode": wall([*shards, "verify", str(out), "--no-decode"]),
            "convert": wall([*convert, "--force"]),
        }
        packed.unlink()
        shutil.rmtree(out)
        if number:  # the first one warms up
            for name, seconds in row.items():
                times.setdefault(name, []).append(seconds)
    return times


def resizers() -> dict[str, Callable[[bytes], object]]:
    """Ours, and img2dataset's if it is there."""
    ours = Cleaning(max_side=512, quality=95)
    found: dict[str, Callable[[bytes], object]] = {"ours": lambda payload: ours.apply(payload, "jpg")}
    try:
        from img2dataset.resizer import Resizer
    except ImportError:
        return found
    theirs = Resizer(512, "keep_ratio_largest", resize_only_if_bigger=True, encode_quality=95)
    return found | {"img2dataset": lambda payload: theirs(io.BytesIO(payload))}


def resize(payloads: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Images a second of CPU time."""
    speeds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, run in resizers().items():
            started = time.process_time()
            for payload in payloads:
                run(payload)
            if number:
                speeds.setdefault(name, []).append(len(payloads) / (time.process_time() - started))
    return speeds


def many_files(folder: Path, count: int) -> dict[str, float]:
    """Planning seconds, and peak memory of one process that plans and converts that many tiny images."""
    chance = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"many-{count}" / f"{number // 1000:04d}" / f"{number:07d}.png"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    command = [sys.executable, "-c", MEASURED, str(folder / f"many-{count}"), str(folder / f"out-many-{count}")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {"files": count, "planning_s": float(output[0]), "all_s": float(output[1]), "peak_bytes": int(output[2])}


INDEXED = """
import resource, sys, time
from shards.cli import main
started = time.perf_counter()
assert main(["index", sys.argv[1]]) == 0
[line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(time.perf_counter() - started, 1024 * int(line.split()[1]), 1024 * worker)
"""


def index(folder: Path, num_tars: int) -> dict[str, float]:
    """Seconds and peak memory of indexing tars of 20,000 samples."""
    first, inside = folder / "one.tar", folder / f"index-{num_tars}"
    if not first.exists():
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "PNG")
        with first.open("wb") as file:
            writer, facts = ShardWriter(file), ImageFacts(IMAGE_FORMATS.index("png"), 8, 8)
            for number in range(20_000):
                writer.add(f"{number:09d}", {"png": image.getvalue()}, "png", facts, number % 1000)
            writer.finish()
    inside.mkdir()
    for number in range(num_tars):
        os.link(first, inside / f"{number:04d}.tar")
    command = [sys.executable, "-c", INDEXED, str(inside)]
    seconds, own, worker = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
    return {
        "samples": 20_000 * num_tars,
        "seconds": float(seconds),
        "peak_bytes": int(own),
        "worker_bytes": int(worker),
    }


def report(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    part = result["pass_through"]
    times, size = part["seconds"], part["bytes"]
    tar = statistics.median(times["tar"])
    lines = [
        _head(
            part,
            f"{part['images']:,} generated JPEGs of {size / part['images'] / 1000:.0f} KB; medians of "
            f"{len(times['tar'])} rounds in turns.",
        ),
        "",
        "| | seconds | MB/s | share of tar's speed |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {statistics.median(values):.2f} | {size / statistics.median(values) / 1e6:,.0f} | "
        f"{tar / statistics.median(values):.0%} |"
        for name, values in times.items()
    ]
    part = result["resize"]
    lines += [
        "",
        _head(
            part,
            f"{part['images']} JPEGs of 3 megapixels, one core, CPU time; medians of "
            f"{len(part['speeds']['ours'])} rounds in turns.",
        ),
        "",
        "| resize to 512 | images/s/core |",
        "|---|---|",
    ]
    lines += [f"| {name} | {statistics.median(values):.1f} |" for name, values in part["speeds"].items()]
    lines += [
        "",
        _head(result["many"], "Tiny PNGs."),
        "",
        "| tiny files | planning, s | all, s (one process) | peak memory, MB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['files']:,} | {row['planning_s']:.1f} | {row['all_s']:.0f} | {row['peak_bytes'] / 1e6:.1f} |"
        for row in result["many"]["rows"]
    ]
    lines += [
        "",
        _head(result["index"], "Tars of 20,000 labelled samples of 200 bytes."),
        "",
        "| samples indexed | s | peak memory, MB | of a worker, MB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['samples']:,} | {row['seconds']:.0f} | {row['peak_bytes'] / 1e6:.0f} | "
        f"{row['worker_bytes'] / 1e6:.0f} |"
        for row in result["index"]["rows"]
    ]
    return "\n".join(lines)


def _head(part: dict[str, Any], what: str) -> str:
    return f"{part['on']['day']}, {part['on']['processor']}, {part['on']['cores']} cores. {what}"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--img2dataset", help="site-packages of an environment that has it")
    parser.add_argument("--only", choices=["pass_through", "resize", "many", "index"])
    arguments = parser.parse_args()
    if arguments.img2dataset:
        sys.path.append(arguments.img2dataset)
    result = json.loads((RESULTS / "convert.json").read_text()) if arguments.only else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only in (None, "pass_through"):
            size = write_photographs(folder / "photographs", arguments.images)
            result["pass_through"] = {
                "on": measured_on(),
                "images": arguments.images,
                "bytes": size,
                "seconds": pass_through(folder, arguments.rounds),
            }
        if arguments.only in (None, "resize"):
            write_photographs(folder / "large", arguments.large, scale=3.4)
            large = [path.read_bytes() for path in sorted((folder / "large").iterdir())]
            speeds = resize(large, arguments.rounds)
            result["resize"] = {"on": measured_on(), "images": arguments.large, "speeds": speeds}
        if arguments.only in (None, "many"):
            rows = [many_files(folder, count) for count in (10_000, 1_000_000)]
            result["many"] = {"on": measured_on(), "rows": rows}
        if arguments.only in (None, "index"):
            result["index"] = {"on": measured_on(), "rows": [index(folder, count) for count in (10, 100)]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "convert.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "convert.md").write_text(f"# Conversion\n\n`python benchmarks/convert.py`\n\n{report(result)}\n")


def measured_on() -> dict[str, Any]:
    """The day and the machine, beside each part's figures."""
    machine = environment()
    machine.pop("command")
    return {"day": time.strftime("%Y-%m-%d"), **machine, "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
