"""Frozen features of labelled shards: of the trained network, of the same network untrained, and raw pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config
from largescale.data.corpora import Corpus, open_corpus
from largescale.data.decode import decode
from largescale.data.loader import LoaderDied, choose_counts, starting
from largescale.data.reader import SampleError, ShardReader
from largescale.distributed import stopping
from largescale.distributed.out_of_memory import memory_for, own_words
from largescale.evaluate.feature_set import FeatureSet
from largescale.methods import Method, build_method
from shards.ground.errors import InputError

PIXELS_SIDE = 32
"""Larger images are averaged down to this side for the raw-pixel baseline."""

_log = logging.getLogger(__name__)


def load_method(config: Config, checkpoint: Checkpoint | None) -> Method:
    """The method in evaluation mode, with the weights of a checkpoint, or as it was before its first step.

    Raises:
        InputError: the checkpoint does not fit the configuration.
    """
    torch.manual_seed(config.run.seed)
    method = build_method(config).eval()
    if checkpoint is not None:
        if config.train.precision == "fp64":
            method.double()
        state = {f"model.{name}": value for name, value in method.state_dict().items()}
        sharded.load(checkpoint, state, no_dist=True)
    return method.float()


class LabelledImages(Dataset[tuple[int, int, Tensor | None]]):
    """Images of a shard folder with their labels: resized, centre-cropped, uint8 [3, size, size].

    An image that cannot be read comes as None.
    """

    def __init__(self, corpus: Corpus, config: Config) -> None:
        self.reader = ShardReader([corpus])
        self.resize, self.size = config.evaluate.resize, config.evaluate.size
        self.max_pixels = config.data.max_pixels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, sample_id: int) -> tuple[int, int, Tensor | None]:
        label = self.reader.label(sample_id)
        try:
            image = decode(self.reader.read(sample_id), max_pixels=self.max_pixels)
        except SampleError as error:
            _log.warning("%s: %s", self.reader.describe(sample_id), error)
            return sample_id, label, None
        return sample_id, label, centre_crop(image, self.resize, self.size)


def centre_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Shorter side to `resize` pixels with antialiasing, then the centre square: uint8 [3, size, size]."""
    height, width = image.shape[1:]
    scale = resize / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    if target != (height, width):
        image = interpolate(image[None], target, mode="bilinear", antialias=True)[0]
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return image[:, top : top + size, left : left + size]


def labelled_corpus(location: object, key: str, config: Config) -> Corpus:
    """A shard folder, or its URL, that can be evaluated on.

    Raises:
        InputError: not set, not there, damaged or without labels.
    """
    if not location or not isinstance(location, str):
        raise InputError(f"{key} is not set; pass {key}=FOLDER with labelled shards")
    corpus = open_corpus(location, config.data)
    corpus.check_files()
    if not corpus.manifest.classes:
        raise InputError(f"{key}={location}: its samples have no labels; make it with `shards convert --labels folder`")
    return corpus


@torch.no_grad()
def extract(
    corpus: Corpus, config: Config, networks: dict[str, Callable[[Tensor], Tensor]], device: torch.device
) -> dict[str, FeatureSet]:
    """Features of all labelled samples under several networks, in one pass over the images.

    Args:
        networks: by name, functions from normalised images [B, 3, S, S] to features [B, D].

    Raises:
        InputError: no sample can be used, or a network's features are not finite.
    """
    manifest, images = corpus.manifest, LabelledImages(corpus, config)
    processes, threads = choose_counts(
        config.data.workers, config.data.threads, local_ranks=1, on_gpu=device.type == "cuda"
    )
    loader = DataLoader(
        images,
        batch_size=config.evaluate.batch,
        num_workers=processes * threads,
        collate_fn=_collate,
        worker_init_fn=_begin_in_worker,
    )
    mean = torch.tensor(config.data.mean, device=device)[:, None, None]
    std = torch.tensor(config.data.std, device=device)[:, None, None]
    ids, labels = [], []
    features: dict[str, list[Tensor]] = {name: [] for name in networks}
    said = f"features of {manifest.root.name}"
    with tqdm(total=len(images), desc=said, unit="image", leave=False, mininterval=1) as bar:
        for batch_ids, batch_labels, pixels in _batches(loader, config):
            with memory_for(f"lower evaluate.batch={config.evaluate.batch}"):
                x = (torch.from_numpy(pixels).to(device).float() / 255 - mean) / std
                x = x.contiguous(memory_format=torch.channels_last)
                for name, network in networks.items():
                    features[name].append(network(x).float().cpu())
            ids.append(batch_ids)
            labels.append(batch_labels)
            bar.update(len(images) // len(loader))
    all_ids, all_labels = torch.cat(ids), torch.cat(labels)
    if len(all_ids) == 0:
        raise InputError(f"{manifest.root}: no sample has a label and can be read")
    if len(all_ids) < len(images):
        _log.warning(
            "%s: %d of %d samples are left out, without a label or unreadable",
            manifest.root,
            len(images) - len(all_ids),
            len(images),
        )
    sets = {
        name: FeatureSet(torch.cat(parts), all_labels, all_ids, tuple(manifest.classes))
        for name, parts in features.items()
    }
    for name, one in sets.items():
        _check_finite(name, one.features, manifest.root.name)
    return sets


def can_be_read(corpus: Corpus, config: Config, known: Tensor) -> bool:
    """Whether labelled samples other than `known`, which had to be left out, can be read by now."""
    missing = torch.ones(corpus.manifest.num_samples, dtype=torch.bool).scatter_(0, known, False).nonzero()
    if len(missing) == 0:
        return False
    images = LabelledImages(corpus, config)
    return any(
        images.reader.label(number) >= 0 and images[number][2] is not None for number in missing.flatten().tolist()
    )


def _batches(loader: DataLoader[Any], config: Config) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """Batches of a loader, whose processes' troubles become lines.

    Raises:
        InputError: the shards are away.
        OutOfMemory, LoaderDied: a process ran out of memory, or ended by itself.
    """
    less = f"lower evaluate.batch={config.evaluate.batch}, data.workers or data.threads"
    with starting("data.workers"):
        batches = iter(loader)
    while True:
        try:
            with memory_for(f"for loading: {less}"):
                batch = next(batches, None)
        except InputError as error:
            raise InputError(own_words(error)) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise LoaderDied(f"{' '.join(str(error).split())[:200]}; out of memory? {less}") from error
        if batch is None:
            return
        yield batch


def _check_finite(name: str, features: Tensor, shards: str) -> None:
    """Nothing can be said of features that are not numbers: the nearest to a NaN is a NaN."""
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"features of the {name} network are not finite on {bad:,} of {len(features):,} images of {shards}: its "
            f"weights or BatchNorm statistics have diverged; train with a lower optim.lr"
        )


def _begin_in_worker(_: int) -> None:
    stopping.live_and_die_with_parent()
    worker = get_worker_info()
    assert worker is not None and isinstance(worker.dataset, LabelledImages)
    worker.dataset.reader.begin_in_process(lambda text: None)


def pixels(images: Tensor) -> Tensor:
    """The baseline without a network: images [B, 3, S, S] averaged down to 32 px a side, flattened."""
    if images.shape[-1] > PIXELS_SIDE:
        images = interpolate(images, (PIXELS_SIDE, PIXELS_SIDE), mode="area")
    return images.flatten(1)


def drop_equal_channels(*parts: FeatureSet) -> list[FeatureSet]:
    """Pixel features with one channel where all images are grey: three equal ones only cost time."""
    channels = [part.features.unflatten(1, (3, -1)) for part in parts]
    if not all(torch.equal(c[:, 0], c[:, 1]) and torch.equal(c[:, 0], c[:, 2]) for c in channels):
        return list(parts)
    return [replace(part, features=c[:, 0].contiguous()) for part, c in zip(parts, channels, strict=True)]


def _collate(samples: list[tuple[int, int, Tensor | None]]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Readable, labelled samples of a batch: ids [B], labels [B], images uint8 [B, 3, S, S].

    An array is sent through a pipe; a tensor would go through /dev/shm, of which containers have little.
    """
    usable = [sample for sample in samples if sample[2] is not None and sample[1] >= 0]
    ids, labels, images = zip(*usable, strict=True) if usable else ((), (), ())
    pixels = torch.stack(images) if usable else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64), pixels.numpy()
