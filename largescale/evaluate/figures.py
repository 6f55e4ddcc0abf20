"""What a checkpoint was measured to be worth, in a few numbers, for the card that travels with exported weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from largescale.checkpoint.folder import Checkpoint
from largescale.checkpoint.model_card import Figure
from largescale.evaluate.made_from import weights_stamp
from largescale.evaluate.results import Record, read_results


def figures_of(run_dir: Path) -> Callable[[Checkpoint], Sequence[Figure]]:
    """A function that finds the results measured on a checkpoint's weights, the newest of each kind."""

    def of_checkpoint(checkpoint: Checkpoint) -> list[Figure]:
        weights = weights_stamp(checkpoint)
        records = [one for one in read_results(run_dir).all if one["made_from"].get("weights") == weights]
        found: dict[tuple[str, str, str], Figure] = {}
        for record in sorted(records, key=lambda one: str(one["measured"])):
            found |= {(one.protocol, one.test, one.measure): one for one in _figures(record)}
        return list(found.values())

    return of_checkpoint


def _figures(record: Record) -> list[Figure]:
    results, test = record["results"], str(record["made_from"]["test_shards"]["name"])
    if "pretrained" not in results:
        return []
    untrained = results.get("untrained", {})
    return [
        Figure(str(record["protocol"]), test, name, value, untrained.get(name))
        for name, value in results["pretrained"].items()
        if isinstance(value, float) and name.startswith(("top", "mean", "mAP", "nmi", "ari"))
    ]
