"""Evaluation of a run's frozen features; one protocol a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.folder import Checkpoint, find_latest
from largescale.config import Config, EvaluateConfig, load_config
from largescale.data.corpora import Corpus
from largescale.evaluate.extract import (
    drop_equal_channels,
    extract,
    labelled_corpus,
    load_method,
    pixels,
    save_prototype_scores,
)
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.knn import knn_accuracy
from largescale.evaluate.linear import linear_probe
from shards.errors import InputError
from shards.files import atomic_write
from shards.manifest import Manifest

_log = logging.getLogger(__name__)

NETWORKS = {"pretrained": "pretrained network", "untrained": "same network, untrained", "pixels": "raw pixels"}

KNN_HEADLINE_K = 20
"""The number of neighbours whose accuracy is quoted (a k chosen on the test images would flatter)."""


def evaluate(protocol: str, run_dir: Path, overrides: list[str]) -> str:
    """Measure a run's newest checkpoint, and its baselines, by one protocol; writes RUN/eval/<protocol>.json.

    Args:
        protocol: `knn` or `linear`.
        run_dir: folder of the run.
        overrides: `key=value` replacements of the run's configuration.

    Returns:
        A short table for people.

    Raises:
        InputError: no checkpoint, or no labelled shards.
    """
    config = load_config(run_dir / "config.yaml", overrides)
    checkpoint = find_latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{run_dir}: no whole checkpoint; run `largescale pretrain` with this run.dir first")
    train, test = features_of_run(config, run_dir, checkpoint)
    results = {name: PROTOCOLS[protocol](train[name], test[name], config.evaluate) for name in train}
    record = {
        "protocol": protocol,
        "settings": {key: value for key, value in vars(config.evaluate).items()},
        "num_train": len(train["pretrained"]),
        "num_test": len(test["pretrained"]),
        "checkpoint_step": checkpoint.step,
        "results": results,
    }
    with atomic_write(run_dir / "eval" / f"{protocol}.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    return "\n".join(
        f"{protocol:>7}  {NETWORKS[name]:<24} top-1 {result['top1']:6.2%}" for name, result in results.items()
    )


def features_of_run(
    config: Config, run_dir: Path, checkpoint: Checkpoint
) -> tuple[dict[str, FeatureSet], dict[str, FeatureSet]]:
    """Features of the labelled training and test shards by network name; computed once for a checkpoint."""
    names = list(NETWORKS) if config.evaluate.baselines else ["pretrained"]
    # Both folders first: a missing one must not cost the time of the other.
    shards = (labelled_corpus(config.evaluate.train_shards or config.data.shards, "evaluate.train_shards", config),
              labelled_corpus(config.data.eval_shards, "data.eval_shards", config))
    _check_same_classes(*(corpus.manifest for corpus in shards))
    folder = run_dir / "eval" / "features"
    wanted = _stamp(config, checkpoint, *shards)
    files = {(name, part): folder / f"{name}-{part}.safetensors" for name in names for part in ("train", "test")}
    stamp_file = folder / "made_from.json"
    known = json.loads(stamp_file.read_text()) if stamp_file.is_file() else None
    if known != wanted or not all(path.is_file() for path in files.values()):
        stamp_file.unlink(missing_ok=True)
        _extract_all(config, checkpoint, shards, names, folder)
        with atomic_write(stamp_file) as file:
            file.write(json.dumps(wanted, indent=1).encode())
    loaded = {place: FeatureSet.load(path) for place, path in files.items()}
    return {name: loaded[name, "train"] for name in names}, {name: loaded[name, "test"] for name in names}


@torch.no_grad()
def _extract_all(
    config: Config, checkpoint: Checkpoint, shards: tuple[Corpus, Corpus], names: list[str], folder: Path
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pretrained = load_method(config, checkpoint).to(device)
    networks: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"pretrained": pretrained.backbone}
    if "untrained" in names:
        networks["untrained"] = load_method(config, None).to(device).backbone
        networks["pixels"] = pixels
    train = extract(shards[0], config, networks, device)
    test = extract(shards[1], config, networks, device)
    if "pixels" in names:
        train["pixels"], test["pixels"] = drop_equal_channels(train["pixels"], test["pixels"])
    for name in names:
        train[name].save(folder / f"{name}-train.safetensors")
        test[name].save(folder / f"{name}-test.safetensors")
    save_prototype_scores(
        folder / "prototypes.safetensors", pretrained, train["pretrained"], device, config.run.seed
    )


def _check_same_classes(train: Manifest, test: Manifest) -> None:
    # Labels are positions in the list of classes.
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(
            f"data.eval_shards={test.root}: its {len(test.classes)} classes are not the {len(train.classes)} of "
            f"{train.root} ({f'{only[0]} is in one of them only' if only else 'their order differs'}); convert both "
            f"with the same class folders"
        )


def _stamp(config: Config, checkpoint: Checkpoint, train: Corpus, test: Corpus) -> dict[str, Any]:
    """What the features depend on; when it changes they are made again."""
    return {
        "step": checkpoint.step,
        "train_shards": train.fingerprint(),
        "eval_shards": test.fingerprint(),
        "resize": config.evaluate.resize,
        "size": config.evaluate.size,
    }


def _knn(train: FeatureSet, test: FeatureSet, config: EvaluateConfig) -> dict[str, Any]:
    headline = min(KNN_HEADLINE_K, len(train))
    neighbours = sorted({headline, *(k for k in config.knn_neighbours if k <= len(train))})
    by_k = knn_accuracy(train, test, num_neighbours=neighbours, temperature=config.knn_temperature)
    return {"top1": by_k[headline], "num_neighbours": headline, "top1_by_k": {str(k): v for k, v in by_k.items()}}


def _linear(train: FeatureSet, test: FeatureSet, config: EvaluateConfig) -> dict[str, Any]:
    result = linear_probe(
        train, test,
        learning_rates=config.linear_rates, epochs=config.linear_epochs, batch_size=config.linear_batch,
        weight_decay=config.linear_weight_decay, seed=0,
    )
    return {
        "top1": result.top1, "top5": result.top5, "learning_rate": result.learning_rate,
        "sweep": {str(rate): accuracy for rate, accuracy in result.sweep.items()},
    }


PROTOCOLS: dict[str, Callable[[FeatureSet, FeatureSet, EvaluateConfig], dict[str, Any]]] = {
    "knn": _knn,
    "linear": _linear,
}
