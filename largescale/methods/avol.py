"""AVOL-Net: where in a picture is what sounds? (Objects that Sound, arXiv 1712.06651, section 4)

Pairs and strangers are AVE-Net's (`sound_pairs.py`). Here each place of the last maps is compared with the sound, and
the place that fits best answers for the picture: so it has to be the one that sounds, though none is ever told::

    for i in images:
        j = another sample of the micro-batch                   # as of AVE-Net
        for view in views of i:
            near = max over places p of (scale * z(view)[p] @ s(i) + shift)     # vectors of any length
            far = max over places p of (scale * z(view)[p] @ s(j) + shift)
            loss += -log sigmoid(near) / 2 - log sigmoid(-far) / 2
    loss /= number of views

Maps are those of `model.backbone`. The published ones are 14 x 14, of a VGG on 224 px; with `model.stem=3x3s2` those of
a ResNet are. Departures: as of AVE-Net; `scale` starts at one over the root of the vectors' width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from largescale.config import Config
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.float32 import at_least_float32
from largescale.methods.pictures import Pictures, in_range
from largescale.methods.sound_pairs import Match, SoundPairs, SoundPairSettings, both_answers, with_strangers
from largescale.models.backbones import feature_map, map_channels
from largescale.models.heads import CellLinear

_HOT = (1.0, 0.15, 0.0)


@dataclass
class Settings(SoundPairSettings):
    """AVOL-Net's keys under `method`: those of AVE-Net."""


class AVOL(SoundPairs):
    """The image's head sees places one by one, and pairs are compared place by place; there is no vector of a whole
    image.
    """

    title = "AVOL-Net"
    reference = "pretext/avol"
    Settings = Settings
    pictures = Pictures(
        "Where it sounds",
        "Images, and in red the places that fit what is heard with them, from the least to the most of each image.",
        ("what sounds", "image"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, Settings)
        width, self._run = config.method.embedding, config
        self.match = Match(width**-0.5, 0.0)  # what points the same way belongs together
        channels = map_channels(config.model, self.num_features)
        self.projection = nn.Sequential(CellLinear(channels, width), nn.ReLU(), CellLinear(width, width))

    def sound_maps(self, images: Tensor, sounds: Tensor) -> Tensor:
        """Logits [B, h, w] that a place belongs to the sound; that of the image is the largest."""
        return self.match(_products(self._places(images), self.heard(sounds)))

    def _places(self, images: Tensor) -> Tensor:
        """Vectors of the places of images: [B, D, h, w]."""
        return self.projection(feature_map(self.backbone, images))

    def embed(self, views: Views) -> Named:
        """`logits` [V, B, 2, 2] of all views with their own and another sound.

        Collectives: those of `with_strangers`.
        """
        assert views.sounds is not None
        heard, num, found = with_strangers(self.heard(views.sounds), views), len(views.ids), []
        for images in views.images:
            seen = self._places(images)
            count = len(seen) // num
            best = [self.match(_products(seen, one.repeat(count, 1)).amax((1, 2))) for one in heard.unbind(1)]
            found.append(torch.stack(best, dim=1).unflatten(0, (count, num)))
        return {"logits": both_answers(torch.cat(found))}

    def draw(self, views: Views) -> list[Tensor]:
        """In red where images fit what is heard, and the images."""
        assert views.sounds is not None
        [images] = views.images
        whole = in_range(images, self._run)
        maps = self.sound_maps(images, views.sounds).to(whole.dtype)[:, None]
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        heat = interpolate((maps - low) / (high - low).clamp_min(1e-12), size=list(whole.shape[-2:]), mode="bilinear")
        hot = torch.tensor(_HOT, dtype=whole.dtype, device=whole.device)[:, None, None]
        return [(1 - heat) * whole * 0.5 + heat * (0.3 * whole + 0.7 * hot), whole]


def _products(places: Tensor, heard: Tensor) -> Tensor:
    """Of vectors of places [B, D, h, w] and of sounds [B, D], in float32 at least: [B, h, w]."""
    with torch.autocast(places.device.type, enabled=False):
        return torch.einsum("bdhw,bd->bhw", at_least_float32(places), at_least_float32(heard))
