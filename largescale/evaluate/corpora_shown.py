"""Features of some images of each corpus that a run was trained on, where there are several: the report's map tells
them apart.

    eval/features/pretrained-corpus-0.safetensors ...

They are shown, not measured: a corpus that is away is a warning.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from largescale.config import Config, corpus_settings
from largescale.data.corpora import Corpus, open_corpora
from largescale.evaluate.extract import Network, extract
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.made_from import VERSION, Stamp, difference, shards_stamp
from largescale.evaluate.projection import spread_over
from largescale.processes import on_rank_0, together
from shards.ground.errors import InputError

_IMAGES, _FEWEST, _MOST_SHARDS = 1500, 50, 8
"""Images of all corpora together, at least of each, and shards that those of one come from."""

_log = logging.getLogger(__name__)


def path_of(run_dir: Path, number: int) -> Path:
    """Where the features of a corpus are, by its place in `data.shards`."""
    return run_dir / "eval" / "features" / f"pretrained-corpus-{number}.safetensors"


def keep_corpora(run_dir: Path, config: Config, network: Network, made_from: Stamp, device: torch.device) -> None:
    """Make what is missing, or of other weights or images; nothing for a run on one corpus.

    Args:
        run_dir: the run's folder.
        config: of the run.
        network: to features.
        made_from: what decides features, but for the images.
        device: where the network is.

    Collectives: every rank must call it; two broadcasts and an exchange, and those of `extract` per corpus.
    """
    if len(corpus_settings(config.data)) < 2:
        return
    corpora: list[Corpus] = []
    try:
        together(lambda: corpora.extend(open_corpora(config.data)))
        stamps = [
            {**made_from, "version": VERSION, "shards": _stamp(corpus, place)}
            for corpus, (place, _, _) in zip(corpora, corpus_settings(config.data), strict=True)
        ]
        wanted = on_rank_0(lambda: [one for one, stamp in enumerate(stamps) if not _fits(run_dir, one, stamp)])
        for number in wanted:
            ids = _chosen(corpora[number], max(_FEWEST, _IMAGES // len(corpora)))
            sets = extract(corpora[number], config, {"pretrained": network}, device, ids=ids, labelled=False)
            for one in sets.values():
                one.save(path_of(run_dir, number), stamps[number])
    except InputError as error:
        _log.warning("the report's map cannot tell the corpora apart: %s", error)


def _stamp(corpus: Corpus, place: str) -> Stamp:
    return {**shards_stamp(corpus, place), "fingerprint": corpus.manifest.fingerprint, "used": corpus.fingerprint()}


def _fits(run_dir: Path, number: int, stamp: Stamp) -> bool:
    try:
        return not difference(FeatureSet.load(path_of(run_dir, number)).made_from, stamp)
    except InputError:
        return False


def _chosen(corpus: Corpus, num_images: int) -> np.ndarray:
    if corpus.subset is None:
        return spread_over(corpus, num_images, _MOST_SHARDS)
    return corpus.subset[:: max(1, len(corpus.subset) // num_images)][:num_images].astype(np.int64)
