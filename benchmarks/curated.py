"""A pile that nobody sorted, made from the bundled images: training on all of it, on a random part, on a curated part.

    python -m benchmarks.curated [--steps 400] [--first 300] [--target 1500] [--seeds 0 1 2] [--folder runs/curated]

The pile of a seed: classes of the bundled training images, in an order that the seed draws, with sizes that fall as
1 / rank; for every image of the three largest classes two near copies (cropped by a pixel, encoded again as JPEG); 500
images of noise or of one grey. A network is trained on it for `--first` steps, its features are curated, and the demo's
recipe is trained for `--steps` on each of the three sets, from equal starts: equally many images seen. Measured on the
bundled test images, which are balanced: kNN and a linear probe with all bundled training images as the bank, and
retrieval among the test images.

With `--folder` what is made stays there, and the same command goes on after it was killed. Writes
benchmarks/results/curated.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.gram import hardware

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SAMPLE = ROOT / "data" / "fashion-mnist" / "train"
TRAIN, TEST = ROOT / "data" / "shards" / "fashion-mnist-train", ROOT / "data" / "shards" / "fashion-mnist-test"
COPIED, COPIES, JUNK = 3, 2, 500
MEASURES = {"knn": "top1", "linear": "top1", "retrieval": "map"}
SETS = ("pile", "random part", "curated part")


def pile(source: Path, out: Path, seed: int) -> None:
    """Write the pile as one folder of images: CLASS-NUMBER, CLASS-NUMBER-copyN, noise-N and grey-N."""
    out.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    classes = sorted(source.iterdir())
    for rank, place in enumerate(generator.permutation(len(classes)).tolist()):
        folder = classes[place]
        files = sorted(folder.iterdir())
        for file in files[: max(10, len(files) // (rank + 1))]:
            image = Image.open(file)
            image.save(out / f"{folder.name}-{file.stem}.png")
            for number in range(COPIES if rank < COPIED else 0):
                left, top = generator.integers(0, 2, 2)
                part = image.crop((left, top, left + image.width - 1, top + image.height - 1)).resize(image.size)
                part.convert("L").save(out / f"{folder.name}-{file.stem}-copy{number}.jpg", quality=70)
    for number in range(JUNK):
        noise = generator.integers(0, 256, (28, 28)) if number % 2 else np.full((28, 28), number % 256)
        name = "noise" if number % 2 else "grey"
        Image.fromarray(noise.astype(np.uint8)).save(out / f"{name}-{number:04d}.png")


def command(*words: object) -> None:
    """Run one of this project's commands."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train(folder: Path, run: Path, steps: int, seed: int, subset: Path | None = None) -> None:
    """Train the demo's recipe on the pile or a part of it; what is trained already is left alone."""
    data = [f"data.shards={folder / 'shards'}", f"data.eval_shards={TEST}", f"evaluate.train_shards={TRAIN}"]
    data += [f"data.subset={subset}"] if subset else []
    schedule = [f"train.steps={steps}", f"run.seed={seed}", f"run.dir={run}"]
    less = ["evaluate.online_every=0", "checkpoint.every_steps=0", "parallel.strategy=ddp"]
    command("largescale", "pretrain", "configs/demo.yaml", *data, *schedule, *less)


def prepare(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Path | None]:
    """Make the pile and its parts; returns the subset of each set."""
    if not (folder / "shards" / "manifest.json").is_file():
        pile(SAMPLE, folder / "images", seed)
        command("shards", "convert", folder / "images", folder / "shards", "--shuffle", 0, "--samples-per-shard", 1000)
    train(folder, folder / "first", options.first, seed)
    command("largescale", "features", folder / "first", folder / "shards", folder / "features", "--dim", options.dim)
    wanted = ["--levels", options.levels, "--target", options.target, "--dedup", options.dedup]
    command("largescale", "curate", folder / "features", folder / "curated", *wanted)
    curated = folder / "curated" / "subset.npy"
    num = json.loads((folder / "curated" / "curation.json").read_text())["num_images"]
    np.save(
        folder / "random.npy", np.sort(np.random.default_rng(seed).choice(num, len(np.load(curated)), replace=False))
    )
    return dict(zip(SETS, (None, folder / "random.npy", curated), strict=True))


def kinds(folder: Path, subset: Path | None) -> dict[str, int]:
    """Images of each class, copies of any, and junk, in a set."""
    tables = [
        pq.read_table(path, columns=["key"]) for path in sorted((folder / "curated" / "images").glob("*.parquet"))
    ]
    keys = [Path(key).name for table in tables for key in table["key"].to_pylist()]
    chosen = [keys[number] for number in np.load(subset).tolist()] if subset else keys
    return dict(sorted(Counter("copies" if "-copy" in key else key.rpartition("-")[0] for key in chosen).items()))


def measure(runs: Sequence[Path]) -> list[dict[str, float]]:
    """Of each run, in percent."""
    found: list[dict[str, float]] = [{} for _ in runs]
    for protocol, name in MEASURES.items():
        command("largescale", "evaluate", protocol, *runs, "evaluate.baselines=false")
        for run, its in zip(runs, found, strict=True):
            results = json.loads((run / "eval" / f"{protocol}.json").read_text())["results"]
            its[protocol] = 100 * results["pretrained"][name]
    return found


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
        f"{', '.join(map(str, record['seeds']))}. Percent on 2,000 balanced test images; after ±, the standard "
        f"deviation over seeds.",
        "",
        f"| trained on | images | {' | '.join(words.values())} |",
        "|---|---|---|---|---|",
    ]
    for name in SETS:
        own = [row for row in record["rows"] if row["set"] == name]
        cells = []
        for protocol in MEASURES:
            values = [row[protocol] for row in own]
            spread = f" ± {statistics.stdev(values):.2f}" if values[1:] else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        images = statistics.mean(sum(record["kinds"][str(seed)][name].values()) for seed in record["seeds"])
        lines.append(f"| {name} | {images:,.0f} | {' | '.join(cells)} |")
    lines += ["", "Each pile: curated less the pile, and less the random part, in points.", ""]
    lines += [f"| seed | {' | '.join(words.values())} |", "|---|---|---|---|"]
    for seed in record["seeds"]:
        its = {row["set"]: row for row in record["rows"] if row["seed"] == seed}
        gains = [[its[SETS[2]][protocol] - its[other][protocol] for other in SETS[:2]] for protocol in MEASURES]
        lines.append(f"| {seed} | {' | '.join(f'{one:+.2f}, {two:+.2f}' for one, two in gains)} |")
    of = list(record["kinds"][str(record["seeds"][0])][SETS[0]])
    lines += ["", "Images of each kind:", "", f"| seed | set | {' | '.join(of)} |", f"|{'---|' * (2 + len(of))}"]
    for seed in record["seeds"]:
        for name, own in record["kinds"][str(seed)].items():
            lines.append(f"| {seed} | {name} | {' | '.join(str(own.get(k, 0)) for k in of)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--first", type=int, default=300)
    parser.add_argument("--target", type=int, default=1500)
    parser.add_argument("--levels", default="1000,100,20")
    parser.add_argument("--dedup", type=float, default=0.002, help="epsilon of duplicates")
    parser.add_argument("--dim", type=int, default=32, help="principal components that are curated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, help="to work in (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "curated.md")
    options = parser.parse_args()
    for part in (TRAIN, TEST):
        subprocess.run(["make", str(part.relative_to(ROOT) / "manifest.json")], check=True, cwd=ROOT)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    record: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "hardware": hardware("cpu"),
        "command": f"python -m benchmarks.curated {' '.join(sys.argv[1:])}".strip(),
        "images_seen": options.steps * 64,
        "seeds": [],
        "kinds": {},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        for seed in options.seeds:
            folder = (options.folder or Path(temporary)).absolute() / f"pile-{seed}"
            subsets = prepare(folder, seed, options)
            record["kinds"][str(seed)] = {name: kinds(folder, subset) for name, subset in subsets.items()}
            print(json.dumps(record["kinds"][str(seed)]), flush=True)
            runs = [folder / name.split()[0] for name in SETS]
            each = [
                (folder, run, options.steps, seed, subset) for run, subset in zip(runs, subsets.values(), strict=True)
            ]
            list(pool.map(train, *zip(*each, strict=True)))
            for name, found in zip(SETS, measure(runs), strict=True):
                record["rows"].append({"set": name, "seed": seed, **found})
                print(record["rows"][-1], flush=True)
            record["seeds"].append(seed)
            options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            options.out.write_text(page(record))


if __name__ == "__main__":
    main()
