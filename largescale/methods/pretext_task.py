"""Shared by pretext tasks that are classifications: the network has to tell what was done to an image.

The loss is the cross entropy over K classes, which say what was done and not what the image shows. A network that knows
nothing has a loss of ln K and is right once in K times; where classes are not equally frequent, the loss is their
entropy, which takes the place of ln K, and it is right as often as the most frequent one. `task_accuracy` is the share
of right answers. It says how well the task is solved, not how good the features are: a task solved by a shortcut, such
as brightness or lens colours, teaches nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from largescale.config import Config
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Output, Panel, Row, Sign, Symptom

_CHANCE = 0.98
"""Of ln K: predictions say nothing."""
_SOLVED = 0.98


class PretextTask(EmbeddingMethod):
    """A method whose `embed` gives `logits` [1, B, ..., K] and whose `targets` gives `wanted`, int64 [1, B, ...].

    Evidence: `logits`.

    Attributes:
        unlearnt: what predictions are called that say nothing, and the loss of these.
    """

    has_answers = True
    unlearnt: ClassVar[tuple[str, str]] = ("uniform", "ln K")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._num_classes, self._shares = self.num_classes(config), self.class_shares(config)
        self.signs = {"task_accuracy": Sign()}

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """K."""
        raise NotImplementedError

    @classmethod
    def class_shares(cls, config: Config) -> Sequence[float]:
        """How often each class is the right answer."""
        return [1 / cls.num_classes(config)] * cls.num_classes(config)

    @classmethod
    def missing(cls, config: Config) -> str:
        """What keeps shortcuts from solving the task but is switched off, and how to switch it on; or empty."""
        return ""

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The cross entropy, a mean over images and over what is asked of each. Collectives: none."""
        logits, wanted = inputs["logits"].flatten(0, -2), inputs["wanted"].flatten()
        with torch.autocast(logits.device.type, enabled=False):
            logits = at_least_float32(logits)
            loss = cross_entropy(logits, wanted)
        right = (logits.detach().argmax(1) == wanted).to(logits.dtype).mean()
        return Output(loss, {"task_accuracy": right}, {"logits": inputs["logits"].detach()})

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """The share told right, that of chance, and the loss over ln K."""
        own = {"task_chance": max(self._shares), "loss_over_ln_k": loss / _entropy(self._shares)}
        return own | super().measures(loss, signs, num_images)

    @classmethod
    def brief(cls, row: Row) -> str:
        """The share told right."""
        return f" ({row['task_accuracy']:.1%} right)" if "task_accuracy" in row else ""

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of predictions that are the same for all."""
        shares = cls.class_shares(config)
        uniform = max(shares) == min(shares)
        return {"ln K (uniform predictions)" if uniform else "entropy of the classes": _entropy(shares)}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That the task is not learnt, or that it is solved while a cure of shortcuts is off."""
        missing, (guess, its_loss) = cls.missing(config), cls.unlearnt
        found = [
            Symptom(
                "task is not learnt",
                sign=lambda row: row.get("loss_over_ln_k"),
                sick=(_CHANCE, math.inf),
                recovery="down",
                seen=lambda row: (
                    f"predictions are no better than {guess} (loss {row['loss_over_ln_k']:.0%} of {its_loss})"
                ),
                remedy=f"Try, in another run.dir, optim.lr={config.optim.lr / 3:.2g} or {3 * config.optim.lr:.2g}, a "
                "longer run, or weaker data.augment",
                meaning="the network does not see what was done to images",
                by_rate=True,
            )
        ]
        if missing:
            found.append(
                Symptom(
                    "task may be solved by a shortcut",
                    sign=lambda row: row.get("task_accuracy"),
                    sick=(_SOLVED, 1),
                    recovery="down",
                    seen=lambda row: f"{row['task_accuracy']:.1%} of the answers are right",
                    remedy=missing,
                    meaning="perhaps they are told by traces that say nothing of images",
                    in_settings=True,
                )
            )
        return found

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Accuracy against chance."""
        return [Panel("Task", {"share told right": "task_accuracy", "chance": "task_chance"}, limits=(0, 1.05))]


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares)
