"""`report.html`: one self-contained page that shows what a run did and learned.

It is made from the run's files alone, so it can be made while the run still goes on; what is not there yet is said in
a sentence.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.manifold import TSNE

from largescale.config import Config, corpus_names, load_config, prototype_counts
from largescale.data.corpora import open_corpus
from largescale.data.reader import ShardReader
from largescale.evaluate.feature_set import FeatureSet
from largescale.observe import gallery, plots
from largescale.observe.collapse import Signs, warning
from largescale.observe.console import format_seconds
from largescale.observe.metrics import METRICS, read_lines
from shards.errors import InputError
from shards.files import atomic_write

_NAMES = {"pretrained": "pretrained", "untrained": "untrained", "pixels": "raw pixels"}
_PROTOCOLS = {"knn": "kNN", "linear": "linear"}
_MAP_POINTS = 2000


@dataclass(frozen=True)
class _Run:
    """The files of a run, read."""

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    environment: dict[str, Any]


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html.

    Returns:
        Its path.

    Raises:
        InputError: not the folder of a run.
    """
    run = _read(run_dir)
    sections = [_training(run), _accuracy(run), _neighbours(run), _prototypes(run), _map(run), _settings(run)]
    style = Path(__file__).with_name("report.css").read_text()
    title = html.escape(run.config.name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} · report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{_headline(run)}{''.join(sections)}</main></body></html>\n"
    )
    path = run_dir / "report.html"
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def _read(run_dir: Path) -> _Run:
    metrics = run_dir / METRICS
    evaluations = {}
    for protocol in _PROTOCOLS:
        path = run_dir / "eval" / f"{protocol}.json"
        if path.is_file():
            evaluations[protocol] = json.loads(path.read_text())
    environment = run_dir / "environment.json"
    return _Run(
        run_dir, load_config(run_dir / "config.yaml"), read_lines(metrics) if metrics.is_file() else [], evaluations,
        json.loads(environment.read_text()) if environment.is_file() else {},
    )


def _headline(run: _Run) -> str:
    config = run.config
    if run.metrics:
        last = run.metrics[-1]
        done = f"{last['images_seen']:,} images seen in {last['step'] + 1:,} steps ({last['epoch']:.1f} epochs)"
    else:
        done = "nothing logged yet"
    sentence = (
        f"{config.method.name.upper().replace('SWAV', 'SwAV')} on {corpus_names(config.data)}: "
        f"{config.model.backbone}, {config.parallel.strategy}, {done}, without labels."
    )
    tiles = "".join(_tile(_PROTOCOLS[protocol], record["results"]) for protocol, record in run.evaluations.items())
    notes = "".join(f'<div class="note">{html.escape(note)}</div>' for note in _notes(run))
    tiles = f'<div class="tiles">{tiles}</div>' if tiles else ""
    return f"<header><h1>{html.escape(config.name)}</h1><p>{html.escape(sentence)}</p></header>{tiles}{notes}"


def _tile(protocol: str, results: dict[str, dict[str, Any]]) -> str:
    own = results["pretrained"]["top1"]
    versus = "".join(
        f'<div class="versus"><b{"" if own >= other["top1"] else " class=worse"}>'
        f"{100 * (own - other['top1']):+.1f} points</b> against {_NAMES[name]} ({100 * other['top1']:.1f} %)</div>"
        for name, other in results.items() if name != "pretrained"
    )
    return (
        f'<div class="tile"><div class="what">{protocol} top-1, frozen features</div>'
        f'<div class="value">{100 * own:.1f}<small> %</small></div>{versus}</div>'
    )


def _notes(run: _Run) -> list[str]:
    """What looks wrong, in plain words."""
    notes = []
    if run.metrics:
        last = run.metrics[-1]
        signs = Signs(last["loss_over_ln_k"], last["assignment_entropy"], last["prototype_usage"])
        if trouble := warning(signs, progress=1.0):
            notes.append(f"At the last logged step {trouble}.")
        if last["skipped_samples"]:
            notes.append(f"{last['skipped_samples']:,} images could not be read; {run.path.name}/skipped lists them.")
    for protocol, record in run.evaluations.items():
        results = record["results"]
        better = [name for name in results if results[name]["top1"] > results["pretrained"]["top1"]]
        notes += [f"{_PROTOCOLS[protocol]}: {_NAMES[name]} does better than the pretrained network." for name in better]
    return notes


def _training(run: _Run) -> str:
    if not run.metrics:
        return _section("Training", "", _missing("Nothing is logged yet; `largescale pretrain` writes it."))
    rows = run.metrics
    steps = [row["step"] for row in rows]

    def column(key: str, factor: float = 1.0) -> list[float]:
        return [row.get(key, math.nan) * factor for row in rows]

    ln_k = sum(math.log(k) for k in prototype_counts(run.config)) / len(prototype_counts(run.config))
    panels = [
        plots.curves("Loss", steps, {"loss": column("loss")}, references={"ln K (uniform predictions)": ln_k}),
        plots.curves("Learning rate", steps, {"learning rate": column("lr")}),
        plots.curves("Assignments", steps, {
            "entropy of a code / ln K": column("assignment_entropy"),
            "share of prototypes in use": column("prototype_usage"),
        }, ylim=(0, 1.05)),
        plots.curves("Gradient norm", steps, {"gradient norm": column("grad_norm")}),
        plots.curves("Images per second, all ranks", steps, {"images/s": column("images_per_s")}),
        plots.curves("Seconds per step", steps, {
            "whole step": column("step_s"), "waiting for data": column("data_wait_s"),
        }),
        plots.curves("Making an image's views, ms of one loader thread", steps, {
            "read and verify": column("read_ms"), "decode": column("decode_ms"), "crop": column("crop_ms"),
        }),
        plots.curves("Batches ready, and shards found in the cache", steps, {
            "batches ready besides the one taken": column("queue_depth"),
            **({"share of shards found": column("cache_hit_rate")} if "cache_hit_rate" in rows[-1] else {}),
        }),
    ]
    seconds = sum(row["step_s"] * (row["step"] - before) for row, before in
                  zip(rows, [-1, *steps[:-1]], strict=True))
    text = (
        f"{rows[-1]['images_seen'] / seconds:,.0f} images/s over {format_seconds(seconds)} of training on "
        f"{run.environment.get('world_size', '?')} ranks; {sum(column('data_wait_s')) / sum(column('step_s')):.0%} of "
        f"the time went into reading and augmenting."
    )
    return _section("Training", text, f'<div class="grid">{"".join(f"<div>{panel}</div>" for panel in panels)}</div>')


def _accuracy(run: _Run) -> str:
    if not run.evaluations:
        return _section("What it learned", "", _missing("Not measured yet; `largescale evaluate knn RUN` does it."))
    bars = plots.accuracy_bars({
        _PROTOCOLS[protocol]: {_NAMES[name]: result["top1"] for name, result in record["results"].items()}
        for protocol, record in run.evaluations.items()
    })
    record = next(iter(run.evaluations.values()))
    rows = []
    if "knn" in run.evaluations:
        for name, result in run.evaluations["knn"]["results"].items():
            rows += [(f"kNN, k = {k}", name, share) for k, share in result["top1_by_k"].items()]
    if "linear" in run.evaluations:
        for name, result in run.evaluations["linear"]["results"].items():
            rows.append((f"linear, learning rate {result['learning_rate']:g}", name, result["top1"]))
    table = "".join(
        f'<tr><td>{html.escape(what)}</td><td>{_NAMES[name]}</td><td class="number">{100 * share:.2f}</td></tr>'
        for what, name, share in rows
    )
    text = (
        f"Frozen features of the last checkpoint; {record['num_train']:,} labelled images as bank and training set, "
        f"{record['num_test']:,} others to test on. The probe's learning rate was chosen without the test images."
    )
    details = (
        f'<details><summary>All numbers</summary><table><tr><th>protocol</th><th>features</th>'
        f'<th class="number">top-1, %</th></tr>{table}</table></details>'
    )
    return _section("What it learned", text, f'<div class="grid"><div>{bars}</div><div>{details}</div></div>')


def _features(run: _Run, part: str) -> FeatureSet | None:
    path = run.path / "eval" / "features" / f"pretrained-{part}.safetensors"
    return FeatureSet.load(path) if path.is_file() else None


def _reader(location: object, config: Config) -> ShardReader | None:
    if not isinstance(location, str):
        return None
    try:
        return ShardReader([open_corpus(location, config.data)])
    except InputError:
        return None


def _neighbours(run: _Run) -> str:
    title = "Nearest neighbours"
    train, test = _features(run, "train"), _features(run, "test")
    config = run.config
    bank = _reader(config.evaluate.train_shards or config.data.shards, config)
    queries = _reader(config.data.eval_shards, config)
    if train is None or test is None or bank is None or queries is None:
        return _section(title, "", _missing("Needs `largescale evaluate knn RUN`, and the shards."))
    text = "Random test images (left) and the training images whose features are nearest. Green: same class."
    return _section(title, text, gallery.neighbours(train, test, bank, queries, config.run.seed))


def _prototypes(run: _Run) -> str:
    title = "What prototypes stand for"
    path = run.path / "eval" / "features" / "prototypes.safetensors"
    bank = _reader(run.config.evaluate.train_shards or run.config.data.shards, run.config)
    if not path.is_file() or bank is None:
        return _section(title, "", _missing("Needs `largescale evaluate knn RUN`, and the shards."))
    tensors = load_file(path)
    used = len(torch.unique(tensors["scores"].argmax(1)))
    text = (
        f"The images nearest to some prototypes, with their cosines. {used} of {tensors['scores'].shape[1]} prototypes "
        f"are nearest to at least one of {len(tensors['ids']):,} training images."
    )
    return _section(title, text, gallery.prototypes(tensors["scores"], tensors["ids"], bank, run.config.run.seed))


def _map(run: _Run) -> str:
    title = "Map of the features"
    test = _features(run, "test")
    if test is None or len(test) < 50:
        return _section(title, "", _missing("Needs `largescale evaluate knn RUN` with at least 50 test images."))
    chosen = np.sort(np.random.default_rng(run.config.run.seed).permutation(len(test))[:_MAP_POINTS])
    features = torch.nn.functional.normalize(test.features[chosen], dim=1).numpy()
    points = TSNE(init="pca", random_state=0, perplexity=30, max_iter=500).fit_transform(features)
    picture = plots.feature_map(points, test.labels[chosen].numpy(), test.classes)
    text = f"t-SNE of {len(chosen):,} test images by cosine; classes were not known in training."
    return _section(title, text, f'<div class="wide">{picture}</div>')


def _settings(run: _Run) -> str:
    config = html.escape((run.path / "config.yaml").read_text())
    environment = html.escape(json.dumps(run.environment, indent=1))
    body = (
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
        f"<details><summary>Environment</summary><pre>{environment}</pre></details>"
    )
    return _section("Settings", "Running the configuration again repeats the run.", body)


def _section(title: str, text: str, body: str) -> str:
    paragraph = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph}{body}</section>"


def _missing(text: str) -> str:
    return f'<p class="missing">{html.escape(text)}</p>'
