"""`python -m largescale.plan.what_fits`: which change makes a configuration fit, for a training that did not.

Reads a request as JSON: `config` (YAML), `ranks`, `available` (bytes that a rank has), `on_gpu`. Writes a line of JSON
for what failed (`needed`, in bytes), for a change that should fit by its share of the batch (`overrides`, `needed`,
`fits`, `guessed`), and for each change that is tried (the same, not guessed), as soon as it is known: the caller may
not wait for all. `cpu_s` limits the seconds of a processor.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from omegaconf import OmegaConf

from largescale.config import Config
from largescale.config.slots import schema_for
from largescale.data.batches import Buffers
from largescale.data.corpora import open_corpora
from largescale.plan.changes import first_guess, fitting_changes
from largescale.plan.simulate import Simulation, simulate
from shards.ground.worker_processes import die_with_parent

_GPU_RESERVE, _HOST_RESERVE = 1.5e9, 0.3e9
"""Bytes beyond those of tensors: context, libraries, workspaces."""

_SLACK = 0.1
"""Share that allocators lose, and by which plans may be off."""

_BELOW_WHAT_FAILED = 0.85
"""What needs more than this share of what has just failed does not fit, however much seems to be free."""


def main() -> None:
    """Read one request from standard input and write the rows that answer it to standard output."""
    die_with_parent()
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"]))
    written = OmegaConf.create(request["config"])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema_for(written.method.name)), written))
    assert isinstance(config, Config)
    ranks, images = request["ranks"], sum(int(corpus.shard_sizes().sum()) for corpus in open_corpora(config.data))

    def needed(changed: Config, step: Simulation) -> float:
        beyond = _GPU_RESERVE if request["on_gpu"] else _HOST_RESERVE + _of_the_host(changed, step, ranks)
        return (step.most_held + beyond) * (1 + _SLACK)

    failed = simulate(config, ranks, images)
    _write(needed=needed(config, failed))
    available = min(request["available"], _BELOW_WHAT_FAILED * needed(config, failed))
    guess = first_guess(config, ranks, failed, available=available, needed=needed)
    if guess is not None:
        _write(overrides=guess.overrides, needed=guess.needed, fits=True, guessed=True)
    for change in fitting_changes(config, ranks, failed, available=available, needed=needed, images=images):
        _write(overrides=change.overrides, needed=change.needed, fits=change.fits)


def _of_the_host(config: Config, step: Simulation, ranks: int) -> int:
    """Bytes beyond those of a step that is done in host memory: loaded batches, and the copy that is saved."""
    batches = config.data.prefetch + 1 if config.data.workers else 1
    room = Buffers.num_bytes(
        config.data, config.train.global_batch // ranks, config.method.facts, config.method.sounds()
    )
    loaded = batches * room
    return loaded + step.weights + step.optimizer + step.buffers


def _write(**row: Any) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
