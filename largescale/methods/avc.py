"""AVE-Net: do a picture and a sound belong together? (Objects that Sound, arXiv 1712.06651, section 3).

A clip's frame is seen and its sound heard around that moment; half of the time it is the sound of another clip. To
tell which, networks for both have to find what sounds, without a label. Both end in one space, where distance alone
decides::

    for i in images:
        j = another sample of the micro-batch                   # of all ranks, by a hash of (seed, step, id of i)
        for view in views of i:
            near = match(|z(view) - s(i)|)                      # unit vectors; slope * distance + shift, both trained
            far = match(|z(view) - s(j)|)
            loss += -log sigmoid(near) / 2 - log sigmoid(-far) / 2
    loss /= number of views

The paper's layer of one input and two outputs before a softmax is the same function with one more number of each
kind. Its sign is right from the start, and unrelated vectors, sqrt(2) apart, have even odds.

Departures: the image network is `model.backbone`, with the mean of its last maps, not a VGG with their maximum. Two
clips of one video may meet as strangers, more rarely the more videos there are; so may those of one image that a list
pairs with several sounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.config import Config
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import unit
from largescale.methods.method import Output, Panel, Sign
from largescale.methods.sound_pairs import Match, SoundPairs, SoundPairSettings, both_answers, with_strangers

_UNRELATED = math.sqrt(2)
"""Distance of two unit vectors that have nothing to do with each other."""
_SLOPE = 2.0
_LEAST = 1e-12
"""Added to squared distances: at 0 the root has no gradient."""


@dataclass
class Settings(SoundPairSettings):
    """AVE-Net's keys under `method`."""


class AVC(SoundPairs):
    """The loss of pairs that belong together and others, by distances of whole images from sounds.

    Signs, beside the share told right: `distance` of an image and its own sound, `distance_of_others`.
    """

    title = "AVE-Net"
    reference = "pretext/avc"
    head_name = "projection"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.match = Match(-_SLOPE, _SLOPE * _UNRELATED)  # far is strange, and what is unrelated has even odds
        self.signs |= {"distance": Sign(), "distance_of_others": Sign()}

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, 3, S, S]."""
        return unit(self.projection(self.backbone(images)))

    def embed_sounds(self, sounds: Tensor) -> Tensor:
        """Unit vectors [B, D] of sounds [B, T]."""
        return unit(self.heard(sounds))

    def embed(self, views: Views) -> Named:
        """`logits` [V, B, 2, 2] and `distances` [V, B, 2] of all views from their own and another sound.

        Collectives: those of `with_strangers`.
        """
        assert views.sounds is not None
        images = torch.cat([self.embed_images(group) for group in views.images]).unflatten(0, (-1, len(views.ids)))
        heard = with_strangers(self.embed_sounds(views.sounds), views)
        distances = ((images[:, :, None] - heard).square().sum(-1) + _LEAST).sqrt()
        return {"logits": both_answers(self.match(distances)), "distances": distances}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The cross entropy of both kinds of pairs. Collectives: none."""
        output = super().loss(inputs, ids, step)
        own, others = inputs["distances"].detach().unbind(-1)
        return output._replace(signs=output.signs | {"distance": own.mean(), "distance_of_others": others.mean()})

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Also how far apart images and sounds are."""
        distances = {"own sound": "distance", "another's": "distance_of_others"}
        return [*super().panels(config), Panel("Distance of an image from a sound", distances, limits=(0, 2))]
