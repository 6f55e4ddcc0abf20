"""Few labels at the demo's size: PAWS and SimCLRv2 against training from scratch and against frozen SwAV features.

    python -m benchmarks.few_labels [--shares 0.01 0.1] [--seeds 0 1 2] [--rows NAME ...] [--tries K]

All rows of a share and seed use the labels of the same images, the split of that seed of `evaluate low-shot`. Learning
rates of whatever trains a classifier are chosen by its mean over seeds on `HELD_OUT` training images that no split has;
the test images choose nothing. Networks are those of configs/small. Runs and classifiers stay in runs/bench-few_labels,
so that what is trained is not trained again. Needs the shards of `make pretrain`. Writes benchmarks/results/
few_labels.json and few_labels.md; what was written below the tables by hand, after `<!-- read -->`, is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import largescale
import shards
from benchmarks.accuracies import RESULTS, ROOT
from benchmarks.few_labels_page import OUT, chosen, found_before, page
from largescale.config import load_config
from largescale.data.corpora import Corpus
from largescale.data.few_labels import by_hash
from largescale.data.reader import ShardReader
from largescale.evaluate import low_shot_finetune
from largescale.evaluate.extract import extract, load_method
from largescale.evaluate.finetuned import finetune
from largescale.evaluate.image_training import Trial, accuracies, labelled
from largescale.evaluate.splits import stratified
from largescale.models.image_classifier import ImageClassifier, read_classifier
from largescale.run.environment import environment
from shards.format.manifest import read_manifest
from shards.ground.files import atomic_write

RUNS = ROOT / "runs" / "bench-few_labels"
TRAIN, TEST = ROOT / "data/shards/fashion-mnist-train", ROOT / "data/shards/fashion-mnist-test"
HELD_OUT, SEEDS, MOST = 2_000, (0, 1, 2), 0.1
"""Images that rates are chosen on; seeds, whose splits have none of them; the largest share of a split."""
EPOCHS, BATCH = {0.1: 20, 0.01: 50}, 64
"""Of fine-tuning by the share of labels."""
LONGER = 2
"""Training from scratch gets so many times the epochs, since it starts from nothing."""
RATES = ([0.03, 0.03], [0.1, 0.1], [0.3, 0.3])
"""Of trunk and classifier per 256 images, to fine-tune with."""
SCRATCH_RATES = ([1.0, 1.0], [0.4, 0.4], [0.1, 0.1])
VIEWS = {"crop_scale": [0.8, 1.0], "flip": 0}
"""That labels are learnt on: those of pretraining, without its other changes."""
STUDENT_CROPS = "{num: 1, size: 28, scale: [0.8, 1.0]}"
"""Those that the teacher has learnt on, since it knows less about smaller ones."""
HEAD, LAYERS, TEMPERATURE = 256, 1, 0.2
"""Width of SimCLRv2's two hidden layers, how many of them fine-tuning keeps, and the temperature: of 0.1, 0.2 and the
0.5 of configs/small, the best on held-out images by a linear probe of the labels of seed 0."""
HALF = 0.5
"""Of all widths: a network of a quarter of the weights."""
RECIPE = 2
"""Of fine-tuning and students; to be raised with their settings, so that nothing older passes for new."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Which labels, and which random numbers a run begins with.

    Attributes:
        share: of the training images whose labels are used.
        seed: of the run and of the split.
        rates: of trunk and classifier, where a classifier is trained.
    """

    share: float
    seed: int
    rates: Sequence[float] = field(default_factory=tuple)


def pretrained(name: str, folder: str, case: Case, *overrides: str, command: Sequence[str] = ("pretrain",)) -> Path:
    """A run of a recipe of configs/small: its folder, complete."""
    place = RUNS / f"{folder}-seed{case.seed}"
    words = [
        f"run.dir={place}",
        f"run.seed={case.seed}",
        "evaluate.online_every=0",
        "parallel.strategy=ddp",
        *overrides,
    ]
    recipe = f"configs/small/{name}.yaml"
    subprocess.run([sys.executable, "-m", "largescale", *command, recipe, *words], cwd=ROOT, check=True)
    return place


def paws(case: Case) -> Path:
    """PAWS, trained with these labels."""
    words = [f"method.support.share={case.share:g}", f"method.support.seed={case.seed}"]
    return pretrained("paws", f"paws-{100 * case.share:g}", case, *words)


def swav(case: Case) -> Path:
    """SwAV, which needs no labels."""
    return pretrained("swav", "swav", case)


def simclr(case: Case, times: float = 1) -> Path:
    """SimCLR with a head of three layers, which needs no labels: SimCLRv2's first step.

    Args:
        case: of which the seed counts.
        times: all widths are so many times those of configs/small.
    """
    hidden = round(HEAD * times)
    words = [*widths(times), f"method.hidden=[{hidden},{hidden}]", f"method.temperature={TEMPERATURE}"]
    return pretrained("simclr", f"simclr-x{times:g}", case, *words)


def distilled(case: Case, times: float = 1) -> Path:
    """SimCLRv2's third step, on all images: a student of so many times the widths of the teacher."""
    teacher = tuned(simclr(case), case, LAYERS)
    folder = f"distilled-{100 * case.share:g}-x{times:g}-{name_of(case.rates)}-recipe{RECIPE}"
    words = [*widths(times), f"method.hidden=[{round(HEAD * times)}]", f"data.crops=[{STUDENT_CROPS}]"]
    return pretrained("distillation", folder, case, *words, command=("distill", str(teacher)))


def widths(times: float) -> list[str]:
    """The width of a network that is narrower than that of configs/small."""
    width = load_config(ROOT / "configs/small/simclr.yaml").model.width
    return [] if times == 1 else [f"model.width={round(width * times)}"]


def name_of(rates: Sequence[float]) -> str:
    """Rates in the name of a file."""
    return "-".join(f"{rate:g}" for rate in rates)


def on_both(protocol: str, run: Path, value: Callable[[dict[str, Any]], float], *overrides: str) -> list[float]:
    """What a protocol finds of a run on held-out training images and on test images."""
    words = [f"evaluate.{word}" for word in ("baselines=false", *overrides)]
    found = []
    for folder in (held_out(), TEST):
        [record] = largescale.evaluate(protocol, run, overrides=[*words, f"data.eval_shards={folder}"])
        found.append(value(record["results"]["pretrained"]))
    return found


def linear(run: Path, case: Case) -> list[float]:
    """Logistic regression on frozen features, on the labels of the case."""
    words = [f"low_shot_shares=[{case.share:g}]", f"low_shot_splits={case.seed + 1}"]
    return on_both("low-shot", run, lambda found: found["by_share"][f"{case.share:g}"]["splits"][case.seed], *words)


def neighbours(run: Path, case: Case) -> list[float]:
    """Soft nearest neighbours among the labels that the run was trained with."""
    words = [f"support_neighbours_shares=[{case.share:g}]", "support_neighbours_splits=1"]
    return on_both("support-neighbours", run, lambda found: found["top1"], *words)


def own_answers(run: Path) -> list[float]:
    """Of the classifier that the run has trained."""
    return on_both("own-classifier", run, lambda found: found["top1"])


def fine_tuned(run: Path, case: Case, layers: int = 0) -> list[float]:
    """The whole network trained on the labels of the case."""
    return scores(read_classifier(tuned(run, case, layers)).load())


def tuned(run: Path, case: Case, layers: int = 0) -> Path:
    """The file of that network."""
    out = run / f"classifier-{100 * case.share:g}-{name_of(case.rates)}-recipe{RECIPE}.safetensors"
    if not out.is_file():
        words = [f"evaluate.{word}" for word in finetuning(case, EPOCHS[case.share], layers)]
        words.append("evaluate.low_shot_finetune_linear_first=true")
        finetune(run, out, overrides=[*words, f"data.eval_shards={held_out()}"])
    return out


def finetuning(case: Case, epochs: int, layers: int = 0) -> list[str]:
    """Settings of `low-shot-finetune`."""
    of_case = {"share": case.share, "split": case.seed, "rates": [*case.rates]}
    values = {**of_case, "epochs": epochs, "batch": BATCH, "head_layers": layers, **VIEWS}
    return [f"low_shot_finetune_{key}={value}" for key, value in values.items()]


def from_scratch(case: Case) -> list[float]:
    """The same training of a network that is not trained yet."""
    words = [f"evaluate.{word}" for word in finetuning(case, LONGER * EPOCHS[case.share])]
    config = load_config(
        ROOT / "configs/small/paws.yaml", [f"run.seed={case.seed}", f"run.dir={RUNS / 'scratch'}", *words]
    )
    train, test = (Corpus(read_manifest(str(place))) for place in (TRAIN, held_out()))
    kept: list[ImageClassifier] = []
    method = load_method(config, None)
    trial = Trial(config, method, train, test, str(TRAIN), RUNS / "splits", CPU, keep=kept.append)
    assert isinstance(config.evaluate, low_shot_finetune.Settings)
    low_shot_finetune.measure(trial, config.evaluate)
    return scores(kept[0].eval())


def scores(network: ImageClassifier) -> list[float]:
    """Top-1 on held-out training images and on test images."""
    config = load_config(ROOT / "configs/small/paws.yaml")
    return [
        accuracies(extract(Corpus(read_manifest(str(folder))), config, {"it": network}, CPU)["it"])["top1"]
        for folder in (held_out(), TEST)
    ]


def held_out() -> Path:
    """Shards of the training images that rates are chosen on: `HELD_OUT` of those that no split has."""
    folder = RUNS / "held-out"
    if not (folder / "manifest.json").is_file():
        corpus = Corpus(read_manifest(str(TRAIN)))
        known = labelled(corpus)
        used = [known.ids[stratified(known.ids, known.labels, MOST, seed)] for seed in SEEDS]
        free = np.setdiff1d(known.ids.numpy(), torch.cat(used).numpy())
        reader, classes = ShardReader([corpus]), corpus.manifest.classes
        labels = dict(zip(known.ids.tolist(), known.labels.tolist(), strict=True))
        for one in free[by_hash(free, 0, 0)[:HELD_OUT]].tolist():
            place = RUNS / "held-out-images" / classes[labels[one]] / f"{one:05d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(reader.read(one).payload)
        shards.convert(RUNS / "held-out-images", folder, labels="folder", workers=1, force=True)
    return folder


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measure: top-1 on held-out training images and on test images, shares.
        rates: that are tried, where a classifier is trained by learning rates.
        teacher: the row whose rates are taken instead; empty for none.
    """

    measure: Callable[[Case], list[float]]
    rates: Sequence[Sequence[float]] = ()
    teacher: str = ""


TEACHER = "SimCLRv2, fine-tuned from layer 1"
ROWS: dict[str, Row] = {
    "supervised, from scratch": Row(from_scratch, SCRATCH_RATES),
    "SwAV, linear on frozen features": Row(lambda case: linear(swav(case), case)),
    "SwAV, fine-tuned": Row(lambda case: fine_tuned(swav(case), case), RATES),
    "PAWS, nearest neighbours": Row(lambda case: neighbours(paws(case), case)),
    "PAWS, linear on frozen features": Row(lambda case: linear(paws(case), case)),
    "PAWS, fine-tuned": Row(lambda case: fine_tuned(paws(case), case), RATES),
    "SimCLRv2, linear on frozen features": Row(lambda case: linear(simclr(case), case)),
    TEACHER: Row(lambda case: fine_tuned(simclr(case), case, LAYERS), RATES),
    "SimCLRv2, distilled to its own size": Row(lambda case: own_answers(distilled(case)), teacher=TEACHER),
    "SimCLRv2, distilled to a quarter": Row(lambda case: own_answers(distilled(case, HALF)), teacher=TEACHER),
    "a quarter, fine-tuned from layer 1": Row(lambda case: fine_tuned(simclr(case, HALF), case, LAYERS), RATES),
}
"""By name; another method is a line."""


def tries(name: str, case: Case, num: int) -> list[Case]:
    """What to measure of a row: all rates. A student has the teacher whose rates are best on held-out images."""
    row = ROWS[name]
    if not (row.rates or row.teacher):
        return [case]
    if row.rates:
        return [Case(case.share, case.seed, rates) for rates in row.rates[:num]]
    known = [found for found in found_before() if (found["row"], found["share"]) == (row.teacher, case.share)]
    if {found["seed"] for found in known} != set(SEEDS):
        raise SystemExit(f"{name}: measure {row.teacher} first, with all seeds, which chooses its rates")
    return [Case(case.share, case.seed, chosen(known))]


def measure(name: str, case: Case) -> None:
    """Measure a row, unless that was done before, and write the page again."""
    key = {"row": name, "share": case.share, "seed": case.seed, "rates": [*case.rates], "recipe": RECIPE}
    if any(key.items() <= old.items() for old in found_before()):
        return
    began = os.times()
    held, test = ROWS[name].measure(case)
    about = environment()
    machine = f"{about['processor']}, {about['cpu_cores']} cores, torch {about['torch']}"
    row = {**key, "held_out": 100 * held, "test": 100 * test, "machine": machine, "cpu_s": spent(began)}
    found = [*found_before(), row]
    with atomic_write(OUT.with_suffix(".json")) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    OUT.write_text(page(found, list(ROWS)))
    print(f"{name}, {100 * case.share:g}%, seed {case.seed}, {case.rates}: {row['held_out']:.2f}, {row['test']:.2f}")


def spent(began: os.times_result) -> float:
    """Seconds of CPU time of this process and of those that it ran, since then."""
    now = os.times()
    return sum(now[:4]) - sum(began[:4])


def main() -> None:
    """Measure the rows asked for; write the page of these and of what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--tries", type=int, default=len(SCRATCH_RATES), help="rates that are tried")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for share in arguments.shares:
        for name in arguments.rows:
            for seed in arguments.seeds:
                for case in tries(name, Case(share, seed), arguments.tries):
                    measure(name, case)


if __name__ == "__main__":
    main()
