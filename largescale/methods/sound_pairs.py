"""Shared by methods that tell an image's own sound from that of another sample: who is paired with whom, the networks
for both, and what is asked (Objects that Sound, arXiv 1712.06651).

Half of the pairs belong together. The others are of a stranger, drawn among all other samples of the micro-batch by a
hash of (seed, step, sample id), on all ranks together. A window of sound is drawn in one way whatever it is used for:
it is its own image's, and any other's that draws it. So where it starts, and what codecs leave there, says nothing
(section 3.1; `largescale/data/sounds.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from largescale.config import Config, MethodConfig, SoundConfig, require
from largescale.config.setting import setting
from largescale.data.device_random import uniform
from largescale.data.views import Views
from largescale.methods.losses.over_ranks import all_ranks, gathered, own_places
from largescale.methods.method import Symptom
from largescale.methods.pretext_task import PretextTask
from largescale.models.backbones import build_backbone
from largescale.models.heads import projection_head
from largescale.models.sound_network import SoundNetwork, least_side
from largescale.models.spectrogram import spectrogram_shape
from largescale.optim.roles import Role

_PURPOSE = 47
_TOO_EASY = 0.998


@dataclass
class SoundPairSettings(MethodConfig):
    """Keys under `method`."""

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


class SoundPairs(PretextTask):
    """A network for images, one for sounds, and a head on each; a `match` is of those that compare both.

    Evidence: `logits` [V, B, 2, 2]: of each view with its own and another sound, that they do not, and that they do,
    belong together.
    """

    projection: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings, self._seed = _settings(config), config.run.seed
        self.backbone, self.num_features = build_backbone(config.model)
        self.hearing = SoundNetwork(settings.sound.rate, settings.sound_widths)
        self.projection = _head(self.num_features, settings.embedding)
        self.sound_projection = _head(self.hearing.num_features, settings.embedding)

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """They belong together, or not."""
        return 2

    def roles(self) -> list[Role]:
        """What makes logits of comparisons stays in float32."""
        return [Role("match", "match.*", float32=True)]

    def task_views(self, views: Views, step: int) -> Views:
        """With the fact `strangers`, numbers in [0, 1) that say whose sound is the other one, float64 [1, B]."""
        drawn = uniform(self._seed, step, views.ids, _PURPOSE, num=1, device=views.ids.device)
        return views._replace(facts={**views.facts, "strangers": drawn.T})

    def heard(self, sounds: Tensor) -> Tensor:
        """Vectors [B, D] of sounds [B, T]."""
        return self.sound_projection(self.hearing(sounds))

    def targets(self, views: Views) -> dict[str, Tensor]:
        """`wanted`, int64 [V, B, 2]: that own sounds belong and others do not."""
        num_views = sum(map(len, views.images)) // len(views.ids)
        own = torch.tensor([1, 0], device=views.ids.device)
        return {"wanted": own.expand(num_views, len(views.ids), 2)}

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


class Match(nn.Linear):
    """A number times a weight and plus a bias, both trained, in the precision of the number, whatever autocast says.

    Args:
        weight, bias: at the start.
    """

    def __init__(self, weight: float, bias: float) -> None:
        self._start = weight, bias
        super().__init__(1, 1)
        self.finish_initialisation()

    @torch.no_grad()
    def finish_initialisation(self) -> None:
        """Works on local pieces."""
        for parameter, value in zip((self.weight, self.bias), self._start, strict=True):
            parameter.fill_(value)

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits [...] of numbers [...]: that image and sound belong together."""
        return numbers * self.weight.to(numbers.dtype)[0, 0] + self.bias.to(numbers.dtype)[0]


def both_answers(belong: Tensor) -> Tensor:
    """Logits [..., 2] of logits [...]: that image and sound do not belong together, always 0, and that they do."""
    return torch.stack([torch.zeros_like(belong), belong], dim=-1)


def with_strangers(sounds: Tensor, views: Views) -> Tensor:
    """Vectors of each image's own and another's sound, [B, 2, D].

    Args:
        sounds: vectors of the sounds of this rank, [B, D].
        views: with the fact `strangers`.

    Collectives: those of `gather_rows`, for ids and for sounds.
    """
    group = all_ranks()
    places = own_places(len(views.ids), group, views.ids.device)
    others = strangers(gathered(views.ids, group), places, views.facts["strangers"][0])
    return torch.stack([sounds, gathered(sounds, group)[others]], dim=1)


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


def _settings(config: Config) -> SoundPairSettings:
    assert isinstance(config.method, SoundPairSettings)
    return config.method
