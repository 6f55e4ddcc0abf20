"""Prototypes, their freeze and the queue, chosen by the batch, the number of images and the length of a run."""

from __future__ import annotations

from typing import Any

from largescale.config import Config
from largescale.data.length import Length
from largescale.methods.choice import Choice
from largescale.methods.swav.settings import Settings

_MOST = 3000
"""Prototypes of the published runs (arXiv 2006.09882, appendix A)."""

_IMAGES_PER_PROTOTYPE = 10
"""At least, so that a prototype can stand for more than one image."""

_PER_SAMPLE = 1.5
"""Prototypes over samples in an assignment: with many more, most are nearest to nobody and learn nothing."""

_SAMPLES, _MOST_QUEUED = 4096, 15
"""In an assignment: the batch of the published large runs, and that of the small ones with their queue of 15 batches,
256 + 3840 (arXiv 2006.09882, appendix A)."""

_QUEUE_FROM_IMAGES = 100_000
"""With fewer, the queue holds a large part of the corpus, and embeddings of epochs ago."""

QUEUE_WAITS = 0.04
"""Share of a run before the queue: 15 of 400 published epochs."""

_LONGEST_FREEZE = 0.05
"""Share of a run; the published runs freeze for an epoch."""


def suited(config: Config, length: Length) -> dict[str, Choice]:
    """Settings for this batch and corpus, with reasons."""
    settings = config.method
    assert isinstance(settings, Settings)
    batch, images = config.train.global_batch // config.train.accumulate, length.num_samples
    queue = queue_size(batch, config.train.global_batch) if wants_queue(batch, images) else 0
    samples = batch + queue
    prototypes = _rounded(min(_MOST, _PER_SAMPLE * samples, images / _IMAGES_PER_PROTOTYPE))
    freeze = min(length.steps_per_epoch, int(_LONGEST_FREEZE * length.num_steps))
    return {
        "prototypes": Choice(prototypes, _why_prototypes(prototypes, samples, images, queued=queue > 0)),
        "freeze_prototypes_steps": Choice(
            freeze, f"an epoch as published, or 5% of the {length.num_steps:,} steps if that is less"
        ),
        **_queue(queue, config.train.global_batch, length),
    }


def wants_queue(batch: int, images: float) -> bool:
    """Whether the samples of a (micro-)batch are few for an assignment, and the queue would hold few of the images."""
    return images >= _QUEUE_FROM_IMAGES and _PER_SAMPLE * batch < _MOST


def queue_size(batch: int, global_batch: int) -> int:
    """Samples in the queue, which holds whole steps: at least one, so that there are about as many as published."""
    return global_batch * max(1, min(_MOST_QUEUED, (_SAMPLES - batch) // global_batch))


def _queue(size: int, batch: int, length: Length) -> dict[str, Choice]:
    if not size:
        few = length.num_samples < _QUEUE_FROM_IMAGES
        why = "a queue would hold much of so few images" if few else "the batch alone is large enough to be assigned"
        return {"queue": Choice(0, why)}
    start = int(QUEUE_WAITS * length.num_steps)
    return {
        "queue": Choice(size, f"{size // batch} x the batch; published: 15 x 256, and with more {_SAMPLES} in all"),
        "queue_start_step": Choice(start, "4% of the run, once features have settled (published: 15 of 400 epochs)"),
    }


def _why_prototypes(number: int, samples: int, images: int, *, queued: bool) -> str:
    among = f"{samples:,} samples in an assignment" + (" (batch and queue)" if queued else "")
    if number == _MOST:
        return f"as published; {among}"
    if number < _rounded(_PER_SAMPLE * samples):
        return f"{_IMAGES_PER_PROTOTYPE} or more of the {images:,} images for each"
    return f"about {_PER_SAMPLE:g} times the {among}: with many more, most stay unused"


def _rounded(number: Any) -> int:
    """Down to two digits; at least 2."""
    unit = 10 ** max(0, len(str(int(number))) - 2)
    return max(2, int(number) // unit * unit)
