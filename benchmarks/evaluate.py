"""The probe on cached features against the published one on augmented images: accuracy, and processor time.

    python -m benchmarks.evaluate RUN [--epochs 100]

Measures a run (the demo: `make pretrain`) by both, each from its checkpoint alone, so that the cached probe's time has
that of its features in it. Writes benchmarks/results/evaluate.{json,md}. Processor time, of one thread, is compared:
unlike wall time it says little of what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks/results/evaluate"
PUBLISHED_EPOCHS = 100


def main() -> None:
    """Measure a run by both probes, and write their accuracies and processor times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--epochs", type=int, default=PUBLISHED_EPOCHS, help="of the published probe")
    arguments = parser.parse_args()
    rows = [
        measured(arguments.run, "linear-cached"),
        measured(arguments.run, "linear-augmented", f"evaluate.linear_augmented_epochs={arguments.epochs}"),
    ]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread per process",
        "command": f"python -m benchmarks.evaluate RUN --epochs {arguments.epochs}",
        "rows": rows,
    }
    OUT.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(page(result))


def measured(run: Path, protocol: str, *overrides: str) -> dict[str, Any]:
    """Accuracy and times of one protocol on a copy of a run without its features."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("eval", "tensorboard"))
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, "-m", "largescale", "evaluate", protocol, copy, "evaluate.baselines=false"]
        subprocess.run([*command, *overrides], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        wall_s, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads((copy / "eval" / f"{protocol}.json").read_text())
    return {
        "protocol": protocol,
        "settings": {key: value for key, value in record["settings"].items() if key.startswith("linear_")},
        "chosen_on": record["chosen_on"],
        "num_train": record["num_train"],
        "num_test": record["num_test"],
        "result": record["results"]["pretrained"],
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_s": wall_s,
    }


def page(result: dict[str, Any]) -> str:
    """A table for people."""
    fast, published = result["rows"]
    gap = 100 * (fast["result"]["top1"] - published["result"]["top1"])
    share = fast["cpu_s"] / published["cpu_s"]
    epochs = published["settings"]["linear_augmented_epochs"]
    lines = [
        "# Linear probes of the demo",
        "",
        f"{result['date']}, {result['machine']}; `{result['command']}`.",
        "",
        "| probe | top-1, % | 95 % interval | chosen on | processor time, s |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["result"]["interval"]
        lines.append(
            f"| {row['protocol']} | {100 * row['result']['top1']:.2f} | {100 * low:.1f} to {100 * high:.1f} | "
            f"{row['chosen_on']} | {row['cpu_s']:.0f} |"
        )
    lines += [
        "",
        f"The published probe ran for {epochs} epochs. The cached one differs by {gap:+.2f} points and takes "
        f"{share:.1%} of the processor time, features included. {published['num_test']:,} test images: an accuracy is "
        f"known to about {50 * (published['result']['interval'][1] - published['result']['interval'][0]):.1f} points.",
    ]
    if epochs < PUBLISHED_EPOCHS:
        lines += [
            "",
            f"These {epochs} epochs are not the published {PUBLISHED_EPOCHS}: neither the difference nor the share of "
            f"the time is that of the whole protocol. Run it again with `--epochs {PUBLISHED_EPOCHS}`.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
