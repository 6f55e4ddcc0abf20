"""AVE-Net on real pictures and their spoken names: Debian's tuxpaint-stamps-default, in a dozen languages.

    apt-get install tuxpaint-stamps-default
    OMP_NUM_THREADS=1 python -m benchmarks.pairs /usr/share/tuxpaint/stamps [--epochs 10] [--seed 0]

The name of `dog.png` is spoken in `dog_desc.ogg` and `dog_desc_LANGUAGE.ogg`, and it barks in `dog.ogg`: a list names
all such pairs, and `shards convert --clips` converts it. Pictures are held out, with all that is said of them, so that
no picture of the test was seen with another language. Retrieval among one pair per picture counts the own sound alone;
nDCG among all held-out pairs counts other languages' names of a picture too, and names of pictures of the same folder
and of folders near by, by the tree of the stamps' folders. Writes benchmarks/results/pairs.json and pairs.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from benchmarks.accuracies import RESULTS, ROOT, machine
from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.data.reader import ShardReader
from largescale.run.environment import environment

WORK = ROOT / "runs" / "bench-pairs"
RECIPE = "configs/small/avc.yaml"
OVERRIDES = [
    "data.crops=[{num: 1, size: 40, scale: [0.6, 1.0]}]",
    "evaluate.resize=45",
    "evaluate.size=40",
    "model.width=16",
    "method.sound.seconds=0.5",
    "train.global_batch=32",
]
LEAST_S = 0.62
"""A window of half a second anywhere on its grid, and some room for chance."""
HELD_OUT_PER_CENT = 15
RANKS = [1, 5, 10, 30]


class Pair(NamedTuple):
    """A picture and a sound, and seconds of it."""

    picture: Path
    sound: Path
    seconds: float

    def is_held_out(self) -> bool:
        """By its picture alone."""
        return _hash(self.picture.stem) % 100 < HELD_OUT_PER_CENT


def pairs_of(folder: Path) -> list[Pair]:
    """All pairs below a folder, by picture and sound."""
    found = []
    for picture in sorted(folder.rglob("*.png")):
        own = picture.parent.glob(f"{picture.stem}.*")
        spoken = picture.parent.glob(f"{picture.stem}_desc*")
        for sound in sorted(path for path in {*own, *spoken} if path.suffix in (".ogg", ".wav")):
            about = soundfile.info(str(sound))
            found.append(Pair(picture, sound, about.frames / about.samplerate))
    return found


def one_per_picture(pairs: Sequence[Pair]) -> list[Pair]:
    """Of each picture a pair whose sound is long enough, chosen by a hash."""
    found: dict[Path, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: _hash(pair.sound.name)):
        if pair.seconds >= LEAST_S:
            found.setdefault(pair.picture, pair)
    return [found[picture] for picture in sorted(found)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def converted(name: str, pairs: Sequence[Pair], folder: Path) -> dict[str, Any]:
    """Convert a list of pairs, whose classes are the paths of the pictures: what came of it."""
    listed, out = WORK / f"{name}.csv", WORK / name
    shutil.rmtree(out, ignore_errors=True)
    with listed.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "sound", "class"])
        for pair in pairs:
            place = pair.picture.relative_to(folder).with_suffix("")
            writer.writerow([pair.picture, pair.sound, place])
    before = _cpu_s()
    words = ["--clips", "--sound-rate", "16000", "--frame-side", "80", "--labels", "column:class", "--workers", "1"]
    _run("shards", "convert", str(listed), str(out), *words)
    spent = _cpu_s() - before
    _run("shards", "verify", str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    return {"listed": len(pairs), "converted": manifest["num_samples"], "skipped": manifest["skipped"], "cpu_s": spent}


def long_enough(shards: Path) -> Path:
    """A file of the numbers of pairs whose sound has a window."""
    corpus = open_corpus(str(shards), load_config(ROOT / RECIPE).data)
    reader = ShardReader([corpus])
    clips = [reader.clip(number) for number in range(corpus.manifest.num_samples)]
    numbers = [n for n, clip in enumerate(clips) if clip and clip.sound_samples >= LEAST_S * clip.sound_rate]
    np.save(WORK / "long.npy", np.array(numbers, np.int64))
    return WORK / "long.npy"


def measure(folder: Path, *, epochs: float, seed: int) -> dict[str, Any]:
    """Convert, train, and ask about pictures that were held out."""
    WORK.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(folder)
    held = [pair for pair in pairs if pair.is_held_out()]
    parts = {
        "train": [pair for pair in pairs if not pair.is_held_out()],
        "held-out": held,
        "one-per-picture": one_per_picture(held),
    }
    conversions = {name: converted(name, part, folder) for name, part in parts.items()}
    run, chosen = WORK / f"run-seed{seed}", long_enough(WORK / "train")
    shutil.rmtree(run, ignore_errors=True)
    before = _cpu_s()
    words = [f"run.dir={run}", f"run.seed={seed}", f"train.epochs={epochs}", f"data.shards={WORK / 'train'}"]
    _run("largescale", "pretrain", RECIPE, *words, f"data.subset={chosen}", *OVERRIDES)
    spent = _cpu_s() - before
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "epochs": epochs,
        "pictures": {name: len({pair.picture for pair in part}) for name, part in parts.items()},
        "conversions": conversions,
        "train_pairs": len(np.load(chosen)),
        "train_cpu_s": spent,
        "train_accuracy": told_right(run),
        "one-per-picture": _asked(run, "one-per-picture", f"evaluate.cross_modal_ranks={RANKS}"),
        "held-out": _asked(run, "held-out", "evaluate.cross_modal_tree=names"),
        "machine": machine({"environment": environment(), "ranks": 1}),
    }


def told_right(run: Path) -> float:
    """The share of training pairs told right in the last epoch, a mean over what was logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "task_accuracy" in row and row["epoch"] > rows[-1]["epoch"] - 1]
    steps = [row["step"] - before["step"] for before, row in zip(rows[-len(last) - 1 :], last, strict=False)]
    return float(np.average([row["task_accuracy"] for row in last], weights=steps))


def _asked(run: Path, part: str, *words: str) -> dict[str, Any]:
    _run("largescale", "evaluate", "cross-modal", str(run), f"data.eval_shards={WORK / part}", *words)
    record = json.loads((run / "eval" / "cross-modal.json").read_text())
    return {"pairs": record["num_test"], **record["results"]}


def _run(module: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, check=True)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def page(row: dict[str, Any]) -> str:
    """The results as Markdown."""
    made, pictures = row["conversions"], row["pictures"]
    both = [made["train"], made["held-out"]]
    listed, got, spent = (sum(one[key] for one in both) for key in ("listed", "converted", "cpu_s"))
    shown, every = row["one-per-picture"], row["held-out"]
    lines = [
        "# AVE-Net on pictures and their spoken names",
        "",
        f"{row['date']}, {row['machine']}. `OMP_NUM_THREADS=1 python -m benchmarks.pairs /usr/share/tuxpaint/stamps`: "
        f"Debian's tuxpaint-stamps-default, {got:,} of {listed:,} pairs of a picture and a sound converted in "
        f"{spent:.0f} s of CPU time, all verified. `{RECIPE}` at half its width, 40 px and half a second, seed "
        f"{row['seed']}: {row['epochs']:g} epochs of {row['train_pairs']:,} pairs of {pictures['train']} pictures in "
        f"{row['train_cpu_s']:.0f} s of CPU time; in the last {100 * row['train_accuracy']:.1f} % of the training "
        "pairs were told right (chance: 50). No picture of those below was seen in training, in any language.",
        "",
        f"One pair of each of {shown['pairs']} pictures: how often the own sound or picture is among the k nearest, in "
        "percent.",
        "",
        "| | " + " | ".join(f"recall@{k}" for k in RANKS) + " |",
        "|---" * (len(RANKS) + 1) + "|",
    ]
    names = {"image to sound": "picture to sound", "sound to image": "sound to picture"}
    for network in ("pretrained", "untrained"):
        for direction, title in names.items():
            found = [shown[network][f"recall_at_{k}_by_direction"][direction] for k in RANKS]
            lines.append(f"| {network}, {title} | " + " | ".join(f"{100 * one:.1f}" for one in found) + " |")
    chance = [shown["chance"][f"recall_at_{k}"] for k in RANKS]
    lines.append("| chance | " + " | ".join(f"{100 * one:.1f}" for one in chance) + " |")
    lines += [
        "",
        f"All {every['pairs']} pairs of these pictures: nDCG at 30, whose relevance is 20 less the distance in the "
        "tree of the stamps' folders, so that other names of the same picture count 20, and chance is high.",
        "",
        "| | " + " | ".join(every["chance"]["ndcg_at_30_by_direction"]) + " |",
        "|---" * 5 + "|",
    ]
    for network in ("pretrained", "untrained", "chance"):
        found = every[network]["ndcg_at_30_by_direction"].values()
        lines.append(f"| {network} | " + " | ".join(f"{one:.3f}" for one in found) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    row = measure(arguments.stamps, epochs=arguments.epochs, seed=arguments.seed)
    (RESULTS / "pairs.json").write_text(json.dumps(row, indent=1) + "\n")
    (RESULTS / "pairs.md").write_text(page(row))
    print(page(row))


if __name__ == "__main__":
    main()
