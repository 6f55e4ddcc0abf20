"""Tracking by colorizing: where in earlier frames is what is seen now? (Vondrick et al., arXiv 1806.09594)

Frames of a clip are seen in grey, and the colours of the last one are copied from the others, in proportion to how
alike places are. Whoever copies rightly has found where things were, without being told. The naive loop::

    before the first step:
        centres = k-means of the colours, a and b of L*a*b*, of the corpus
    in each step:
        for i in clips:
            frames = some frames of i in ascending time
            z[f, p] = projection(backbone's maps of grey frames[f])[p]        # p: a place of the maps
            bin[f, p] = the centre nearest to the colour of the pixel in the middle of p in frames[f]
            for p in places of the last frame:
                alike = softmax over f, q of z[last, p] @ z[f, q]             # of all places of the frames before
                copied = sum over f, q of alike[f, q] * one_hot(bin[f, q])
                loss -= log(copied[bin[last, p]] + 1e-6) / places / B

Departures from the paper: any backbone, and a 1 x 1 convolution in the place of five layers over space and time; the
grey image goes into all three channels; gaps between frames are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import one_hot

from largescale.clustering.kmeans import kmeans
from largescale.config import Config, FrameConfig, MethodConfig, WantedFrames
from largescale.config.setting import setting
from largescale.data.task_views.colour_bins import COLOURLESS, distances
from largescale.data.task_views.lab import lab_of
from largescale.data.views import Views
from largescale.distributed.collectives import sum_over_ranks
from largescale.methods.embedding_method import Named
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Output, Panel, Sign
from largescale.methods.phase import PlainEmbeddings, own_ids
from largescale.methods.pictures import in_grey, in_range
from largescale.methods.pretext_task import PretextTask
from largescale.methods.replicated import replicated
from largescale.models.backbones import build_backbone, feature_map, map_channels, map_side
from largescale.models.heads import CellLinear
from shards.ground.errors import InputError

_LEAST = 1e-6
"""Added to shares: of nothing there is no logarithm."""
_ASKED = 8
"""Places along each side of an image whose colours are clustered."""
_STEP, _REACH = 2, 112
"""Colours are counted on a grid of a and b that all of sRGB lie in: from point to point, and half its side."""
_SIDE = 2 * _REACH // _STEP + 1
_MOST_POINTS = 1 << 18
"""That are clustered, each for as many colours where there are more; less a rounding up for each point of the grid."""
_RESTARTS = 5


@dataclass
class Settings(MethodConfig):
    """Keys under `method`."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    references: int = setting(3, "Frames before the last one, of which its colours are copied.", at_least=1, at_most=64)
    colours: int = setting(16, "Clusters of colours that are told apart.", at_least=2, at_most=2**12)
    embedding: int = setting(64, "Dimension in which places are compared.", at_least=1, at_most=2**20)

    def frame_tuples(self) -> WantedFrames:
        """All in ascending time."""
        count = self.references + 1
        return WantedFrames(count, (tuple(range(count)),), (1.0,), self.frames)


class ColourTracking(PretextTask):
    """Backbone, and a projection of its maps, whose places are compared.

    Signs, beside the share of places told right: `same_place`, the share that would be right if nothing moved, and
    `loss_of_all`, the loss if all places of the frames before were copied alike.
    Evidence: `logits` [1, B, P, K].

    Attributes:
        centres: a and b of the clusters of colours, [K, 2].
        shares: of each cluster among the colours of the corpus, [K].
    """

    centres: Tensor
    shares: Tensor
    title = "Tracking by colorizing"
    reference = "pretext/colour_tracking"
    Settings = Settings
    unlearnt = ("a copy of all places alike", "its own")
    exemplar_state = ("centres", "shares")
    spoilers = MappingProxyType(
        dict.fromkeys(("jitter", "grayscale", "solarise"), "colours that are changed are others than were clustered")
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings, self._run = _settings(config), config
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = CellLinear(map_channels(config.model, self.num_features), settings.embedding)
        self._side = map_side(config.model, config.data.crops[0].size)
        self.register_buffer("centres", torch.zeros(settings.colours, 2), persistent=False)
        self.register_buffer("shares", torch.zeros(settings.colours), persistent=False)
        self.signs |= {"same_place": Sign(), "loss_of_all": Sign()}

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """Clusters."""
        return _settings(config).colours

    def begin(self) -> None:
        """No colour is known before the first phase."""
        self.centres.zero_()
        self.shares.fill_(1 / self._num_classes)

    def phase_due(self, step: int) -> bool:
        """Before the first step."""
        return step == 0

    def phase_sums(self, step: int) -> bool:
        """Counts of the corpus are all that is wanted."""
        return True

    def plain(self, images: Tensor) -> Tensor:
        """How many places all over images have the colour of each point of the grid: [B, points]."""
        a, b = ((self._colours(images, _ASKED).flatten(1, 2) + _REACH) / _STEP).round().long().unbind(-1)
        counts = torch.zeros(len(images), _SIDE**2, device=images.device)
        return counts.scatter_add_(1, a * _SIDE + b, counts.new_ones(a.shape))

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Cluster the colours.

        Raises:
            InputError: no image shows colours, or there are too few images; on all ranks.

        Collectives: one all-reduce, and those of `kmeans`.
        """
        counts = sum_over_ranks({"counts": corpus.vectors.sum(0)})["counts"]
        repeats = (counts * min(1.0, _MOST_POINTS / max(1.0, float(counts.sum())))).ceil().long()
        along = torch.arange(-_REACH, _REACH + 1, _STEP, device=counts.device, dtype=self.centres.dtype)
        points = torch.cartesian_prod(along, along).repeat_interleave(repeats, 0)
        points = points.to(self.centres.device)
        own = own_ids(len(points))
        try:
            found = kmeans(
                points[own.start : own.stop], self._num_classes, seed=self._run.run.seed, restarts=_RESTARTS, beat=beat
            )
        except ValueError as error:
            raise InputError(f"method.colours={self._num_classes}: {error}; lower it, or add clips") from error
        if not (found.centroids.abs() > COLOURLESS).any():
            raise InputError(
                f"data.shards: clips show no colours, which method.name={self._run.method.name} is to copy; train on "
                "coloured ones, or choose another method"
            )
        self.centres.copy_(found.centroids)
        self.shares.copy_(found.sizes / found.sizes.sum())
        return {"commonest_colour": float(self.shares.max()), "colours_used": float((found.sizes > 0).double().mean())}

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Clusters and their shares, which all ranks hold."""
        same = {"centres": self.centres, "shares": self.shares}
        return {name: replicated(value, mesh) for name, value in same.items()}

    def _colours(self, images: Tensor, count: int) -> Tensor:
        """a and b [B, count, count, 2] of normalised images, each of the pixel in the middle of a place."""
        side = images.shape[-1]
        middles = (2 * torch.arange(count, device=images.device) + 1) * side // (2 * count)
        return lab_of(in_range(images[..., middles[:, None], middles], self._run))[:, 1:].movedim(1, -1)

    def task_views(self, views: Views, step: int) -> Views:
        """Grey frames, and as the fact `bins` the clusters of the places of each, int64 [F, B, P]."""
        [images] = views.images
        colours = self._colours(images, self._side).flatten(1, 2)
        bins = distances(colours, self.centres.to(colours.dtype)).argmin(-1)
        shown = in_grey(in_range(images, self._run), self._run, images.dtype)
        return views._replace(images=[shown], facts={"bins": bins.unflatten(0, (-1, len(views.ids)))})

    def embed(self, views: Views) -> Named:
        """`logits` [1, B, P, K]: logarithms of the shares of colours that are copied."""
        maps = self.projection(feature_map(self.backbone, views.images[0])).flatten(2)
        bins = views.facts["bins"]
        places = maps.unflatten(0, (len(bins), -1))  # [F, B, D, P]
        with torch.autocast(maps.device.type, enabled=False):
            places = at_least_float32(places)
            before = places[:-1].permute(1, 2, 0, 3).flatten(2)  # [B, D, (F - 1) * P]
            alike = (places[-1].transpose(1, 2) @ before).softmax(-1)
            known = one_hot(bins[:-1].transpose(0, 1).flatten(1), self._num_classes).to(alike.dtype)
            return {"logits": (alike @ known + _LEAST).log()[None]}

    def targets(self, views: Views) -> Named:
        """`wanted`, the clusters of the last frame, int64 [1, B, P], and `before`, those of the frame before it; `all`,
        the shares of clusters in all frames before, [1, B, K].
        """
        bins = views.facts["bins"]
        known = one_hot(bins[:-1].transpose(0, 1).flatten(1), self._num_classes).to(self.shares.dtype)
        return {"wanted": bins[-1][None], "before": bins[-2][None], "all": known.mean(1)[None]}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The cross entropy, a mean over places. Collectives: none."""
        output = super().loss(inputs, ids, step)
        still = (inputs["before"] == inputs["wanted"]).to(output.loss.dtype).mean()
        of_all = -(inputs["all"][0].gather(1, inputs["wanted"][0]) + _LEAST).log().mean()
        return output._replace(signs=output.signs | {"same_place": still, "loss_of_all": of_all})

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Chance is the share of the most frequent colour; what is right if nothing moves; and the loss over that of a
        copy of all places alike.
        """
        found = super().measures(loss, signs, num_images)
        over = loss / max(found.pop("loss_of_all"), _LEAST)
        return found | {"task_chance": float(self.shares.max()), "loss_over_ln_k": over}

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Also how often colours stay where they are."""
        values = {"share told right": "task_accuracy", "if nothing moved": "same_place", "chance": "task_chance"}
        return [Panel("Task", values, limits=(0, 1.05))]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
