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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from largescale.cli import main as largescale
from largescale.config import Config, load_config
from largescale.observe.doctor import judge
from largescale.observe.metrics import METRICS, read_lines

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT / "tests" / "observe" / "runs"
SHARDS = ROOT / "data" / "shards" / "fashion-mnist-train"

TINY = [
    "data.crops=[{num: 2, size: 20, scale: [0.8, 1.0]}]",
    "model.depths=[1,1]",
    "model.width=16",
    "train.global_batch=64",
    "train.steps=240",
    "train.precision=fp32",
    "parallel.strategy=ddp",
    "optim.warmup_epochs=0.15",
    "run.log_every=10",
    "checkpoint.every_steps=0",
    "checkpoint.background=false",
    "evaluate.online_every=0",
]
NOT_RECORDED = ("_s", "_ms", "_bytes", "skipped", "cache_", "queue_depth", "online_")
"""What columns' names begin or end with that the doctor does not look at."""

STILL = [
    "data.crops=[{num: 2, size: 20, scale: [1.0, 1.0], ratio: [1.0, 1.0]}]",
    *(f"data.augment.{name}=0" for name in ("rotate_degrees", "gamma", "gain", "blur", "noise", "erase")),
]
ONE_VIEW = ["data.crops=[{num: 1, size: 20, scale: [0.8, 1.0]}]"]
MILD = [*(f"data.augment.{name}=0" for name in ("gamma", "gain", "erase")), "data.augment.noise=0.02"]
FROZEN = ["method.freeze_prototypes_steps=240"]
NOISE = [
    "data.crops=[{num: 2, size: 20, scale: [0.01, 0.03]}]",
    "data.augment.noise=2",
    "data.augment.erase=1",
    "data.augment.erase_side=[0.7,0.9]",
]
SOON = ["method.freeze_last_layer_epochs=0.1", "method.outputs=128", "method.momentum=0.98"]
NO_SHARPENING = ["method.teacher_temperature=0.1", "method.warmup_teacher_temperature=0.1"]


@dataclass(frozen=True)
class Sick:
    """A run that is sick on purpose.

    Attributes:
        diagnosis: that is right.
        recipe: in configs/small.
        overrides: on top of TINY.
        images: "clothes", or "one", "two", "four" or "eight" images made for it, again and again.
        held_out: whether the rules were chosen without looking at it.
        also: diagnoses that are right too, at some time of the run, as what follows from the first.
        remedy: what the advice must name.
        missed: the doctor is wrong about it, and the page says so.
    """

    diagnosis: str
    recipe: str
    overrides: Sequence[str] = ()
    images: str = "clothes"
    held_out: bool = False
    also: Sequence[str] = ()
    remedy: str = ""
    missed: bool = False


RATE, SLOW, SAME, IDENTICAL = "learning rate too high", "learns too slowly", "images all the same", "views identical"
UNIFORM_CODES, STUCK, FEW = "uniform codes", "stuck at ln K", "few prototypes"
LOW_RANK, QUEUE, COLLAPSE = "features of low rank", "queue harmful", "embeddings collapsed"
UNIFORM_OUTPUTS, ONE_OUTPUT = "uniform outputs", "one output for all"

SICK = {
    "swav-sgd-rate-30": Sick(RATE, "swav", ["optim.name=sgd", "optim.lr=30", "optim.weight_decay=0"]),
    "swav-rate-0.2-no-batchnorm": Sick(RATE, "swav", ["optim.lr=0.2", "method.head_batchnorm=false"]),
    "swav-rate-10": Sick(RATE, "swav", ["optim.lr=10", "optim.weight_decay=0"]),
    "swav-sgd-rate-300": Sick(RATE, "swav", ["optim.name=sgd", "optim.lr=300", "optim.weight_decay=0"]),
    "mocov2-rate-0.5": Sick(RATE, "mocov2", ["optim.lr=0.5", "method.queue=512"]),
    "byol-rate-0.5": Sick(RATE, "byol", ["optim.lr=0.5"]),
    "vicreg-rate-0.5": Sick(RATE, "vicreg", ["optim.lr=0.5", "method.hidden=[128]", "method.embedding=128"]),
    # Recorded before `agreement_of_others` was logged, so that images can only stand beside what follows from them.
    "swav-one-image": Sick(UNIFORM_CODES, "swav", images="one", also=[LOW_RANK], remedy="look at them"),
    "swav-one-image-seed1": Sick(
        UNIFORM_CODES,
        "swav",
        ["run.seed=1", "method.prototypes=30"],
        images="one",
        also=[LOW_RANK, RATE],
        remedy="look at them",
    ),
    "simclr-one-image": Sick(SAME, "simclr", images="one"),
    "byol-one-image": Sick(SAME, "byol", images="one"),
    "barlow-one-image": Sick(SAME, "barlow", ["method.hidden=[128]", "method.embedding=128"], images="one"),
    "simclr-one-image-still": Sick(SAME, "simclr", STILL, images="one", held_out=True),
    "swav-views-identical": Sick(IDENTICAL, "swav", STILL),
    "simclr-views-identical": Sick(IDENTICAL, "simclr", STILL),
    "byol-views-identical": Sick(IDENTICAL, "byol", [*STILL, "run.seed=1"], held_out=True),
    "dino-views-identical": Sick(IDENTICAL, "dino", [*SOON, *STILL], held_out=True),
    "swav-epsilon-5": Sick(UNIFORM_CODES, "swav", ["method.epsilon=5"]),
    "swav-epsilon-1": Sick(UNIFORM_CODES, "swav", ["method.epsilon=1", "run.seed=2"], held_out=True),
    "swav-epsilon-0.5-k30": Sick(UNIFORM_CODES, "swav", ["method.epsilon=0.5", "method.prototypes=30"], held_out=True),
    "swav-rate-1e-5": Sick(SLOW, "swav", ["method.epsilon=0.1", "optim.lr=0.00001"]),
    "swav-rate-3e-6": Sick(
        SLOW, "swav", ["method.epsilon=0.1", "optim.lr=0.000003", "run.seed=1", "method.prototypes=50"], held_out=True
    ),
    "swav-temperature-30": Sick(STUCK, "swav", ["method.temperature=30"], remedy="method.temperature=0.1"),
    "swav-temperature-20": Sick(
        STUCK,
        "swav",
        ["method.temperature=20", "method.prototypes=300", "run.seed=1"],
        held_out=True,
        remedy="method.temperature=0.1",
    ),
    "swav-views-of-noise": Sick(SAME, "swav", [*NOISE, "method.epsilon=0.01"], also=[STUCK], remedy="data.augment"),
    "swav-four-images": Sick(FEW, "swav", [*MILD, *FROZEN, "method.prototypes=1000"], images="four"),
    "swav-eight-images": Sick(
        FEW, "swav", [*MILD, *FROZEN, "run.seed=1", "method.prototypes=2000"], images="eight", held_out=True
    ),
    "swav-two-images": Sick(
        FEW, "swav", [*MILD, *FROZEN, "run.seed=1", "method.prototypes=500"], images="two", missed=True
    ),
    "swav-low-rank": Sick(LOW_RANK, "swav", ["method.hidden=[1]"], also=[FEW]),
    "swav-low-rank-seed1": Sick(LOW_RANK, "swav", ["method.hidden=[1]", "run.seed=1"], also=[FEW]),
    "simclr-low-rank": Sick(LOW_RANK, "simclr", ["method.hidden=[1]", "run.seed=1"], held_out=True),
    "barlow-off-diagonal-0": Sick(
        LOW_RANK, "barlow", ["method.off_diagonal=0", "method.hidden=[128]", "method.embedding=128"]
    ),
    "swav-queue-old": Sick(
        QUEUE,
        "swav",
        ["method.queue=3840", "method.queue_start_step=20", "method.epsilon=0.02", "optim.lr=0.02"],
        also=[RATE],
    ),
    "swav-queue-older": Sick(
        QUEUE, "swav", ["method.queue=6400", "method.queue_start_step=0", "optim.lr=0.03", "run.seed=1"]
    ),
    "simsiam-no-stop-gradient": Sick(
        LOW_RANK, "simsiam", ["method.stop_gradient=false"], remedy="method.stop_gradient=true"
    ),
    "byol-no-predictor": Sick(
        COLLAPSE, "byol", ["method.predictor=false", "run.seed=1"], held_out=True, remedy="method.predictor=true"
    ),
    "vicreg-no-variance": Sick(
        COLLAPSE,
        "vicreg",
        ["method.variance=0", "method.hidden=[128]", "method.embedding=128"],
        held_out=True,
        remedy="method.variance=25",
    ),
    "dino-no-centring": Sick(
        ONE_OUTPUT, "dino", [*SOON, "method.centring=false"], held_out=True, remedy="method.centring=true"
    ),
    "dino-no-sharpening": Sick(
        UNIFORM_OUTPUTS, "dino", [*SOON, *NO_SHARPENING], held_out=True, remedy="method.teacher_temperature="
    ),
}
HEALTHY = {
    "swav-tiny": ("swav", []),
    "swav-queue-tiny": ("swav", ["method.queue=512", "method.queue_start_step=60"]),
    "swav-batch-16-queue-tiny": (
        "swav",
        ["train.global_batch=16", "optim.lr=0.001", "method.queue=256", "method.queue_start_step=60"],
    ),
    "swav-k-3000-tiny": ("swav", ["method.prototypes=3000", "method.epsilon=0.005", "method.head_batchnorm=false"]),
    "simclr-tiny": ("simclr", []),
    "byol-tiny": ("byol", []),
    "simsiam-tiny": ("simsiam", []),
    "barlow-tiny": ("barlow", ["method.hidden=[128]", "method.embedding=128"]),
    "vicreg-tiny": ("vicreg", ["method.hidden=[128]", "method.embedding=128"]),
    "dino-tiny": ("dino", SOON),
    "mocov2-tiny": ("mocov2", ["method.queue=512"]),
    "pirl-tiny": (
        "pirl",
        ["data.crops=[{num: 1, size: 28, scale: [0.8, 1.0]}, {num: 1, size: 30, scale: [0.8, 1.0]}]"],
    ),
    "mocov1-tiny": ("mocov1", ["method.queue=512"]),
    "mocov3-tiny": ("mocov3", []),
    "nnclr-tiny": ("nnclr", ["method.queue=512"]),
    "densecl-tiny": ("densecl", ["method.queue=512", "method.dense_start_step=60"]),
    "pcl-tiny": ("pcl", ["method.queue=512", "method.clusters=[50,100]", "method.wrong_clusters=64"]),
    "directpred-tiny": ("directpred", []),
    "deepcluster-tiny": ("deepcluster", ["method.clusters=50", "method.components=32"]),
    "deepclusterv2-tiny": ("deepclusterv2", ["method.clusters=[50,50]"]),
    "deepercluster-tiny": (
        "deepercluster",
        ["method.clusters=50", "method.super_clusters=2", "method.components=32", "method.recluster_epochs=1"],
    ),
    "sela-tiny": ("sela", ["method.clusters=[50,50]"]),
    "rotation-tiny": ("rotation", ONE_VIEW),
    "jigsaw-tiny": ("jigsaw", ["data.crops=[{num: 1, size: 48, scale: [0.6, 1.0]}]", "method.tile=12"]),
    "patches-tiny": (
        "patches",
        ["data.crops=[{num: 1, size: 48, scale: [0.6, 1.0]}]", "method.tile=12", "method.gap=2"],
    ),
    "cpc-tiny": ("cpc", ["data.crops=[{num: 1, size: 40, scale: [0.8, 1.0]}]"]),
    "denoising-tiny": ("denoising", [*ONE_VIEW, "method.decoder=[32,16]"]),
    "context_encoder-tiny": ("context_encoder", [*ONE_VIEW, "method.decoder=[32,16]", "method.discriminator=[16,32]"]),
    "artifacts-tiny": ("artifacts", [*ONE_VIEW, "method.autoencoder=[16,32]", "method.autoencoder_epochs=0.5"]),
    "paws-tiny": ("paws", []),
    "distillation-tiny": ("distillation", ONE_VIEW),
    "colorization-tiny": ("colorization", [*ONE_VIEW, "method.decoder=[32,16]"]),
    "swav-rate-0.2": ("swav", ["optim.lr=0.2"]),
    "swav-rate-1": ("swav", ["optim.lr=1", "run.seed=1"]),
    "swav-rate-0.05-no-batchnorm": ("swav", ["optim.lr=0.05", "method.head_batchnorm=false", "run.seed=3"]),
    "simclr-rate-0.2": ("simclr", ["optim.lr=0.2"]),
    "simclr-rate-5": ("simclr", ["optim.lr=5", "optim.weight_decay=0"]),
}
"""Recipes and overrides. The last five have 25 to 2,500 times the recipe's rate, but AdamW and BatchNorm survive that:
they learn to the end, if less, and their own course does not tell that they could do better.
"""
MEANT_SICK = list(HEALTHY)[-5:]
FULL_LENGTH = [
    "demo",
    *(f"{name}-seed0" for name in ("barlow", "directpred", "pirl", "simsiam", "vicreg")),
    *(f"{name}-seed{seed}" for name in ("mocov2", "simclr", "swav") for seed in range(3)),
]
"""Healthy runs of `benchmarks/methods.py` that were kept, and the demo."""
SIGNS = ["pixel_agreement", "agreement", "agreement_of_others"]
"""What methods with two views, or with embeddings of them, log by now; older versions made some recordings without."""


def record(name: str, shards: Path, scratch: Path) -> None:
    """Train one run, and write its recording."""
    case = SICK.get(name)
    recipe, overrides = (case.recipe, case.overrides) if case else HEALTHY[name]
    kind = case.images if case else "coloured" if recipe == "colorization" else "clothes"
    images = shards if kind == "clothes" else made_shards(kind, scratch)
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
        "Fashion-MNIST at 20 px (40 or 48 where tiles are cut out; for colours, squares coloured by their brightness), "
        "a ResNet of two blocks, 240 steps of 64 images, a line every 10 steps, and otherwise "
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
        images = [] if case.images == "clothes" else [f"{case.images} image{'s' * (case.images != 'one')} only"]
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
