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

A window of sound is drawn in one way whatever it is used for: it is its own image's, and any other's that draws it. So
where it starts, and what codecs leave there, says nothing (section 3.1; `largescale/data/sounds.py`).

Departures: the image network is `model.backbone`, with the mean of its last maps, not a VGG with their maximum. Two
clips of one video may meet as strangers, more rarely the more videos there are; so may those of one image that a list
pairs with several sounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from largescale.config import Config, MethodConfig, SoundConfig, require
from largescale.config.setting import setting
from largescale.data.device_random import uniform
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.over_ranks import all_ranks, gathered, own_places
from largescale.methods.method import Output, Panel, Sign, Symptom
from largescale.methods.pretext_task import PretextTask
from largescale.models.backbones import build_backbone
from largescale.models.heads import projection_head
from largescale.models.sound_network import SoundNetwork, least_side
from largescale.models.spectrogram import spectrogram_shape
from largescale.optim.roles import Role

_PURPOSE = 47
_UNRELATED = math.sqrt(2)
"""Distance of two unit vectors that have nothing to do with each other."""
_SLOPE = 2.0
_TOO_EASY = 0.998
_LEAST = 1e-12
"""Added to squared distances: at 0 the root has no gradient."""


@dataclass
class Settings(MethodConfig):
    """AVE-Net's keys under `method`."""

    embedding: int = setting(
        128, "Dimension of the space of images and sounds, and of the layer before it.", at_least=2, at_most=2**20
    )
    sound_widths: list[int] = setting(
        [64, 128, 256, 512],
        "Channels of each stage of the network for sounds.",
        at_least=1,
        at_most=2**16,
        min_length=1,
        expected="channels of each stage, at least 1 and at most 65536",
    )
    sound: SoundConfig = field(default_factory=SoundConfig)

    def check(self, config: Config) -> None:
        """There are other samples to take sounds of, and sound enough for the network."""
        together = config.train.global_batch // config.train.accumulate
        require(together > 1, "train.global_batch", config.train.global_batch, "at least 2 per micro-batch")
        shape, least = spectrogram_shape(self.sound.num_samples, self.sound.rate), least_side(len(self.sound_widths))
        require(
            min(shape) >= least,
            "method.sound_widths",
            self.sound_widths,
            f"stages for a spectrogram of {shape[0]} x {shape[1]}, which so many make of at least {least} x {least}; "
            "leave some out, or raise method.sound.seconds or method.sound.rate",
        )

    def sounds(self) -> SoundConfig:
        """A window with every image."""
        return self.sound


class AVC(PretextTask):
    """A network for images, one for sounds, a head on each, and the loss of pairs that belong together and others.

    Signs, beside the share told right: `distance` of an image and its own sound, `distance_of_others`. Evidence:
    `logits` [V, B, 2, 2]: of each view with its own and another sound, that they do not, and that they do, belong
    together.
    """

    title = "AVE-Net"
    reference = "pretext/avc"
    head_name = "projection"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings, self._seed = _settings(config), config.run.seed
        self.backbone, self.num_features = build_backbone(config.model)
        self.hearing = SoundNetwork(settings.sound.rate, settings.sound_widths)
        self.projection = _head(self.num_features, settings.embedding)
        self.sound_projection = _head(self.hearing.num_features, settings.embedding)
        self.match = Match()
        self.signs |= {"distance": Sign(), "distance_of_others": Sign()}

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """They belong together, or not."""
        return 2

    def roles(self) -> list[Role]:
        """What makes logits of distances stays in float32."""
        return [Role("match", "match.*", float32=True)]

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, 3, S, S]."""
        return unit(self.projection(self.backbone(images)))

    def embed_sounds(self, sounds: Tensor) -> Tensor:
        """Unit vectors [B, D] of sounds [B, T]."""
        return unit(self.sound_projection(self.hearing(sounds)))

    def task_views(self, views: Views, step: int) -> Views:
        """With the fact `strangers`, numbers in [0, 1) that say whose sound is the other one, float64 [1, B]."""
        drawn = uniform(self._seed, step, views.ids, _PURPOSE, num=1, device=views.ids.device)
        return views._replace(facts={**views.facts, "strangers": drawn.T})

    def embed(self, views: Views) -> Named:
        """`logits` [V, B, 2, 2] and `distances` [V, B, 2] of all views from their own and another sound.

        Collectives: those of `gather_rows`, for sounds and for ids.
        """
        assert views.sounds is not None
        images = torch.cat([self.embed_images(group) for group in views.images]).unflatten(0, (-1, len(views.ids)))
        sounds, group = self.embed_sounds(views.sounds), all_ranks()
        places = own_places(len(views.ids), group, views.ids.device)
        others = strangers(gathered(views.ids, group), places, views.facts["strangers"][0])
        heard = torch.stack([sounds, gathered(sounds, group)[others]], dim=1)
        distances = ((images[:, :, None] - heard).square().sum(-1) + _LEAST).sqrt()
        return {"logits": self.match(distances), "distances": distances}

    def targets(self, views: Views) -> Named:
        """`wanted`, int64 [V, B, 2]: that own sounds belong and others do not."""
        num_views = sum(map(len, views.images)) // len(views.ids)
        own = torch.tensor([1, 0], device=views.ids.device)
        return {"wanted": own.expand(num_views, len(views.ids), 2)}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The cross entropy of both kinds of pairs. Collectives: none."""
        output = super().loss(inputs, ids, step)
        own, others = inputs["distances"].detach().unbind(-1)
        return output._replace(signs=output.signs | {"distance": own.mean(), "distance_of_others": others.mean()})

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That sounds are not told from those of others, or all of them at once."""
        [not_learnt] = super().symptoms(config)
        rate = config.optim.lr
        return [
            replace(
                not_learnt,
                meaning="what is heard is not found in what is seen",
                remedy="Look whether sounds belong to their frames (`shards info SHARDS --html PAGE`). Try, in another "
                f"run.dir, optim.lr={rate / 3:.2g} or {3 * rate:.2g}, or a longer run",
            ),
            Symptom(
                "task too easy",
                sign=lambda row: row.get("task_accuracy"),
                sick=(_TOO_EASY, 1),
                recovery="down",
                seen=lambda row: f"{row['task_accuracy']:.1%} of the pairs are told right",
                meaning="there is nothing left to learn, and something else than what sounds may give pairs away",
                remedy="Look for what tells videos apart both in pictures and in sound (borders and logos, a hum, the "
                "end of a band of frequencies), or train for fewer epochs",
                in_settings=True,
            ),
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Also how far apart images and sounds are."""
        distances = {"own sound": "distance", "another's": "distance_of_others"}
        return [*super().panels(config), Panel("Distance of an image from a sound", distances, limits=(0, 2))]


class Match(nn.Linear):
    """Distances [...] to logits [..., 2]: that image and sound do not belong together, always 0, and that they do."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.finish_initialisation()

    @torch.no_grad()
    def finish_initialisation(self) -> None:
        """Far is strange, and what is unrelated has even odds. Works on local pieces."""
        for parameter, value in ((self.weight, -_SLOPE), (self.bias, _SLOPE * _UNRELATED)):
            parameter.fill_(value)

    def forward(self, distances: Tensor) -> Tensor:
        """In the precision of distances, whatever autocast says."""
        belong = distances * self.weight.to(distances.dtype)[0, 0] + self.bias.to(distances.dtype)[0]
        return torch.stack([torch.zeros_like(belong), belong], dim=-1)


def strangers(ids: Tensor, places: Tensor, draws: Tensor) -> Tensor:
    """For some samples of a batch, the place of another one: each other place is as likely. Where that one has the same
    id, the next one in the order of places that has not, from the beginning again behind the end.

    Args:
        ids: of all samples of the batch, int64 [N].
        places: of those that are asked for, int64 [B].
        draws: a number in [0, 1) for each, float64 [B].
    """
    num = len(ids)
    drawn = places + 1 + (draws * (num - 1)).long()
    behind = (torch.arange(num, device=ids.device) - drawn[:, None]) % num
    return behind.masked_fill(ids == ids[places][:, None], num).argmin(1)


def _head(num_features: int, embedding: int) -> nn.Sequential:
    return projection_head(num_features, [embedding], embedding, batchnorm=False)


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
