"""The settings of support batches: labelled images beside those that are trained on, for methods that ask for them."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config.setting import setting


@dataclass
class SupportConfig:
    """Which labelled images there are, and how many of them join each step."""

    shards: str = setting(
        "",
        "Shard folder with the labelled images, on this machine; empty takes data.shards, if that is one folder.",
        free=True,
        place=True,
    )
    subset: str = setting(
        "",
        "File that lists the images whose labels may be used, in the forms of data.subset; empty lists all.",
        free=True,
        place=True,
    )
    share: float = setting(
        1.0,
        "Share of the listed images of each class whose labels are used, at least one; chosen by a hash of their "
        "numbers, as `largescale evaluate low-shot` chooses.",
        above=0,
        at_most=1,
    )
    seed: int = setting(0, "Number of that choice: the seed of the splits of low-shot.", at_least=0, at_most=2**62)
    classes: int = setting(960, "Classes per step, others in each step if there are more.", at_least=2, at_most=10**6)
    images: int = setting(7, "Images of each of these classes per step, over all ranks.", at_least=1, at_most=10**6)
    views: int = setting(
        1,
        "Views of each of these images, in size and augmentation those of the first crop group.",
        at_least=1,
        at_most=100,
    )

    @property
    def size(self) -> int:
        """Labelled images per step, over all ranks."""
        return self.classes * self.images
