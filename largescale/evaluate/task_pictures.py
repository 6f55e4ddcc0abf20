"""What the task of a method makes of some test images, as pictures that are kept for the report's gallery.

eval/features/task-pictures.safetensors: for each column uint8 [N, 3, h, w], and what they were made from.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from largescale.config import Config
from largescale.data.centre_crops import centre_crops
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from largescale.data.sounds import has_sound
from largescale.data.views import Views
from largescale.evaluate.made_from import VERSION, Stamp, images_stamp
from largescale.methods.method import Method
from largescale.methods.phase import with_plain_images
from shards.ground.files import atomic_write

IMAGES = 8
"""That are drawn."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of each column, uint8 [N, 3, h, w], and the stamp of what they were made from."""

    columns: list[Tensor]
    made_from: Stamp


def path_of(run_dir: Path) -> Path:
    """Where the pictures of a run are."""
    return run_dir / "eval" / "features" / "task-pictures.safetensors"


def stamp_of(config: Config, features: Stamp, columns: tuple[str, ...]) -> Stamp:
    """What pictures depend on.

    Args:
        config: of the run.
        features: stamp of the test images' features.
        columns: what there is to be drawn.
    """
    images = images_stamp(with_plain_images(config))
    return {**features, "images": images, "seed": config.run.seed, "columns": list(columns)}


@torch.no_grad()
def save(
    path: Path, method: Method, corpus: Corpus, ids: Tensor, config: Config, device: torch.device, made_from: Stamp
) -> None:
    """Draw random ones of the samples `ids`, as large as the method's large views, and write them atomically; of those
    with sound if the method hears.
    """
    order = np.random.default_rng(config.run.seed).permutation(ids.numpy()).tolist()
    heard = filter(partial(has_sound, ShardReader([corpus])), order) if config.method.sounds() else order
    chosen = np.array(sorted(islice(heard, IMAGES)), np.int64)
    if not len(chosen):
        return
    mean, std = (torch.tensor(one, device=device)[:, None, None] for one in (config.data.mean, config.data.std))
    plain, sound = with_plain_images(config), config.method.sounds()
    with closing(centre_crops([corpus], plain, [chosen], device, in_process=True, sound=sound)) as source:
        [crops] = source
        if not len(crops.ids):
            return  # what can no longer be read is named in a warning
        x = ((crops.images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        drawn = method.draw(Views([x], crops.ids.to(device), sounds=crops.sounds))
    pixels = [(255 * one).round().clamp(0, 255).to(torch.uint8).cpu().contiguous() for one in drawn]
    tensors = {f"{number}": one for number, one in enumerate(pixels)}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={"made_from": json.dumps(made_from)}))


def load(path: Path) -> Drawn | None:
    """What `save` wrote; None where it is missing, damaged or without a stamp."""
    try:
        with safe_open(path, framework="pt") as file:
            made_from = json.loads(file.metadata()["made_from"])
            if made_from["version"] != VERSION:
                return None
            return Drawn([file.get_tensor(f"{place}") for place in range(len(made_from["columns"]))], made_from)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return None
