"""What a method sees of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from largescale.config import SoundConfig, SupportConfig

FACTS = ("boxes", "flips", "times_us")
"""What a method may ask for, by `facts` of its settings."""


class Supports(NamedTuple):
    """The labelled images of this rank's part of a batch, or of one of its micro-batches.

    All ranks' images of a micro-batch are equally many of each of the step's classes.

    Attributes:
        images: augmented, [num * S, 3, s, s], view after view.
        labels: which of the step's classes each is of, 0 to `SupportConfig.classes` - 1, int64 [S].
        ids: their numbers in the folder of labelled images, int64 [S]; not those of `Views.ids`.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def cut(self, parts: int) -> list[Supports]:
        """Those of each of so many micro-batches."""
        images = self.images.unflatten(0, (-1, parts, len(self.ids) // parts)).movedim(1, 0)
        return [
            Supports(images[number].flatten(0, 1).contiguous(memory_format=torch.channels_last), labels, ids)
            for number, (labels, ids) in enumerate(zip(self.labels.chunk(parts), self.ids.chunk(parts), strict=True))
        ]

    @staticmethod
    def numbered(wanted: SupportConfig, images: Tensor, ranks: int = 1) -> Supports:
        """As of rank 0, of samples 0, 1, ..., for plans and benchmarks, which have no stream."""
        ids = torch.arange(wanted.size // ranks, device=images.device)
        return Supports(images, ids % wanted.classes, ids)


class Views(NamedTuple):
    """The views of this rank's part of a batch, or of one of its micro-batches. There are no labels in it, but for
    those of the supports that a method asks for.

    A tuple, since FSDP2 looks for the tensors to cast in tuples but not in data classes.

    Attributes:
        images: augmented, one tensor [num * B, 3, S, S] per crop group, view after view.
        ids: which samples they show, int64 [B]; the same number is the same image in every epoch.
        facts: what the method asked for, where V counts the views of all groups. `boxes`, int64 [V, B, 4]: top, left,
            height and width of each view in the upright image, in its pixels. `flips`, bool [V, B]: which are mirrored.
            `times_us`, int64 [V, B]: of the frame that each view shows, in microseconds from the start of its clip;
            for methods with `MethodConfig.frame_tuples`. Whole numbers, since strategies cast others to the precision
            of views, which may be bf16.
        supports: labelled images, if the method asks for them, by `MethodConfig.supports`.
        sounds: a window of the clip's sound that overlaps the frame that is seen, int16 [B, T], if the method asks for
            it, by `MethodConfig.sounds`.
    """

    images: list[Tensor]
    ids: Tensor
    facts: Mapping[str, Tensor] = MappingProxyType({})
    supports: Supports | None = None
    sounds: Tensor | None = None

    def pixels(self) -> list[Tensor]:
        """All images that the method sees, of supports too."""
        return self.images if self.supports is None else [*self.images, self.supports.images]

    @staticmethod
    def numbered(
        images: list[Tensor], batch: int, facts: Sequence[str] = (), sound: SoundConfig | None = None
    ) -> Views:
        """Views of samples 0, 1, ... `batch` - 1, for plans and benchmarks, which have no stream; with facts and sounds
        that only have the right form.
        """
        device, num_views = images[0].device, sum(map(len, images)) // batch
        empty = {
            "boxes": torch.ones(num_views, batch, 4, dtype=torch.int64, device=device),
            "flips": torch.zeros(num_views, batch, dtype=torch.bool, device=device),
            "times_us": torch.arange(num_views, device=device)[:, None].expand(-1, batch),
        }
        sounds = None if sound is None else torch.zeros(batch, sound.num_samples, dtype=torch.int16, device=device)
        ids, known = torch.arange(batch, device=device), {name: empty[name] for name in facts}
        return Views(images, ids, known, sounds=sounds)
