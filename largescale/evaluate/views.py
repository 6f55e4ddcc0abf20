"""Features of several augmented views of each image, as training cuts and changes them: what alignment and LiDAR need.

Views are those of the crop group with the largest side in `data.crops`, with its augmentation, drawn from `run.seed`
and the image alone, of an epoch that no training reaches. Batches are the same for any number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config, MethodConfig, augment_of_group
from largescale.data.augment import Augment
from largescale.data.batches import BatchMaker
from largescale.data.centre_crops import loader_of
from largescale.data.corpora import Corpus
from largescale.data.loaded import raise_errors
from largescale.data.reader import ShardReader
from largescale.distributed.collectives import rows_on_rank_0
from largescale.distributed.out_of_memory import memory_for
from largescale.evaluate.extract import Network, check_finite
from largescale.processes import on_rank_0, rank, world_size

_EPOCH = 1 << 40

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Given:
    """An order of samples that is given: ids [steps, B]."""

    ids: np.ndarray

    def samples(self, steps: int | np.ndarray, places: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs; the maker also looks beyond the last step."""
        assert places is not None
        ids = self.ids[np.minimum(steps, len(self.ids) - 1), places]
        return ids, np.full_like(ids, _EPOCH)


@torch.no_grad()
def features_of_views(
    corpus: Corpus,
    config: Config,
    networks: Mapping[str, Network],
    ids: np.ndarray,
    num_views: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Features of V views of each of N samples.

    Args:
        corpus: what is read.
        config: of the run, whose augmentation it is.
        networks: by name.
        ids: of the samples, int64 [N]; for one that cannot be read another stands in, as in training.
        num_views: V.
        device: where networks are.

    Returns:
        By name float32 [V, N, D] on rank 0; empty on other ranks.

    Raises:
        InputError: the shards are away, or features are not finite.

    Collectives: every rank must call it with the same networks; a gather per network, and a broadcast.
    """
    batch = min(len(ids), max(1, config.evaluate.batch // num_views))
    table = np.pad(ids, (0, -len(ids) % batch), mode="edge").reshape(-1, batch)
    own = range(*(len(table) * one // world_size() for one in (rank(), rank() + 1)))
    settings, augment = _settings(config, batch, num_views)
    maker = BatchMaker(ShardReader([corpus]), _Given(table), settings, rank=0, world_size=1)
    parts: dict[str, list[Tensor]] = {name: [] for name in networks}
    for step, pixels, draws in _made(maker, own, settings, device):
        with memory_for(f"lower evaluate.batch={config.evaluate.batch}"):
            x = augment(pixels, draws)
            left = min(batch, len(ids) - step * batch)  # the last batch is filled up
            for name, network in networks.items():
                found = network(x).float().unflatten(0, (num_views, batch))[:, :left]
                parts[name].append(found.transpose(0, 1).flatten(1).cpu())
    views = {}
    for name, some in parts.items():
        rows = rows_on_rank_0(torch.cat(some) if some else torch.empty(0, 0))
        if rows is not None:
            views[name] = rows.unflatten(1, (num_views, -1)).transpose(0, 1)

    def check() -> None:
        for name, one in views.items():
            check_finite(name, one.flatten(0, 1), corpus.manifest.name)

    on_rank_0(check)
    return views


def _made(
    maker: BatchMaker, steps: range, settings: Config, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Steps, views [V * B, 3, S, S] and draws [V * B, DRAWS] on the device, good until the next are asked for."""
    if not steps:
        return
    with closing(loader_of(maker, steps, settings, device)) as loader:
        for step in steps:
            _, buffers, made, _ = loader.take()
            raise_errors(made)
            for row in (row for part in made for row in part.skipped):
                _log.warning("%s, key %s: another stands in for it: %s", row["shard"], row["key"], row["reason"])
            pixels, draws = (one[0].flatten(0, 1).to(device) for one in (buffers.views, buffers.draws))
            yield step, pixels, draws
            loader.release()


def _settings(config: Config, batch: int, num_views: int) -> tuple[Config, Augment]:
    """The configuration with nothing but the views that are wanted, and what changes them."""
    settings = deepcopy(config)
    place = max(range(len(config.data.crops)), key=lambda one: config.data.crops[one].size)
    settings.data.crops = [replace(config.data.crops[place], num=num_views)]
    settings.data.audit, settings.method = False, MethodConfig()
    settings.train.global_batch, settings.train.accumulate = batch, 1
    data = config.data
    return settings, Augment(augment_of_group(data, place), data.mean, data.std, torch.float32)
