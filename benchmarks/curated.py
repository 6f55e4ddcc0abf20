"""A pile that nobody sorted, made from the bundled images: training on all of it, on a random part, on a curated part.

    python -m benchmarks.curated [--steps 800] [--first 200] [--target 4000] [--protocols knn linear] [--seeds 0]

The pile: classes of the bundled training images with sizes that fall as 1 / rank; for every image of the three largest
classes two near copies (cropped by a pixel, encoded again as JPEG); 500 images of noise or of one grey. A network is
trained on it for `--first` steps, its features are curated, and the demo's recipe is trained for `--steps` on each of
the three sets: equally many images seen. Accuracies are those on the bundled test images, with all bundled training
images as the bank. Writes benchmarks/results/curated.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gram import hardware

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TRAIN, TEST = ROOT / "data" / "shards" / "fashion-mnist-train", ROOT / "data" / "shards" / "fashion-mnist-test"
COPIED, COPIES, JUNK = 3, 2, 500


def pile(source: Path, out: Path) -> dict[str, int]:
    """Write the pile as one folder of images; returns the images of each kind."""
    out.mkdir(parents=True)
    generator, counts = np.random.default_rng(0), {}
    for rank, folder in enumerate(sorted(source.iterdir())):
        files = sorted(folder.iterdir())
        chosen = files[: max(10, len(files) // (rank + 1))]
        counts[folder.name] = len(chosen)
        for file in chosen:
            image = Image.open(file)
            image.save(out / f"{folder.name}-{file.stem}.png")
            for number in range(COPIES if rank < COPIED else 0):
                left, top = generator.integers(0, 2, 2)
                part = image.crop((left, top, left + image.width - 1, top + image.height - 1)).resize(image.size)
                part.convert("L").save(out / f"{folder.name}-{file.stem}-{number}.jpg", quality=70)
                counts["copies"] = counts.get("copies", 0) + 1
    for number in range(JUNK):
        noise = generator.integers(0, 256, (28, 28)) if number % 2 else np.full((28, 28), number % 256)
        Image.fromarray(noise.astype(np.uint8)).save(out / f"junk-{number:04d}.png")
    return counts | {"junk": JUNK}


def command(*words: object) -> None:
    """Run one of this project's commands."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def trained(folder: Path, name: str, steps: int, seed: int, *more: str) -> Path:
    """The folder of a run on the pile."""
    run = folder / f"{name}-{seed}"
    data = [f"data.shards={folder / 'shards'}", f"data.eval_shards={TEST}", f"evaluate.train_shards={TRAIN}"]
    schedule = [f"train.steps={steps}", f"run.seed={seed}", f"run.dir={run}"]
    command("largescale", "pretrain", "configs/demo.yaml", *data, *schedule, *more)
    return run


def accuracies(run: Path, protocols: list[str]) -> Iterator[str]:
    """Top-1 in percent by each protocol."""
    for protocol in protocols:
        command("largescale", "evaluate", protocol, run)
        results = json.loads((run / "eval" / f"{protocol}.json").read_text())["results"]
        yield f"{100 * results['pretrained']['top1']:.1f}"


def measure(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Lines of the page."""
    counts = pile(ROOT / "data" / "fashion-mnist" / "train", folder / "images")
    yield ", ".join(f"{name} {count:,}" for name, count in counts.items()) + "."
    command("shards", "convert", folder / "images", folder / "shards", "--shuffle", 0, "--samples-per-shard", 1000)
    first = trained(folder, "first", options.first, 0)
    command("largescale", "features", first, folder / "shards", folder / "features")
    wanted = ["--levels", "1000,100,20", "--target", options.target, "--dedup-fraction", options.fraction]
    command("largescale", "curate", folder / "features", folder / "curated", *wanted)
    curated = folder / "curated" / "subset.npy"
    record = json.loads((folder / "curated" / "curation.json").read_text())
    chosen = np.random.default_rng(1).choice(record["num_images"], len(np.load(curated)), replace=False)
    np.save(folder / "random.npy", np.sort(chosen))
    heads = ["trained on", "images", "seed", *options.protocols]
    yield from ["", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    subsets = {"the pile": None, "a random part": folder / "random.npy", "the curated part": curated}
    for seed in options.seeds:
        for name, subset in subsets.items():
            more = [f"data.subset={subset}"] if subset else []
            found = accuracies(trained(folder, name.replace(" ", "-"), options.steps, seed, *more), options.protocols)
            images = len(np.load(subset)) if subset else record["num_images"]
            yield f"| {name} | {images:,} | {seed} | {' | '.join(found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--first", type=int, default=200)
    parser.add_argument("--target", type=int, default=4000)
    parser.add_argument("--fraction", type=float, default=0.4, help="of the pile to drop as duplicates")
    parser.add_argument("--protocols", nargs="+", default=["knn", "linear"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "curated.md")
    options = parser.parse_args()
    for part in (TRAIN, TEST):
        subprocess.run(["make", str(part.relative_to(ROOT) / "manifest.json")], check=True, cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            "# A pile, a random part of it, and a curated part",
            "",
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {hardware('cpu')}.",
            f"`python -m benchmarks.curated {' '.join(sys.argv[1:])}`".replace(" `", "`"),
            "",
        ]
        for line in measure(Path(folder), options):
            print(line, flush=True)
            lines.append(line)
    options.out.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
