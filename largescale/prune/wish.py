"""What a user wants of `largescale prune`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shards.ground.errors import InputError

WEIGHTS, MASKS = "weights", "masks"


@dataclass(frozen=True)
class Wish:
    """How to prune.

    Attributes:
        rate: part of the weights left that each round prunes.
        rounds: how many.
        rewind: step of the run whose weights each round trains from; 0 is where the run began.
        one_shot: every round prunes the run's own last weights; else those of the round before.
        random: a control: `weights` are drawn again under the masks of another pruning; or `masks` are drawn.
    """

    rate: float = 0.2
    rounds: int = 10
    rewind: int = 0
    one_shot: bool = False
    random: str = ""

    def check(self) -> None:
        """Check values, and which go together.

        Raises:
            InputError: naming the option.
        """
        if not 0 < self.rate < 1:
            raise InputError(f"--rate={self.rate:g}: expected a number between 0 and 1, such as 0.2")
        if self.rounds < 1:
            raise InputError(f"--rounds={self.rounds}: expected at least 1")
        if self.rewind < 0:
            raise InputError(f"--rewind={self.rewind}: expected a step of the run, at least 0")
        if self.random and self.one_shot:
            raise InputError(f"--one-shot: --random {self.random} prunes no trained weights; leave one of them out")
        if self.random == WEIGHTS and self.rewind:
            raise InputError("--rewind: --random weights begins with weights drawn again; leave one of them out")

    @property
    def folder(self) -> str:
        """Name of the folder in the run's, where no other is given."""
        kind = f"-random-{self.random}" if self.random else "-one-shot" if self.one_shot else ""
        return f"pruning{kind}"

    def stamp(self) -> dict[str, Any]:
        """What must be the same where a pruning goes on; there may be more rounds."""
        return {name: value for name, value in asdict(self).items() if name != "rounds"}

    def left(self, num_weights: int) -> list[int]:
        """How many weights are left after each round, from 0 on: each prunes `round(rate * left)`, as torch does."""
        counts = [num_weights]
        for _ in range(self.rounds):
            counts.append(counts[-1] - round(self.rate * counts[-1]))
        return counts
