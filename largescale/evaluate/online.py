"""Measures of a network while it trains, which leave no trace in it.

A copy of the encoder's weights is gathered on every rank, whatever the strategy; it is evaluated in evaluation mode on
images held in memory, and thrown away. The training's own parameters, BatchNorm statistics and random numbers are not
touched. Whatever fails in a measurement, on any rank, costs the run's further measurements and nothing else: what one
rank does by itself is an `_attempt`, after which all ranks know whether to go on to the next collective.

The images are training images, never test images: some are the bank, others the queries of a kNN. Their labels, where
there are any, take no other part; that the network has seen these images makes the accuracy no estimate for new ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from largescale.config import Config
from largescale.data.centre_crops import centre_crops
from largescale.data.corpora import Corpus, open_corpus
from largescale.distributed.collectives import rows_on_rank_0
from largescale.distributed.out_of_memory import is_out_of_memory, line_of_memory
from largescale.distributed.stopping import StoppedInOrder
from largescale.evaluate.knn import are_right, nearest
from largescale.evaluate.spectrum import spectrum
from largescale.methods import Method, build_method
from largescale.parallel.batchnorm import average_statistics
from largescale.parallel.engine import Engine
from largescale.processes import rank, world_size
from shards.ground.errors import InputError, line_of

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07

_log = logging.getLogger(__name__)

Beat = Callable[[str], None]
Value = TypeVar("Value")


class _Failed(Exception):
    """Something in a measurement failed, on this rank or another; the message says what."""


class Online:
    """Measures at the first logged step at or after every `evaluate.online_every` epochs.

    A run that continues counts what was due by its first step as measured. So a measurement is left out where the run
    stops after it was due and before that logged step, or in it: nothing is measured in the step of a stop.

    Args:
        config: of the run.
        corpora: that it trains on.
        first_step: that it starts or continues from.
        steps_per_epoch: of the run.
        device: of this rank.
    """

    def __init__(
        self, config: Config, corpora: Sequence[Corpus], first_step: int, steps_per_epoch: int, device: torch.device
    ) -> None:
        self._config, self._corpora, self._device = config, list(corpora), device
        every = config.evaluate.online_every
        self._every = max(1, round(every * steps_per_epoch)) if every > 0 else 0
        self._times = first_step // self._every if self._every else 0
        self._images: Tensor | None = None
        self._ids, self._labels = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        self._queries = torch.empty(0, dtype=torch.int64)
        self._classes = 0

    def measure(self, engine: Engine, done: int, beat: Beat) -> dict[str, float]:
        """Columns of metrics.jsonl, on rank 0; empty on other ranks, and where it is not time yet. After a failure,
        of which there is one warning, it is never time again.

        Args:
            engine: whose network is measured.
            done: steps done.
            beat: told what is being done, so that nobody takes it for a hang.

        Collectives: every rank must call it; those of `twin`, a gather of features, an all-gather of objects each
        time that a rank may have failed.
        """
        if not self._every or done // self._every == self._times:
            return {}
        self._times = done // self._every
        beat(f"step {done}: measuring online")
        try:
            return self._measured(engine, done, beat)
        except _Failed as failed:
            self._every, self._images = 0, None
            if rank() == 0:
                _log.warning("evaluate.online_every: measured no more in this run. %s", str(failed))
            return {}

    def _measured(self, engine: Engine, done: int, beat: Beat) -> dict[str, float]:
        started = time.perf_counter()
        if self._images is None:
            self._take_images()
        network = twin(engine, self._config, self._device)
        own = _attempt(partial(self._features, network, beat))
        del network
        features = rows_on_rank_0(own)
        found = _attempt(lambda: self._figures(features) if features is not None else {})
        if rank() == 0:
            found["online_s"] = time.perf_counter() - started
            _log.info("online, step %d: %s", done, _in_words(found))
        return found

    def _figures(self, features: Tensor) -> dict[str, float]:
        found = {f"online_{name}": value for name, value in spectrum(features.to(self._device)).items()}
        if (accuracy := self._knn(features.cpu())) is not None:
            found["online_knn_top1"] = accuracy
        return found

    def _knn(self, features: Tensor) -> float | None:
        """Accuracy of the queries; None without labels, or where all have the same."""
        labelled = (self._labels >= 0) & features.isfinite().all(1)
        query = labelled & torch.isin(self._ids, self._queries)
        bank = labelled & ~query
        if self._classes < 2 or not query.any() or len(self._labels[bank].unique()) < 2:
            return None
        cosines, rows = nearest(features[bank], features[query], min(NUM_NEIGHBOURS, int(bank.sum())))
        votes = torch.exp((cosines - cosines[:, :1]).double() / TEMPERATURE)
        right = are_right(votes, self._labels[bank][rows], self._labels[query], self._classes)
        return int(right.sum()) / int(query.sum())

    @torch.no_grad()
    def _features(self, network: Method, beat: Beat) -> Tensor:
        """Of this rank's images, float32 [N, D]."""
        assert self._images is not None
        data = self._config.data
        mean, std = (torch.tensor(values, device=self._device)[:, None, None] for values in (data.mean, data.std))
        parts = [torch.empty(0, network.num_features)]
        for some in self._images.split(self._config.evaluate.batch):
            x = (some.to(self._device).float() / 255 - mean) / std
            parts.append(network.encode(x.contiguous(memory_format=torch.channels_last)).float().cpu())
            beat("measuring online: features")
        return torch.cat(parts)

    def _take_images(self) -> None:
        """Read this rank's share of the images, once. Collectives: those of `_attempt`, a gather of ids and labels."""
        _attempt(self._read_images)
        ids, labels = rows_on_rank_0(self._ids), rows_on_rank_0(self._labels)
        if ids is not None and labels is not None:
            self._ids, self._labels = ids, labels

    def _read_images(self) -> None:
        config, corpora = self._config, self._corpora
        if config.evaluate.train_shards:
            corpora = [open_corpus(config.evaluate.train_shards, config.data)]
        self._classes = len(corpora[0].manifest.classes) if len(corpora) == 1 else 0
        chosen, queries = choose(corpora, config.evaluate.online_bank, config.evaluate.online_queries, config.run.seed)
        self._queries = torch.from_numpy(queries)
        own = np.array_split(chosen, world_size())[rank()]
        batches = [own[start : start + config.evaluate.batch] for start in range(0, len(own), config.evaluate.batch)]
        ids, labels, images = [], [], []
        for crops in centre_crops(corpora, config, batches, torch.device("cpu"), in_process=True):
            ids.append(crops.ids)
            labels.append(crops.labels)
            images.append(crops.images.clone())
        size = config.evaluate.size
        self._ids, self._labels = (torch.cat([torch.empty(0, dtype=torch.int64), *parts]) for parts in (ids, labels))
        self._images = torch.cat([torch.empty(0, 3, size, size, dtype=torch.uint8), *images])


def choose(corpora: Sequence[Corpus], bank: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids of bank and queries together, in order, and those of the queries; equal for any number of ranks.

    If there are fewer images, a fifth of them are queries. Of shards in a store only the first are used, since others
    would have to be fetched for it.
    """
    available = int(sum(int(corpus.shard_sizes().sum()) for corpus in corpora))
    wanted = bank + queries
    if available < wanted:
        queries = available // 5
    elif any(corpus.cache is not None for corpus in corpora):
        available = wanted
    # Takes memory for what is drawn, not for a billion images.
    drawn = np.random.default_rng(seed).choice(available, min(wanted, available), replace=False).astype(np.int64)
    return np.sort(drawn), np.sort(drawn[:queries])


def twin(engine: Engine, config: Config, device: torch.device) -> Method:
    """A copy of the network that an engine trains, to `encode` with: evaluation mode, float32, on this rank's device.

    BatchNorm statistics are averaged over ranks in the copy, as in a checkpoint. It is built without drawing weights,
    so no random numbers are used up. What only training needs has no memory.

    Raises:
        _Failed: there is no room for it, on any rank.

    Collectives: every rank must call it; those of `_attempt` and `Engine.model_state`, an all-gather per sharded tensor
    and one all-reduce.
    """
    method = _attempt(lambda: _empty_twin(config, device))
    state = engine.model_state()
    with torch.no_grad():
        for name, tensor in method.state_dict().items():
            if not tensor.is_meta:
                value = state[f"model.{name}"]
                tensor.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
    average_statistics(_needed(method))
    return method


def _empty_twin(config: Config, device: torch.device) -> Method:
    method = build_method(config, on_meta=True).float().eval().requires_grad_(False)
    constants = {name: buffer for name, buffer in _needed(method).named_buffers() if not buffer.is_meta}
    _needed(method).to_empty(device=device)
    for name, values in constants.items():  # in no state, so they are not copied from the network that is trained
        _needed(method).get_buffer(name).copy_(values)
    # One tensor at a time is gathered beside the copy, in pieces first. That there is room must be known before, since
    # a rank that fails within a collective leaves the others waiting; on a GPU, torch keeps the room for it.
    torch.empty(2 * max(tensor.numel() for tensor in _needed(method).state_dict().values()), device=device)
    return method


def _needed(method: Method) -> nn.Module:
    """What `encode` needs."""
    own = type(method).encode is not Method.encode
    return method if own else method.get_submodule(method.encoder_name)


def _attempt(action: Callable[[], Value]) -> Value:
    """Do what may fail on some ranks, and has no collectives in it.

    Raises:
        _Failed: it did on any rank; on all.

    Collectives: every rank must call it; one all-gather of objects.
    """
    done: list[Value] = []
    trouble = ""
    try:
        done.append(action())
    except StoppedInOrder:
        raise
    except Exception as error:
        trouble = _line(error)
    troubles: list[str] = [""] * world_size()
    dist.all_gather_object(troubles, trouble)
    if found := next(filter(None, troubles), ""):
        raise _Failed(found)
    return done[0]


def _line(error: Exception) -> str:
    if is_out_of_memory(error):
        return line_of_memory(error)
    if isinstance(error, InputError | OSError):
        return line_of(error) or type(error).__name__
    return f"{type(error).__name__}: {line_of(error)[:300]}"


def _in_words(found: dict[str, float]) -> str:
    parts = []
    if "online_knn_top1" in found:
        parts.append(f"kNN {found['online_knn_top1']:.1%} on training images")
    if "online_effective_rank" in found:
        parts.append(
            f"effective rank {found['online_effective_rank']:.1f} (centred "
            f"{found.get('online_effective_rank_centred', 0.0):.1f}), mean's share {found['online_mean_share']:.1%}"
        )
    return ", ".join([*parts, f"took {found['online_s']:.1f} s"])
