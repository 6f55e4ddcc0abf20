"""The rounds of a pruning: the mask of each, and the run that trains what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from largescale.checkpoint.folder import Checkpoint, find_latest
from largescale.checkpoint.mask_file import read_about, read_mask, write_mask
from largescale.checkpoint.sharded import shapes
from largescale.checkpoint.state_file import read_state
from largescale.config import Config
from largescale.processes import barrier, from_rank_0, on_rank_0, rank, together
from largescale.prune.find import convolutions, smaller, weights_of
from largescale.prune.rewind import write_rewound
from largescale.prune.same_network import first_weights_of
from largescale.prune.trained import last_checkpoint
from largescale.prune.wish import MASKS, WEIGHTS, Wish
from shards.ground.errors import InputError

MASK = "mask.safetensors"

_OTHER_SEED = 2**32
"""Added to `run.seed` for weights drawn again, far from the seeds that people choose."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruning:
    """A pruning that can be begun or continued.

    Attributes:
        run: folder of the run that is pruned.
        out: folder of the rounds.
        masks: folder of the pruning whose masks are taken; None where they are found.
        trained: the run's last checkpoint.
        rewound: the kept one that rounds train from; None where they begin as the run did.
        wish: how to prune.
        config: the run's, with replacements, for the training of rounds.
    """

    run: Path
    out: Path
    masks: Path | None
    trained: Checkpoint
    rewound: Checkpoint | None
    wish: Wish
    config: Config

    def rounds(self) -> Iterator[Round]:
        """All rounds, in order."""
        for number in range(1, self.wish.rounds + 1):
            yield Round(self, number)

    def folder(self, number: int) -> Path:
        """The folder of a round."""
        return self.out / name_of(number)

    def mask_to_copy(self, number: int) -> Path:
        """The file whose masks a round takes, where they are not found."""
        assert self.masks is not None
        return self.masks / name_of(number) / MASK


def name_of(number: int) -> str:
    """Name of a round's folder."""
    return f"round-{number:02d}"


@dataclass(frozen=True)
class Round:
    """One round, counted from 1."""

    of: Pruning
    number: int

    @property
    def folder(self) -> Path:
        """Of the run that trains what is left."""
        return self.of.folder(self.number)

    @property
    def mask_path(self) -> Path:
        """Of the file of masks."""
        return self.folder / MASK

    @property
    def config(self) -> Config:
        """Of that run."""
        base, wish = self.of.config, self.of.wish
        model = replace(base.model, mask=str(self.mask_path))
        if wish.random == WEIGHTS:
            base = replace(base, init_from="", run=replace(base.run, seed=base.run.seed + _OTHER_SEED))
            model = replace(model, weights="")
        elif self.of.rewound is None:
            base = replace(base, init_from=first_weights_of(self.of.trained, base))
        mirror = base.checkpoint.mirror and f"{base.checkpoint.mirror}/{self.of.out.name}/{self.folder.name}"
        return replace(
            base,
            name=f"{base.name}-{self.of.out.name}-{self.number:02d}",
            run=replace(base.run, dir=str(self.folder)),
            model=model,
            checkpoint=replace(base.checkpoint, mirror=mirror),
        )

    def prepare(self) -> None:
        """Write the mask, and the checkpoint that training continues from, as far as they are not there.

        Raises:
            InputError: the checkpoint or mask that it follows from is not there, or nothing is left to prune.

        Collectives: every rank must call it.
        """
        if not from_rank_0(self.mask_path.is_file()):
            if self.of.masks:
                on_rank_0(self._copy)
            else:
                self._find()
        barrier()
        masks = together(lambda: read_mask(self.config))
        if rank() == 0:
            _say(self, masks)
        has_begun = from_rank_0(rank() == 0 and find_latest(self.folder / "checkpoints") is not None)
        if self.of.rewound is not None and not has_begun:
            write_rewound(self.of.rewound, self.config, masks)

    def _write(self, masks: dict[str, Tensor], first: dict[str, Tensor], by: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        before = {name: first.get(name, torch.ones_like(mask)) for name, mask in masks.items()}
        about = {
            "round": str(self.number),
            "left": str(_left(masks)),
            "weights": str(sum(mask.numel() for mask in masks.values())),
            "left_in_run": str(_left(before)),
            "by": by,
        }
        write_mask(self.mask_path, masks, about)

    def _copy(self) -> None:
        """Take the masks of another pruning."""
        source = self.of.mask_to_copy(self.number)
        first = _first_masks(self.of.config, self.of.trained, convolutions(self.of.config))
        self._write(read_state(source).tensors, first, read_about(source).get("by", "others"))

    def _find(self) -> None:
        """Find the mask, and write it."""
        wish = self.of.wish
        names = together(lambda: convolutions(self.of.config))
        follows = not (wish.one_shot or wish.random == MASKS or self.number == 1)
        again = "remove {path} and run the same command again"
        source = last_checkpoint(self.of.folder(self.number - 1), again) if follows else self.of.trained
        weights = weights_of(source, names)
        first = _first_masks(self.of.config, self.of.trained, names)
        kept = together(lambda: read_mask(Round(self.of, self.number - 1).config)) if follows else first
        left = wish.left(_left({name: first[name] for name in names}))[self.number]
        if left == 0:
            raise InputError(f"round {self.number}: no weight would be left; pass --rounds={self.number - 1}")
        num = sum(int(kept[name].sum()) for name in names) - left
        beside = {name: mask for name, mask in kept.items() if name not in names}  # of a mask that the run itself has
        found = smaller(weights, kept, num, drawn=self.of.config.run.seed if wish.random == MASKS else None)
        by = "a draw" if wish.random == MASKS else "magnitude"
        on_rank_0(lambda: self._write(beside | found, first, by))


def _left(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _first_masks(config: Config, trained: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    """What is left before the first round: everything, or what the mask of the run itself leaves."""
    own = read_mask(config) if config.model.mask else {}
    sizes = shapes(trained)
    whole = {name: torch.ones(sizes[f"model.backbone.{name}"], dtype=torch.bool) for name in names}
    return whole | own


def _say(one: Round, masks: dict[str, Tensor]) -> None:
    left, all_ = _left(masks), sum(mask.numel() for mask in masks.values())
    _log.info(
        "round %d of %d: %s of %s weights of convolutions are left (%.3g%%); %s",
        one.number,
        one.of.wish.rounds,
        f"{left:,}",
        f"{all_:,}",
        100 * left / all_,
        one.folder,
    )
    if empty := [name for name, mask in sorted(masks.items()) if not mask.any()]:
        _log.warning(
            "round %d: no weight is left in %d of %d convolutions, such as %s",
            one.number,
            len(empty),
            len(masks),
            empty[0],
        )
