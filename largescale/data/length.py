"""How long a run is."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config import Config

NOMINAL = 1_281_167
"""Images of ImageNet's training set."""


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        num_steps: of the whole run.
        steps_per_epoch: of one pass over all images.
        num_samples: images of all corpora; their ids are 0 to `num_samples` - 1.
        left_out: images that an epoch leaves out, different ones each epoch.
        num_classes: of which images have labels, for methods that use them; None where nobody looked.
    """

    num_steps: int
    steps_per_epoch: int
    num_samples: int
    left_out: int = 0
    num_classes: int | None = None

    @classmethod
    def nominal(cls, config: Config, images: int = NOMINAL) -> Length:
        """The length of a run whose images are not at hand, as for a plan: by default, as many as ImageNet's."""
        per_epoch = max(1, images // config.train.global_batch)
        return cls(num_steps_of(config, per_epoch), per_epoch, images, images % config.train.global_batch)


def num_steps_of(config: Config, steps_per_epoch: int) -> int:
    """Steps of a run: `train.steps`, or what `train.epochs` makes."""
    return config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
