"""Tasks on clips, learnt from synthetic videos, and at chance where what they ask for is taken out of the same videos.

    OMP_NUM_THREADS=1 python -m benchmarks.clips_learned [--tasks NAME ...] [--seeds 0] [--videos-only]

A task is a recipe of configs/small and folders of shards: as filmed, and without what the task needs. Videos are made
here and converted by `shards convert --clips`; the network is trained on one folder and asked about clips of another,
by `largescale evaluate own-task`. Writes benchmarks/results/clips_learned.json and clips_learned.md; rows of other
tasks and seeds are kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.accuracies import RESULTS, ROOT, machine
from largescale.data.task_views.lab import srgb_of
from largescale.run.environment import environment
from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert

SHARDS, RUNS = ROOT / "data" / "shards", ROOT / "runs" / "bench-clips_learned"
SIZES = {"train": 400, "test": 100}
"""Videos of each folder."""
RATE, FRAMES, SIDE = 8, 48, 32
TRAVEL, SIDES = 14.0, (5.0, 14.0)
"""Pixels that a square moves by from the first frame to the last, and its side when it is far away and when near."""
NUM_HUES, CHROMA = 8, 25.0
"""Colours of coloured squares, and their distance from grey in L*a*b*: all are within sRGB."""


def moving_square(random: np.random.Generator, *, nears: bool = False) -> np.ndarray:
    """A bright square that moves steadily over dim noise in any direction, and comes nearer or goes away, or always
    `nears`: uint8 [FRAMES, SIDE, SIDE, 3].
    """
    angle, done = random.uniform(0, 2 * np.pi), np.linspace(0, 1, FRAMES)
    way = TRAVEL * np.array([np.sin(angle), np.cos(angle)])
    side = np.interp(done if random.random() < 0.5 or nears else 1 - done, (0, 1), SIDES)
    room = SIDE - max(SIDES) - np.abs(way)
    start = np.where(way < 0, -way, 0) + random.random(2) * room
    corners = start + done[:, None] * way + (max(SIDES) - side[:, None]) / 2  # [FRAMES, 2]
    place = np.arange(SIDE)
    covered = np.clip(place + 1 - corners[..., None], 0, 1)
    covered = covered * np.clip(corners[..., None] + side[:, None, None] - place, 0, 1)
    inside = (covered[:, 0, :, None] * covered[:, 1, None, :])[..., None]
    ground, colour = random.integers(0, 90, (SIDE, SIDE, 3)), random.integers(170, 256, 3)
    return np.rint(inside * colour + (1 - inside) * ground).astype(np.uint8)


def shuffled_square(random: np.random.Generator, *, nears: bool = False) -> np.ndarray:
    """The same frames in random order: nothing moves from one to the next."""
    return random.permutation(moving_square(random, nears=nears))


def coloured_squares(random: np.random.Generator, *, recoloured: bool = False) -> np.ndarray:
    """Two squares that move over a ground, told apart by lightness and stripes alone: what colour each has is drawn for
    a video, or, `recoloured`, for each frame; uint8 [FRAMES, SIDE, SIDE, 3].
    """
    side, done, place = 11, np.linspace(0, 1, FRAMES)[:, None], np.arange(SIDE)
    parts = np.zeros((FRAMES, SIDE, SIDE), np.int64)  # 0 for the ground
    lightness = np.broadcast_to(52 + 4 * random.standard_normal((SIDE, SIDE)), parts.shape).copy()
    for number, (level, along) in enumerate(((35.0, 1), (72.0, 2)), 1):
        start, end = random.random((2, 2)) * (SIDE - side)
        corner = np.rint(start + done * (end - start)).astype(int)  # [FRAMES, 2]
        inside = [(place >= corner[:, axis, None]) & (place < corner[:, axis, None] + side) for axis in (0, 1)]
        covered = inside[0][:, :, None] & inside[1][:, None, :]
        stripes = 6 * np.cos(np.pi / 2 * (place - corner[:, along - 1, None]))
        stripes = stripes[:, :, None] if along == 1 else stripes[:, None, :]
        parts[covered] = number
        lightness = np.where(covered, level + np.broadcast_to(stripes, parts.shape), lightness)
    hues = random.integers(NUM_HUES, size=(FRAMES, 3)) if recoloured else random.integers(NUM_HUES, size=3)[None]
    angles = 2 * np.pi / NUM_HUES * np.take_along_axis(np.broadcast_to(hues, (FRAMES, 3)), parts.reshape(FRAMES, -1), 1)
    angles = angles.reshape(parts.shape)
    lab = np.stack([lightness, CHROMA * np.cos(angles), CHROMA * np.sin(angles)], axis=1)
    return np.rint(255 * srgb_of(torch.from_numpy(lab)).movedim(1, -1).numpy()).astype(np.uint8)


KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "moving-squares": moving_square,
    "shuffled-squares": shuffled_square,
    "nearing-squares": partial(moving_square, nears=True),
    "shuffled-nearing-squares": partial(shuffled_square, nears=True),
    "coloured-squares": coloured_squares,
    "recoloured-squares": partial(coloured_squares, recoloured=True),
}
"""What videos show, by the name of their folders of shards."""


@dataclass(frozen=True)
class Task:
    """A recipe of configs/small, and the kinds of videos it is trained on and asked about.

    Attributes:
        title: of the method.
        kinds: by what is said of them; the first has what the task needs, the others have not.
        overrides: what is set differently in the recipe.
    """

    title: str
    kinds: dict[str, str]
    overrides: Sequence[str] = ("model.width=16",)


_FILMED, _SHUFFLED, _RECOLOURED = "as filmed", "frames in random order", "colours drawn for each frame"
TASKS = {
    "shuffle_learn": Task("Shuffle and Learn", {_FILMED: "moving-squares", _SHUFFLED: "shuffled-squares"}),
    "opn": Task("Order prediction network", {_FILMED: "nearing-squares", _SHUFFLED: "shuffled-nearing-squares"}),
    "colour_tracking": Task("Tracking by colorizing", {_FILMED: "coloured-squares", _RECOLOURED: "recoloured-squares"}),
}
"""Motion that may run both ways leaves two thirds of OPN's answers to be had, so its square always comes nearer."""


def shards_of(kind: str, part: str) -> Path:
    """Shards of videos of a kind, made if they are not there."""
    out = SHARDS / f"{kind}-{part}"
    if not (out / "manifest.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            for number in range(SIZES[part]):
                random = np.random.default_rng([list(SIZES).index(part), number])
                write(Path(folder) / f"{number:04d}.mkv", KINDS[kind](random))
            clips = ClipSettings(frame_rate=float(RATE))
            convert(Path(folder), out, Options(out.name, samples_per_shard=50, clips=clips))
    return out


def write(path: Path, frames: np.ndarray) -> None:
    """A video, H.264."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def measure(name: str, kind: str, seed: int) -> dict[str, Any]:
    """Train on a kind of videos, and ask about others of it."""
    run, train, test = RUNS / f"{name}-{kind}-seed{seed}", shards_of(kind, "train"), shards_of(kind, "test")
    words = [f"run.dir={run}", f"run.seed={seed}", f"data.shards={train}", f"data.eval_shards={test}"]
    shutil.rmtree(run, ignore_errors=True)  # a complete run would not train again
    before = _cpu_s()
    command("pretrain", f"configs/small/{name}.yaml", *words, *TASKS[name].overrides)
    spent = _cpu_s() - before
    command("evaluate", "own-task", str(run))
    record = json.loads((run / "eval" / "own-task.json").read_text())
    results = record["results"]
    return {
        "task": name,
        "kind": kind,
        "seed": seed,
        "accuracy": 100 * results["pretrained"]["task_accuracy"],
        "untrained": 100 * results["untrained"]["task_accuracy"],
        "chance": 100 * results["pretrained"]["task_chance"],
        **{name: 100 * value for name, value in results["pretrained"].items() if name == "same_place"},
        "train_cpu_s": spent,
        "machine": machine({"environment": environment(), "ranks": 1}),
    }


def command(*words: str) -> None:
    """`largescale WORDS`, in the repository."""
    subprocess.run([sys.executable, "-m", "largescale", *words], cwd=ROOT, check=True)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Tasks on clips, learnt from synthetic videos",
        "",
        f"`OMP_NUM_THREADS=1 python -m benchmarks.clips_learned` on {rows[-1]['machine']}. Recipes of configs/small, "
        f"of half the width, trained on {SIZES['train']} videos of six seconds and asked about {SIZES['test']} others, "
        "four times each, by `largescale evaluate own-task`. A square moves steadily over noise and comes nearer or "
        "goes away; for OPN it always comes nearer, since of motion that may run both ways at most two thirds of its "
        "answers can be right. In other videos the same frames come in random order, so that there is nothing to "
        "learn: a network that answered better than by chance there would have found a shortcut. For tracking, two "
        "squares move over a ground; what colour each has is drawn for each video, or, so that there is nothing to "
        "copy, for each frame. Shares in percent.",
        "",
        "| task | videos | seed | right | chance | untrained network | CPU time of training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = next(words for words, kind in TASKS[row["task"]].kinds.items() if kind == row["kind"])
        lines.append(
            f"| {TASKS[row['task']].title} | {said} | {row['seed']} | **{row['accuracy']:.1f}** | {row['chance']:.1f} "
            f"| {row['untrained']:.1f} | {row['train_cpu_s']:.0f} |"
        )
    still = [row["same_place"] for row in rows if "same_place" in row]
    if still:
        lines += ["", f"If nothing moved, {still[0]:.1f} % of the colours to be tracked would be told right."]
    return "\n".join([*lines, ""])


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    """Of a row in the page."""
    return list(TASKS).index(row["task"]), list(TASKS[row["task"]].kinds.values()).index(row["kind"]), row["seed"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--videos-only", action="store_true", help="make the shards that the recipes name, and end")
    arguments = parser.parse_args()
    if arguments.videos_only:
        for kind in sorted({kind for name in arguments.tasks for kind in TASKS[name].kinds.values()}):
            for part in SIZES:
                print(shards_of(kind, part))
        return
    path = RESULTS / "clips_learned.json"
    known = json.loads(path.read_text()) if path.exists() else []
    new = [
        measure(name, kind, seed)
        for name in arguments.tasks
        for kind in TASKS[name].kinds.values()
        for seed in arguments.seeds
    ]
    places = {(row["task"], row["kind"], row["seed"]): row for row in [*known, *new]}
    rows = sorted(places.values(), key=_place)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "clips_learned.md").write_text(page(rows))


if __name__ == "__main__":
    main()
