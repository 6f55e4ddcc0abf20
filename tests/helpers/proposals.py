"""Recipes that `largescale init` would write for photographs, without shards to look at."""

from __future__ import annotations

from largescale.propose.corpus import CorpusFacts
from largescale.propose.machine import Machine
from largescale.propose.proposal import Proposal, first_proposal

PHOTOS = CorpusFacts(
    6000, 6000, (300, 375, 480), (1.33, 1.6), 0.0, 500, 0, 0.01, 0.2, (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
)
CPU = Machine(0, "", 0.0, here=True, cores=2, host_gb=8.0)
GPU, EIGHT = Machine(1, "a100-80", 80.0, False, 0, 0.0), Machine(8, "a100-80", 80.0, False, 0, 0.0)


def proposed(corpus: CorpusFacts = PHOTOS, machine: Machine = CPU, method: str = "swav") -> Proposal:
    """The recipe before it is made to fit, in `data/photos`."""
    return first_proposal("photos", "data/photos", "", method, corpus, machine)
