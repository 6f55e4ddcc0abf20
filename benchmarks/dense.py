"""Detection and segmentation by a whole fine-tuned network on scenes of garments, pretrained against untrained.

    python -m benchmarks.dense RUN detection|fcn

Measures a run (the demo: `make pretrain`) on 320 training and 100 test scenes of 64 px (`benchmarks/canvases.py`), with
short schedules, and writes benchmarks/results/dense.{json,md}; the other measurement's rows stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import canvases

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks/results/dense"
SETTINGS = {
    "detection": {
        "detection_epochs": "8",
        "detection_sizes": "[64]",
        "detection_size": "64",
        "detection_width": "32",
        "detection_regions": "32",
    },
    "fcn": {
        "segmentation_head": "fcn",
        "segmentation_fcn_epochs": "20",
        "segmentation_fcn_rate": "0.1",
        "segmentation_fcn_width": "32",
        "resize": "64",
        "size": "64",
    },
}
FIGURES = {"detection": ("box_ap", "box_ap50", "box_ap75"), "fcn": ("miou", "pixel_accuracy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("what", choices=SETTINGS)
    arguments = parser.parse_args()
    known = json.loads(OUT.with_suffix(".json").read_text()) if OUT.with_suffix(".json").exists() else {}
    result = known | {arguments.what: measured(arguments.run, arguments.what)}
    OUT.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(page(result))


def measured(run: Path, what: str) -> dict[str, Any]:
    """Figures of both networks, and processor time of both together."""
    protocol = "detection" if what == "detection" else "segmentation"
    settings = [f"evaluate.{key}={value}" for key, value in SETTINGS[what].items()]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        # Links, since results go into the run's folder.
        copy.mkdir()
        for name in ("checkpoints", "config.yaml"):
            (copy / name).symlink_to((run / name).resolve())
        train, test = canvases.write(Path(folder), "train", 320, 0), canvases.write(Path(folder), "test", 100, 0)
        places = [f"evaluate.train_shards={train}", f"data.eval_shards={test}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "largescale", "evaluate", protocol, copy, *places, *settings]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads((copy / "eval" / f"{protocol}.json").read_text())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "command": f"python -m benchmarks.dense RUN {what}",
        "settings": settings,
        "step": record["checkpoint_step"],
        "num_train": record["num_train"],
        "num_test": record["num_test"],
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "results": record["results"],
    }


def page(result: dict[str, Any]) -> str:
    """Tables for people."""
    lines = [
        "# Detection and segmentation of small scenes",
        "",
        "The demo's network, fine-tuned whole on scenes of one to four garments (`benchmarks/canvases.py`), against",
        "the same network from random weights. One training each: a difference of a few points says little.",
    ]
    for what, one in result.items():
        names = FIGURES[what]
        lines += [
            "",
            f"## {what}",
            "",
            f"`{one['command']}`, {one['date']}, {one['machine']}; checkpoint of step {one['step']:,}; "
            f"{one['num_train']} training and {one['num_test']} test scenes; {one['cpu_s'] / 60:.1f} minutes of one "
            f"processor for both networks; `{' '.join(one['settings'])}`.",
            "",
            f"| network | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for network, figures in one["results"].items():
            lines.append(f"| {network} | {' | '.join(f'{100 * figures[name]:.1f} %' for name in names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
