"""What the offline phases of a run cost: embedding all images, by one batch of it on fake tensors.

Of what a method makes of the embeddings, such as k-means, memory is counted as the method promises it; seconds are not.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist

from largescale.config import Config
from largescale.methods.phase import with_plain_images
from largescale.parallel.engine import Engine
from largescale.plan.trace import Collective, Operator, StepTrace


@dataclass(frozen=True)
class Phase:
    """An offline phase that embeds all images, of which a run has several.

    Attributes:
        count: such phases of the run.
        calls: batches that a rank embeds in each.
        operators, counts, sent: of one batch.
        held: bytes beyond what the rank holds between steps: activations of a batch and embeddings of its images, or
            what the method needs to work on them if that is more. State of the method that is part of it counts twice.
    """

    count: int
    calls: int
    operators: list[Operator]
    counts: Counter[Collective]
    sent: Counter[Collective]
    held: int


def phase_of(engine: Engine, config: Config) -> Phase | None:
    """Simulate a batch of a phase; None for a run that embeds none. To be called within a mode of fake tensors."""
    length = engine.method.length
    method = engine.method
    due = [step for step in range(length.num_steps) if method.phase_due(step) and method.phase_embeds(step)]
    if not due:
        return None
    side, batch = with_plain_images(config).evaluate.size, config.evaluate.batch
    own = math.ceil(length.num_samples / dist.get_world_size())
    trace = StepTrace()
    with trace:
        embeddings = engine.embed(torch.empty(batch, 3, side, side), due[-1])
    kept = torch.float64.itemsize if method.phase_sums(due[-1]) else own * embeddings.element_size()
    size = kept * embeddings.shape[1]
    held = max(trace.lap() + size, method.phase_bytes(config, length.num_samples))
    return Phase(len(due), math.ceil(own / batch), trace.operators, trace.counts, trace.sent, held)
