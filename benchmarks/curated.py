"""A pile that nobody sorted: training on all of it, on a random part, on a curated part, on one chosen by labels.

    python -m benchmarks.curated [--steps 600] [--target 1000] [--seeds 0 1 2] [--folder runs/curated]

`benchmarks.curated_pile` makes the pile of a seed from the bundled training images. Curation is what a user would do:
`shards convert --no-blank --duplicates near`, features of what is left by the network that was trained on the whole
pile, `largescale curate`; and a second time, `--without` the clusters of the top level that are junk for the most part,
which whoever looks at the page sees at once, and labels stand in for here. With `--labels` there is one set more, which
is what curation aims at and cannot know: no copy, no junk, and as many images of each class as of any other, as far as
the pile has them.

configs/small/swav.yaml is trained for `--steps` on each set, from equal starts and with equally many warm-up steps: as
many images seen. Measured on the bundled test images, which are balanced: kNN and a linear probe with 200 training
images of each class as the bank, and retrieval among the test images. `--choose` measures on 200 other training images
of each class instead. Neither bank nor these are in any pile.

With `--folder` what is made stays there, and the same command goes on after it was killed. Writes
benchmarks/results/curated.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.curated_pile import JUNK, make_pile
from benchmarks.gram import hardware
from largescale.run.status import COMPLETE, status_of
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SAMPLE = ROOT / "data" / "fashion-mnist" / "train"
TEST = ROOT / "data" / "shards" / "fashion-mnist-test"
OF_BANK, WARMUP = 200, 40
MARK = "<!-- read -->"
MEASURES = {"knn": "top1", "linear": "top1", "retrieval": "map"}
SETS = ("pile", "random part", "curated part", "curated part, junk clusters left out", "part chosen by labels")
PILE, RANDOM, CURATED, LOOKED_AT, LABELS = SETS


def command(*words: object) -> None:
    """Run one of this project's commands."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def convert(source: Path, shards: Path, *wanted: object) -> None:
    """Make shards, unless they are there."""
    if not (shards / "manifest.json").is_file():
        settings = ["--shuffle", 0, "--samples-per-shard", 1000, "--workers", 1]
        command("shards", "convert", source, shards, *settings, *wanted)


def keys_of(shards: Path) -> list[str]:
    """Names of images in the order of sample numbers."""
    manifest = read_manifest(shards)
    indexes = (read_index(manifest.index_path(number)) for number in range(len(manifest.shards)))
    return [Path(index.key(row)).name for index in indexes for row in range(len(index))]


@dataclass(frozen=True)
class Part:
    """What is trained on: shards, and which of their samples; all if there is no file."""

    shards: Path
    subset: Path | None = None

    def keys(self) -> list[str]:
        """Names of its images."""
        keys = keys_of(self.shards)
        return [keys[number] for number in np.load(self.subset).tolist()] if self.subset else keys

    def kinds(self) -> dict[str, int]:
        """Different images of each class, whichever of their copies are there; copies beyond; and junk."""
        keys = [Path(key).stem for key in self.keys()]
        images = {key.partition("-copy")[0] for key in keys}
        found = Counter(image.rpartition("-")[0] for image in images)
        return dict(sorted(found.items())) | {"copies": len(keys) - len(images)}


@dataclass(frozen=True)
class Judges:
    """Labelled shards that tell how good a network is."""

    bank: Path
    test: Path


def chosen_by_labels(keys: Sequence[str], target: int) -> np.ndarray:
    """Numbers of `target` images or just below: no copies, no junk, each class cut to the same size at most."""
    classes = [Path(key).stem.rpartition("-")[0] for key in keys]
    own: dict[str, list[int]] = {}
    for number, (name, key) in enumerate(zip(classes, keys, strict=True)):
        if "-copy" not in key and name not in JUNK:
            own.setdefault(name, []).append(number)
    cap = 0
    while cap < target and sum(min(cap + 1, len(numbers)) for numbers in own.values()) <= target:
        cap += 1
    return np.sort(np.concatenate([np.array(numbers[:cap], np.int64) for numbers in own.values()]))


def junk_clusters(curation: Path) -> list[int]:
    """Clusters of the top level that are junk for the most part, as a look at the page tells."""
    table = pq.read_table(curation / "images")
    top = max(name for name in table.column_names if name.startswith("cluster_"))
    is_junk = [Path(key).stem.rpartition("-")[0] in JUNK for key in table["key"].to_pylist()]
    clusters = table[top].to_numpy()
    sizes = np.maximum(np.bincount(clusters), 1)
    return np.flatnonzero(np.bincount(clusters, is_junk) > sizes / 2).tolist()


def train(part: Part, judges: Judges, run: Path, steps: int, seed: int) -> None:
    """Train the small SwAV recipe on a part; what is trained already is left alone."""
    if run.is_dir() and status_of(run).state == COMPLETE:
        return
    data = [f"data.shards={part.shards}", f"data.eval_shards={judges.test}", f"evaluate.train_shards={judges.bank}"]
    data += [f"data.subset={part.subset}"] if part.subset else []
    warmup = WARMUP * 64 / len(part.keys())
    schedule = [f"train.steps={steps}", f"optim.warmup_epochs={warmup}", f"run.seed={seed}", f"run.dir={run}"]
    less = ["evaluate.online_every=0", "checkpoint.every_steps=0", "parallel.strategy=ddp"]
    command("largescale", "pretrain", "configs/small/swav.yaml", *data, *schedule, *less)


def prepare(folder: Path, judges: Judges, seed: int, options: argparse.Namespace) -> dict[str, Part]:
    """Make the pile and its parts."""
    if not (folder / "shards" / "manifest.json").is_file():
        make_pile(SAMPLE, folder / "images", seed)
    whole, cleaned = Part(folder / "shards"), Part(folder / "cleaned")
    convert(folder / "images", whole.shards, "--duplicates", "keep")
    convert(folder / "images", cleaned.shards, "--no-blank", "--duplicates", "near", "--radius", options.radius)
    first = folder / f"run-{PILE}"
    train(whole, judges, first, options.steps, seed)
    features = ["--dim", options.dim, "--whiten", options.whiten]
    command("largescale", "features", first, cleaned.shards, folder / "features", *features)
    wanted = ["--levels", options.levels, "--target", options.target, "--dedup", options.dedup]
    command("largescale", "curate", folder / "features", folder / "curated", *wanted)
    curated = Part(cleaned.shards, folder / "curated" / "subset.npy")
    without = ",".join(map(str, junk_clusters(folder / "curated")))
    wanted += ["--without", without] if without else []
    command("largescale", "curate", folder / "features", folder / "looked-at", *wanted)
    looked_at = Part(cleaned.shards, folder / "looked-at" / "subset.npy")
    size, keys = len(curated.keys()), whole.keys()
    draws = np.random.default_rng(seed).choice(len(keys), size, replace=False)
    np.save(folder / "random.npy", np.sort(draws))
    np.save(folder / "labels.npy", chosen_by_labels(keys, size))
    random, by_labels = Part(whole.shards, folder / "random.npy"), Part(whole.shards, folder / "labels.npy")
    return dict(zip(SETS, (whole, random, curated, looked_at, by_labels), strict=True))


def make_judges(folder: Path, *, choose: bool) -> Judges:
    """Shards of the last training images of each class as the bank, and of those before them or the test images."""
    parts = {"bank": slice(-OF_BANK, None), "others": slice(-2 * OF_BANK, -OF_BANK)}
    for name, part in parts.items():
        for source in sorted(SAMPLE.iterdir()):
            images = folder / name / "images" / source.name
            images.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[part]:
                shutil.copy(file, images)
        convert(folder / name / "images", folder / name / "shards", "--labels", "folder")
    return Judges(folder / "bank" / "shards", folder / "others" / "shards" if choose else TEST)


def measure(runs: Sequence[Path]) -> list[dict[str, float]]:
    """Of each run, in percent."""
    found: list[dict[str, float]] = [{} for _ in runs]
    for protocol, name in MEASURES.items():
        command("largescale", "evaluate", protocol, *runs, "evaluate.baselines=false")
        for run, its in zip(runs, found, strict=True):
            results = json.loads((run / "eval" / f"{protocol}.json").read_text())["results"]
            its[protocol] = 100 * results["pretrained"][name]
    return found


def differences(record: dict[str, Any], better: str, other: str, protocol: str) -> list[float]:
    """Of two sets, for each seed."""
    values = {(row["set"], row["seed"]): row[protocol] for row in record["rows"]}
    return [values[better, seed] - values[other, seed] for seed in record["seeds"]]


def told(values: Sequence[float]) -> str:
    """Numbers, their mean, and their standard deviation."""
    spread = f": **{statistics.mean(values):+.2f} ± {statistics.stdev(values):.2f}**" if values[1:] else ""
    return ", ".join(f"{value:+.2f}" for value in values) + spread


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    words = {"knn": "kNN", "linear": "linear", "retrieval": "retrieval, mAP"}
    lines = [
        "# A pile, a random part of it, and a curated part",
        "",
        f"{record['date']}, {record['hardware']}.",
        f"`{record['command']}`",
        "",
        f"Equally many images seen ({record['images_seen']:,}), equal starts, seeds: "
        f"{', '.join(map(str, record['seeds']))}. Percent on 2,000 balanced {record['judged_on']}; after ±, the "
        f"standard deviation over seeds.",
        "",
        f"| trained on | images | {' | '.join(words.values())} |",
        "|---|---|---|---|---|",
    ]
    for name in record["sets"]:
        own = [row for row in record["rows"] if row["set"] == name]
        cells = []
        for protocol in MEASURES:
            values = [row[protocol] for row in own]
            spread = f" ± {statistics.stdev(values):.2f}" if values[1:] else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        images = statistics.mean(sum(record["kinds"][str(seed)][name].values()) for seed in record["seeds"])
        lines.append(f"| {name} | {images:,.0f} | {' | '.join(cells)} |")
    lines += ["", "Differences in points, of each seed, and their mean ± standard deviation.", ""]
    lines += [f"| | {' | '.join(words.values())} |", "|---|---|---|---|"]
    for better in (name for name in (CURATED, LOOKED_AT) if name in record["sets"]):
        for other in (PILE, RANDOM):
            cells = [told(differences(record, better, other, protocol)) for protocol in MEASURES]
            lines.append(f"| {better}, less the {other} | {' | '.join(cells)} |")
    of = list(record["kinds"][str(record["seeds"][0])][PILE])
    lines += ["", "Images of each kind:", "", f"| seed | set | {' | '.join(of)} |", f"|{'---|' * (2 + len(of))}"]
    for seed in record["seeds"]:
        for name, own in record["kinds"][str(seed)].items():
            lines.append(f"| {seed} | {name} | {' | '.join(str(own.get(k, 0)) for k in of)} |")
    return "\n".join([*lines, ""])


def write(record: dict[str, Any], out: Path) -> None:
    """Write the record and its page; what was written by hand below the mark stays."""
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    read = out.read_text().partition(MARK)[2] if out.is_file() else "\n"
    out.write_text(f"{page(record)}\n{MARK}{read}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--target", type=int, default=1000)
    parser.add_argument("--labels", action="store_true", help="train on a part chosen by labels, too")
    parser.add_argument("--choose", action="store_true", help="measure on training images, to choose settings")
    parser.add_argument("--radius", type=int, default=1, help="of hashes of near copies, in bits")
    parser.add_argument("--levels", default="200,20")
    parser.add_argument("--dedup", type=float, default=0.002, help="epsilon of duplicates")
    parser.add_argument("--dim", type=int, default=32, help="principal components that are curated")
    parser.add_argument("--whiten", type=float, default=0.0, help="how much, from 0 to 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, help="to work in (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "curated.md")
    options = parser.parse_args()
    if not SAMPLE.is_dir() or not TEST.is_dir():
        subprocess.run(["make", str(TEST.relative_to(ROOT) / "manifest.json")], check=True, cwd=ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    sets = [name for name in SETS if name != LABELS or options.labels]
    record: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "hardware": hardware("cpu"),
        "command": f"python -m benchmarks.curated {' '.join(sys.argv[1:])}".strip(),
        "images_seen": options.steps * 64,
        "judged_on": "training images" if options.choose else "test images",
        "sets": sets,
        "seeds": [],
        "kinds": {},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        place = (options.folder or Path(temporary)).absolute()
        judges = make_judges(place, choose=options.choose)
        for seed in options.seeds:
            folder = place / f"pile-{seed}"
            parts = prepare(folder, judges, seed, options)
            record["kinds"][str(seed)] = {name: part.kinds() for name, part in parts.items()}
            print(json.dumps(record["kinds"][str(seed)]), flush=True)
            runs = [folder / f"run-{name.replace(' ', '-')}" for name in sets]
            each = [(parts[name], judges, run, options.steps, seed) for name, run in zip(sets, runs, strict=True)]
            list(pool.map(train, *zip(*each, strict=True)))
            for name, found in zip(sets, measure(runs), strict=True):
                record["rows"].append({"set": name, "seed": seed, **found})
                print(record["rows"][-1], flush=True)
            record["seeds"].append(seed)
            write(record, options.out)


if __name__ == "__main__":
    main()
