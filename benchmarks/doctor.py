"""Runs that are sick on purpose and others that are not, small ones, trained for real: what the doctor is judged by.

    python -m benchmarks.doctor record [--only NAME ...] [--shards SHARDS] [--folder FOLDER]
    python -m benchmarks.doctor keep NAME RUN_DIR
    python -m benchmarks.doctor page

`record` trains; each run takes a core some seconds. `keep` takes the metrics of a run that exists. Both write
recordings, `tests/observe/runs/NAME.json`: the settings that the doctor looks at and the logged lines. `page` writes
benchmarks/results/doctor.md, what the doctor says of each over time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.clips_learned import shards_of
from benchmarks.doctor_cases import CLOTHES, HEALTHY, IMAGES, MEANT_SICK, SICK, TINY
from largescale.cli import main as largescale
from largescale.config import Config, load_config
from largescale.observe.doctor import judge
from largescale.observe.metrics import METRICS, read_lines
from tests.helpers.sounding import sounding_clips

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT / "tests" / "observe" / "runs"
SHARDS = ROOT / "data" / "shards" / "fashion-mnist-train"

NOT_RECORDED = ("_s", "_ms", "_bytes", "skipped", "cache_", "queue_depth", "online_")
"""What columns' names begin or end with that the doctor does not look at."""
SIGNS = ["pixel_agreement", "agreement", "agreement_of_others"]
"""What methods with two views, or with embeddings of them, log by now; older versions made some recordings without."""


def record(name: str, shards: Path, scratch: Path) -> None:
    """Train one run, and write its recording."""
    case = SICK.get(name)
    recipe, overrides = (case.recipe, case.overrides) if case else HEALTHY[name]
    kind = case.images if case else IMAGES.get(recipe, CLOTHES)
    images = shards if kind == CLOTHES else made_shards(kind, scratch)
    run_dir = scratch / name
    shutil.rmtree(run_dir, ignore_errors=True)
    command = ["distill", str(teacher(shards, scratch))] if recipe == "distillation" else ["pretrain"]
    print(name, "exit", train(command, recipe, overrides, images, run_dir), flush=True)
    keep(name, run_dir)


def train(command: list[str], recipe: str, overrides: Sequence[str], images: Path, run_dir: Path) -> int:
    """One small run; the exit code."""
    config = ROOT / "configs" / "small" / f"{recipe}.yaml"
    return largescale([*command, str(config), f"run.dir={run_dir}", f"data.shards={images}", *TINY, *overrides])


def keep(name: str, run_dir: Path) -> None:
    """Write the recording of a run that exists."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    if config["train"]["steps"]:
        del config["train"]["epochs"]
    rows = [
        {
            key: value if isinstance(value, int) else float(f"{value:.5g}")
            for key, value in row.items()
            if not key.startswith(NOT_RECORDED) and not key.endswith(NOT_RECORDED)
        }
        for row in read_lines(run_dir / METRICS)
    ]
    if "teacher" in config["method"]:
        config["method"]["teacher"] = ""  # a file that nobody has
    columns = list(rows[-1])
    kept = {
        "config": {
            "method": config["method"],
            "optim": config["optim"],
            "train": config["train"],
            "data": {"crops": config["data"]["crops"]},
        },
        "columns": columns,
        "rows": [[row.get(column) for column in columns] for row in rows],
    }
    RECORDINGS.mkdir(exist_ok=True)
    (RECORDINGS / f"{name}.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")


def recording(name: str) -> tuple[Config, list[dict[str, Any]]]:
    """A run's configuration, as far as the doctor looks at it, and its logged lines."""
    kept = json.loads((RECORDINGS / f"{name}.json").read_text())
    overrides = [
        f"{group}.{key}={json.dumps(value)}"
        for group, settings in kept["config"].items()
        for key, value in settings.items()
    ]
    rows = [dict(zip(kept["columns"], values, strict=True)) for values in kept["rows"]]
    config = load_config(ROOT / "tests" / "mini.yaml", ["data.shards=unused", *overrides])
    return config, [{key: value for key, value in row.items() if value is not None} for row in rows]


def teacher(shards: Path, scratch: Path) -> Path:
    """A classifier: the run `simclr-tiny`, finetuned on a tenth of the labels."""
    file = scratch / "teacher.safetensors"
    if not file.exists():
        run_dir = scratch / "teacher"
        train(["pretrain"], "simclr", [], shards, run_dir)
        few = ["evaluate.low_shot_finetune_share=0.1", "evaluate.low_shot_finetune_epochs=5"]
        largescale(["finetune", str(run_dir), str(file), *few])
    return file


def made_shards(images: str, scratch: Path) -> Path:
    """Shards of images or clips that are made for a run."""
    if images.endswith("-squares"):
        return shards_of(images, "train")
    if images == "sounding":
        shards = scratch / "clips" / "shards" / "train"
        return shards if shards.exists() else sounding_clips(scratch / "clips", {"train": 256}) / "train"
    return coarse_squares(images, scratch)


def coarse_squares(images: str, scratch: Path) -> Path:
    """Shards of 1,280 files, which hold so many different images of coarse squares; coloured by their brightness."""
    shards = scratch / f"shards-{images}"
    if not (shards / "manifest.json").exists():
        folder, random = scratch / f"images-{images}", np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        count = {"one": 1, "two": 2, "four": 4, "eight": 8, "coloured": 1280}[images]
        different = random.integers(0, 256, (count, 7, 7), np.uint8)
        for number in range(1280):
            squares = different[number % len(different)]
            if images == "coloured":
                squares = np.stack([squares, 255 - squares, squares // 2], axis=-1)
            Image.fromarray(squares.repeat(4, 0).repeat(4, 1)).save(folder / f"{number:04}.png")
        subprocess.run([sys.executable, "-m", "shards", "convert", str(folder), str(shards)], check=True)
    return shards


def page() -> str:
    """What the doctor says of each recording over time, as Markdown."""
    missing = [f"{sum(sign in lacks(name) for name in healthy())} lack `{sign}`" for sign in SIGNS]
    lines = [
        "# The doctor on runs that are sick, and on healthy ones\n",
        "`python -m benchmarks.doctor record` trained the small runs, each sick on purpose or not at all, on one core: "
        "Fashion-MNIST at 20 px (40 or 48 where tiles are cut out; for colours, squares coloured by their brightness; "
        "for clips, 400 videos of a square that moves, or 256 of shapes that sound), a ResNet of two blocks, 240 steps "
        "of 64 images, a line every 10 steps, and otherwise "
        "the recipe in configs/small. Runs called NAME-seedN, and the demo, are those recipes at full length "
        "(`benchmarks/methods.py`). The doctor is asked after every logged line. Percentages are shares of a run's "
        "steps; before the first one nothing is said, since the run is young or nothing lasts yet.",
        "",
        "Limits were chosen while looking at the runs marked *chosen*, and at the healthy ones that existed by then; "
        "those marked *held out* were trained with other settings or seeds and only judged.",
        "",
        "What these runs do not show:",
        "",
        f"- No run was held out of: {', '.join(sorted(diagnoses(False) - diagnoses(True)))}.",
        f"- {len(MEANT_SICK)} runs with 25 to 2,500 times the recipe's rate were meant to be sick, trained well and "
        f"count as healthy: {', '.join(MEANT_SICK)}.",
        f"- Recordings that are older than a sign, or of methods that have none of it, could not alarm by it: of "
        f"{len(healthy())} healthy runs, {', '.join(missing)}.",
        f"- Recipes in configs/small of which no healthy run was recorded: {', '.join(not_recorded()) or 'none'}.",
        "",
        "## Sick",
        "",
        "| run | what is wrong | | lacks | the doctor | at the end |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in SICK.items():
        settings = [f"`{one}`" for one in case.overrides if not one.startswith(("run.seed", "data.augment"))]
        images = [] if case.images == CLOTHES else [f"{case.images} image{'s' * (case.images != 'one')} only"]
        held_out = ("held out" if case.held_out else "chosen") + ", **wrong**" * case.missed
        last = judge(*recording(name))
        lines.append(
            f"| {name} | {', '.join(images + settings)} | {held_out} | {', '.join(lacks(name)) or '-'} | "
            f"{course(name)} | {last.name if last else 'nothing'} |"
        )
    lines += ["", "## Healthy", "", "| run | lacks | the doctor |", "|---|---|---|"]
    lines += [f"| {name} | {', '.join(lacks(name)) or '-'} | {course(name)} |" for name in healthy()]
    lines += ["", "## What it says", ""]
    for name in SICK:
        config, rows = recording(name)
        found = next((one for end in range(1, len(rows) + 1) if (one := judge(config, rows[:end]))), None)
        lines += [f"- {name}: {found or 'nothing'}"]
    return "\n".join(lines) + "\n"


def healthy() -> list[str]:
    """Names of the recordings of runs that are not sick."""
    return sorted(path.stem for path in RECORDINGS.glob("*.json") if path.stem not in SICK)


def not_recorded() -> list[str]:
    """Recipes in configs/small that no healthy run is of."""
    recipes = {path.stem for path in (ROOT / "configs" / "small").glob("*.yaml")} - {"base"}
    return sorted(recipes - {recipe for recipe, _ in HEALTHY.values()})


def diagnoses(held_out: bool) -> set[str]:
    """What is wrong with the runs that were held out, or with the others."""
    return {case.diagnosis for case in SICK.values() if case.held_out == held_out}


def lacks(name: str) -> list[str]:
    """Which signs a recording is without, since it is older or its method has none."""
    columns = json.loads((RECORDINGS / f"{name}.json").read_text())["columns"]
    return [sign for sign in SIGNS if sign not in columns]


def course(name: str) -> str:
    """What the doctor says of a recording, and when it begins to say something else."""
    config, rows = recording(name)
    said = [""]
    parts = []
    for end in range(1, len(rows) + 1):
        found = judge(config, rows[:end])
        said.append(found.name if found else "")
        if said[-1] != said[-2]:
            parts.append(f"{rows[end - 1]['progress']:.0%}: {said[-1] or 'nothing any more'}")
    return "; ".join(parts) or "nothing at any time"


def main() -> None:
    """Record, keep or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--only", nargs="+", default=[*SICK, *HEALTHY])
    recording.add_argument("--shards", type=Path, default=SHARDS)
    recording.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "doctor-runs")
    keeping = commands.add_parser("keep")
    keeping.add_argument("name")
    keeping.add_argument("run_dir", type=Path)
    commands.add_parser("page")
    asked = parser.parse_args()
    if asked.command == "record":
        for name in asked.only:
            record(name, asked.shards, asked.folder)
    elif asked.command == "keep":
        keep(asked.name, asked.run_dir)
    else:
        (ROOT / "benchmarks" / "results" / "doctor.md").write_text(page())


if __name__ == "__main__":
    main()
