"""Frozen features of labelled shards: of the trained network, of the same network untrained, and raw pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config, SoundConfig
from largescale.data.centre_crops import CentreCropMaker, CentreCrops, centre_crops
from largescale.data.corpora import Corpus, open_corpus
from largescale.data.reader import SampleError
from largescale.distributed.collectives import rows_on_rank_0, tensor_from_rank_0
from largescale.distributed.out_of_memory import memory_for
from largescale.evaluate.feature_set import FeatureSet
from largescale.methods import Method, build_method
from largescale.processes import from_rank_0, on_rank_0, rank, world_size
from shards.ground.errors import InputError

PIXELS_SIDE = 32
"""Larger images are averaged down to this side for the raw-pixel baseline."""

Network = Callable[..., Tensor]
"""From normalised images [B, 3, S, S], and windows of sound int16 [B, T] if asked for, to features [B, D]."""

_log = logging.getLogger(__name__)


def load_method(config: Config, checkpoint: Checkpoint | None) -> Method:
    """The method in evaluation mode, with the weights of a checkpoint, or as it was before its first step.

    Raises:
        CheckpointGone: it was removed meanwhile.
        InputError: it does not fit the configuration.
    """
    torch.manual_seed(config.run.seed)
    method = build_method(config).eval()
    if checkpoint is not None:
        if config.train.precision == "fp64":
            method.double()
        state = {f"model.{name}": value for name, value in method.state_dict().items()}
        there = sharded.shapes(checkpoint) if method.exemplar_state else {}
        for name in method.exemplar_state:
            if shape := there.get(f"extra.{name}"):  # of nothing in a method that was built for no corpus
                state[f"extra.{name}"] = getattr(method, name).new_zeros(shape)
                setattr(method, name, state[f"extra.{name}"])
        sharded.load(checkpoint, state, no_dist=True)
    return method.float()


def labelled_corpus(location: object, key: str, config: Config, *, classes: bool = True) -> Corpus:
    """A shard folder, or its URL, that can be evaluated on.

    Args:
        location: of the folder.
        key: of the setting that names it.
        config: how shards are opened.
        classes: whether its samples must be of classes.

    Raises:
        InputError: not set, not there, damaged or without labels.
    """
    if not location or not isinstance(location, str):
        what = "labelled shards" if classes else "shards"
        one = "" if not location else "; data.shards names several, of which one is measured"
        raise InputError(f"{key} is not set; pass {key}=FOLDER with {what}{one}")
    corpus = open_corpus(location, config.data)
    corpus.check_files()
    if classes and not corpus.manifest.classes:
        raise InputError(f"{key}={location}: its samples have no labels; make it with `shards convert --labels folder`")
    return corpus


@dataclass(frozen=True)
class Extracted:
    """Features of one batch.

    Attributes:
        crops: what it was made of; its images are gone.
        features: by network, float32 [N, D], on the host; of no network if N is 0.
    """

    crops: CentreCrops
    features: dict[str, Tensor]


@torch.no_grad()
def features_of(
    corpora: Sequence[Corpus],
    config: Config,
    networks: Mapping[str, Network],
    batches: Sequence[np.ndarray],
    device: torch.device,
    *,
    keys: bool = False,
    labelled: bool = False,
    in_process: bool = False,
    frames: int = 1,
    sound: SoundConfig | None = None,
    without_lost: bool = False,
) -> Generator[Extracted]:
    """Features of the given batches of sample ids, in order, of this process alone; to be closed if left early.

    Args:
        networks: by name.
        keys, in_process, without_lost: as of `centre_crops`.
        labelled: leave out images without a label.
        frames: of each clip, whose features are averaged; a clip of which one cannot be read is left out.
        sound: windows of it that networks want as well; a clip without one is left out.

    Raises:
        InputError: the shards are away.
        OutOfMemory, LoaderDied: the network or a loader process ran out of memory, or the latter ended by itself.
    """
    mean = torch.tensor(config.data.mean, device=device)[:, None, None]
    std = torch.tensor(config.data.std, device=device)[:, None, None]
    waiting: list[_OnItsWay] = []
    source = centre_crops(
        corpora,
        config,
        batches,
        device,
        keys=keys,
        in_process=in_process,
        frames=frames,
        sound=sound,
        without_lost=without_lost,
    )
    with closing(source):
        for crops in source:
            if labelled:
                crops = _only(crops.labels >= 0, crops)
            if frames > 1:
                crops = _only(_of_whole_clips(crops.ids, frames), crops)
            if not len(crops.ids):
                waiting.append(_OnItsWay(crops, {}))  # networks need not know what to make of no images
                continue
            with memory_for(f"lower evaluate.batch={config.evaluate.batch}"):
                x = (crops.images.float() / 255 - mean) / std
                x = x.contiguous(memory_format=torch.channels_last)
                inputs = (x,) if crops.sounds is None else (x, crops.sounds)
                found = {name: one(*inputs).float() for name, one in networks.items()}
                crops = replace(crops, images=x.new_empty(0, *x.shape[1:]), sounds=None)
                waiting.append(_OnItsWay(*((crops, found) if frames == 1 else _by_clip(crops, found, frames))))
            # One batch late: while the host waits for features, the device has the next batch to work on.
            if len(waiting) > (device.type == "cuda"):
                yield waiting.pop(0).arrived()
    for late in waiting:
        yield late.arrived()


class _OnItsWay:
    """Features of a batch on their way to the host.

    On a GPU they are sent as soon as they are computed, and waiting for them waits for nothing later: a plain copy
    would stand in line behind the next batch, and leave the device idle while the one after that is fetched.
    """

    def __init__(self, crops: CentreCrops, features: dict[str, Tensor]) -> None:
        self._crops, self._sent = crops, None
        if any(value.is_cuda for value in features.values()):
            pinned = {name: torch.empty(value.shape, pin_memory=True) for name, value in features.items()}
            features = {name: pinned[name].copy_(value, non_blocking=True) for name, value in features.items()}
            self._sent = torch.cuda.Event()
            self._sent.record()
        self._features = features

    def arrived(self) -> Extracted:
        """The features, once they are there; copies, since page-locked memory is scarce."""
        if self._sent is None:
            return Extracted(self._crops, self._features)
        self._sent.synchronize()
        return Extracted(self._crops, {name: value.clone() for name, value in self._features.items()})


def _only(kept: Tensor, crops: CentreCrops) -> CentreCrops:
    if bool(kept.all()):
        return crops
    return replace(
        crops,
        images=crops.images[kept.to(crops.images.device)],
        sounds=None if crops.sounds is None else crops.sounds[kept.to(crops.sounds.device)],
        ids=crops.ids[kept],
        labels=crops.labels[kept],
        keys=[key for key, stays in zip(crops.keys, kept.tolist(), strict=False) if stays],
    )


def _of_whole_clips(ids: Tensor, frames: int) -> Tensor:
    """Rows, with the frames of a clip one after the other, of clips that all frames are there of."""
    _, counts = ids.unique_consecutive(return_counts=True)
    return (counts == frames).repeat_interleave(counts)


def _by_clip(crops: CentreCrops, found: dict[str, Tensor], frames: int) -> tuple[CentreCrops, dict[str, Tensor]]:
    """Rows of whole clips from rows of their frames."""
    means = {name: rows.unflatten(0, (-1, frames)).mean(1) for name, rows in found.items()}
    first = slice(None, None, frames)
    return replace(crops, ids=crops.ids[first], labels=crops.labels[first], keys=crops.keys[first]), means


def blocks(ids: np.ndarray, batch: int) -> list[np.ndarray]:
    """Samples in batches. Ranks share whole batches, so that features do not depend on how many ranks there are."""
    return [ids[start : start + batch] for start in range(0, len(ids), batch)]


def extract(
    corpus: Corpus,
    config: Config,
    networks: Mapping[str, Network],
    device: torch.device,
    *,
    ids: np.ndarray | None = None,
    labelled: bool = True,
    frames: int = 1,
    sound: SoundConfig | None = None,
) -> dict[str, FeatureSet]:
    """Features of samples under several networks, in one pass over the images that all ranks share.

    Args:
        networks: by name.
        ids: of the samples, int64; None for all of them.
        labelled: whether to leave out samples without a class; theirs is -1.
        frames, sound: as of `features_of`; of several frames, a batch has as many clips fewer.

    Returns:
        By name on rank 0; empty on other ranks.

    Raises:
        InputError: no sample can be used, or a network's features are not finite.

    Collectives: every rank must call it with the same networks; a gather per network.
    """
    manifest, wanted = corpus.manifest, np.arange(corpus.manifest.num_samples) if ids is None else ids
    all_batches = blocks(wanted, max(1, config.evaluate.batch // frames))
    first, last = (len(all_batches) * one // world_size() for one in (rank(), rank() + 1))
    own, found_ids, labels = all_batches[first:last], [], []
    features: dict[str, list[Tensor]] = {name: [] for name in networks}
    said, quiet = f"features of {manifest.root.name}", rank() > 0
    found_by = features_of([corpus], config, networks, own, device, labelled=labelled, frames=frames, sound=sound)
    with (
        closing(found_by) as source,
        tqdm(total=sum(map(len, own)), desc=said, unit="image", leave=False, mininterval=1, disable=quiet) as bar,
    ):
        for found in source:
            found_ids.append(found.crops.ids)
            labels.append(found.crops.labels)
            for name, values in found.features.items():
                features[name].append(values)
            bar.update(len(own[found.crops.number]))
    sets = _gathered(features, labels, found_ids, tuple(manifest.classes))
    on_rank_0(lambda: _check(sets, corpus, len(wanted), labelled))
    return sets


def _gathered(
    features: dict[str, list[Tensor]], labels: list[Tensor], ids: list[Tensor], classes: tuple[str, ...]
) -> dict[str, FeatureSet]:
    """What all ranks have found, on rank 0. Collectives: one gather per network, and two."""
    none = torch.empty(0, dtype=torch.int64)
    all_ids, all_labels = rows_on_rank_0(torch.cat([none, *ids])), rows_on_rank_0(torch.cat([none, *labels]))
    sets = {}
    for name, parts in features.items():
        rows = rows_on_rank_0(torch.cat(parts) if parts else torch.empty(0, 0))
        if rows is not None and all_ids is not None and all_labels is not None:
            sets[name] = FeatureSet(rows, all_labels, all_ids, classes)
    return sets


def on_every_rank(sets: dict[str, FeatureSet]) -> dict[str, FeatureSet]:
    """What `extract` gave, which rank 0 has, on every rank.

    Collectives: every rank must call it; a broadcast of what the sets are called, and of each tensor in pieces.
    """
    found = {}
    for name, classes in from_rank_0([(name, one.classes) for name, one in sets.items()]):
        one = sets.get(name)
        parts = (None, None, None) if one is None else (one.features, one.labels, one.ids)
        features, labels, ids = map(tensor_from_rank_0, parts)
        found[name] = FeatureSet(features, labels, ids, classes)
    return found


def _check(sets: dict[str, FeatureSet], corpus: Corpus, num_samples: int, labelled: bool) -> None:
    root = corpus.manifest.root
    what = "has a label and can be read" if labelled else "can be read"
    for name, one in sets.items():
        if len(one) == 0:
            raise InputError(f"{root}: no sample {what}")
        check_finite(name, one.features, root.name)
    found = len(next(iter(sets.values())))
    if found < num_samples:
        why = "without a label or unreadable" if labelled else "unreadable"
        _log.warning("%s: %d of %d samples are left out, %s", root, num_samples - found, num_samples, why)


def can_be_read(corpus: Corpus, config: Config, known: Tensor, *, labelled: bool = True, frames: int = 1) -> bool:
    """Whether samples (of a class, if `labelled`) other than `known`, which had to be left out, can be read by now."""
    missing = torch.ones(corpus.manifest.num_samples, dtype=torch.bool).scatter_(0, known, False).nonzero()
    if len(missing) == 0:
        return False
    maker = CentreCropMaker([corpus], config, frames=frames)
    wanted = (number for number in missing.flatten().tolist() if not labelled or maker.reader.label(number) >= 0)
    return any(is_readable(maker, number) for number in wanted)


def is_readable(maker: CentreCropMaker, sample_id: int) -> bool:
    """Whether an image, or all wanted frames of a clip, can be read now."""
    try:
        for place in range(maker.frames):
            maker.crop(sample_id, place)
    except SampleError:
        return False
    return True


def check_finite(name: str, features: Tensor, shards: str) -> None:
    """Nothing can be said of features that are not numbers: the nearest to a NaN is a NaN.

    Raises:
        InputError: naming the network and the shards.
    """
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"features of the {name} network are not finite on {bad:,} of {len(features):,} images of {shards}: its "
            f"weights or BatchNorm statistics have diverged; train with a lower optim.lr"
        )


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
