"""What a classifier's file says of its network, and the file of the classifier that a run has trained itself.

    RUN/classifier-step-00001014-1a2b3c4d.safetensors    of that checkpoint, made where the run is to teach another

The characters at the end stand for what the file says of its network, such as the size of images that `evaluate.size`
sets: what says something else is another file, so that a student which goes on finds the teacher that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config, flatten, without_later_defaults
from largescale.distributed.launch import own_launch
from largescale.evaluate.made_from import identity
from largescale.evaluate.targets import target_at
from largescale.evaluate.weights import Weights, method_of
from largescale.models.image_classifier import ImageClassifier, write_classifier
from largescale.processes import on_rank_0, process_group
from shards.ground.errors import InputError


def about_network(config: Config, weights: Weights, num_features: int, classes: Sequence[str]) -> dict[str, str]:
    """What a file says of a network with a classifier: numbers as text, lists as JSON.

    Args:
        config: that describes the network.
        weights: those that it has, or was trained from.
        num_features: of its backbone.
        classes: names, in the order of its scores.
    """
    size, values = config.evaluate.size, without_later_defaults(flatten(config))
    told = {key: value for key, value in values.items() if key.startswith(("model.", "data.mean", "data.std"))}
    return {
        "architecture": config.model.backbone,
        "num_features": str(num_features),
        "classes": json.dumps(list(classes)),
        "mean": json.dumps(list(config.data.mean)),
        "std": json.dumps(list(config.data.std)),
        "colors": "RGB",
        "input_size": json.dumps([3, size, size]),
        "resize": str(config.evaluate.resize),
        "config": json.dumps(told),
        "weights": weights.content_hash,
        "step": str(weights.step),
    }


def write_own_classifier(place: str | Path) -> Path:
    """The classifier that a run has trained itself, as a file in its folder; its path.

    Args:
        place: folder of the run, whose newest checkpoint is taken, or one of its checkpoints.

    Raises:
        InputError: no such run or checkpoint, or its method classifies nothing.

    Collectives: every rank must call it; those of `Target.read`, a barrier, and a broadcast of
    a path.
    """
    target = target_at(place)

    def write(checkpoint: Checkpoint, config: Config, warnings: list[str]) -> Path:
        return on_rank_0(lambda: _write(target.run_dir, checkpoint, config))

    with nullcontext() if own_launch() is None else process_group():
        return target.read([], write)


def _write(run_dir: Path, checkpoint: Checkpoint, config: Config) -> Path:
    method = method_of(config, checkpoint)
    if not method.class_names:
        raise InputError(
            f"{run_dir}: a {method.title} run classifies nothing by itself; `largescale finetune {run_dir} "
            f"teacher.safetensors` makes a classifier of it"
        )
    encoder, head = method.get_submodule(method.encoder_name), method.get_submodule(method.head_name)
    assert isinstance(head, nn.Sequential)
    about = about_network(config, checkpoint, method.num_features, method.class_names)
    path = run_dir / f"classifier-step-{checkpoint.step:08d}-{identity(about)}.safetensors"
    write_classifier(path, ImageClassifier(encoder, head), about)
    return path
