"""Colorization: which colours have the parts of a grey image? (arXiv 1603.08511, section 2)

Bins q are points of the plane of a and b in L*a*b* (`largescale/data/task_views/colour_bins.py`). The naive loop::

    before the first step:
        p = shares of the bins among the cells of all images that show colours
        w[q] = 1 / (0.5 smoothed p[q] + 0.5 / Q), then scaled to 1 on average
    in each step:
        for i in images:
            grey = the grey image of i's lightness
            logits = decoder(backbone's maps of grey)           # of a cell of 4 by 4 pixels
            for cell in cells:
                near = 5 bins nearest to the cell's colour      # that of the pixel in its middle
                z = Gaussian of their distance from it, scaled to a sum of 1
                if i shows colours:
                    loss -= w[nearest bin] (z * log softmax(logits[cell])).sum() / cells / B

Departures from the published code: any backbone with a decoder in the place of one VGG; the grey image goes into all
three channels, so that the backbone is an ordinary one; cells of images without colours cost nothing, as there, but
count in the mean; the prior is measured on the corpus, where there it is a file made of ImageNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import interpolate

from largescale.config import Config, require
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.task_views.colour_bins import annealed_mean, coloured, counts_of, gamut, rebalancing, soft_bins
from largescale.data.task_views.lab import grey_of, lab_of, srgb_of
from largescale.data.views import Views
from largescale.distributed.collectives import sum_over_ranks
from largescale.methods.embedding_method import Named
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Output, Panel, Row, Sign, Symptom
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.pictures import Pictures, in_grey, in_range
from largescale.methods.pretext_task import PretextTask
from largescale.methods.replicated import replicated
from largescale.models.backbones import build_backbone, feature_map, map_channels
from largescale.models.decoders import DenseDecoder
from shards.ground.errors import InputError

_MOSTLY_GREY = 0.5


@dataclass
class Settings(MethodConfig):
    """Colorization's keys under `method`."""

    bin_step: int = setting(
        10, "Steps of a and b from one bin to the next; 10 makes 313 bins, 20 makes 101.", at_least=5, at_most=50
    )
    neighbours: int = setting(5, "Bins nearest to a colour that share its target.", at_least=1, at_most=100)
    sigma: float = setting(
        5.0,
        "Standard deviation in steps of a and b of the Gaussians by which a colour is shared among bins, and by which "
        "the prior is smoothed.",
        above=0,
        at_most=1e3,
    )
    uniform_share: float = setting(
        0.5,
        "Share of a uniform distribution in the prior by which rare colours weigh more; 1 weighs all alike.",
        above=0,
        at_most=1,
    )
    temperature: float = setting(
        0.38,
        "Sharpens predictions before their mean colour is taken, for curves and pictures alone: 1 leaves them as they "
        "are.",
        at_least=0.01,
        at_most=1,
    )
    cell: int = setting(
        4,
        "Side in pixels of the cells whose colours are asked; JPEG keeps colours of 2 by 2 pixels.",
        at_least=1,
        at_most=2**10,
    )
    decoder: list[int] = setting(
        [512, 256, 128],
        "Widths of the decoder's layers, which enlarge maps step by step to the grid of cells.",
        at_least=1,
        at_most=2**24,
        min_length=1,
    )

    def check(self, config: Config) -> None:
        """One view, of at least a cell, and enough bins."""
        groups = config.data.crops
        nums = [group.num for group in groups]
        require(nums == [1], "data.crops", nums, "one group of one view, such as [{num: 1, size: 224}]")
        size = groups[0].size
        require(self.cell <= size, "method.cell", self.cell, f"at most {size}, the size of views")
        bins = len(gamut(self.bin_step))
        require(
            self.neighbours <= bins,
            "method.neighbours",
            self.neighbours,
            f"at most {bins}, the bins with method.bin_step={self.bin_step}",
        )


class Colorization(PretextTask):
    """Backbone, a decoder of its maps, and the prior of colours. Evidence: none.

    Attributes:
        bins: a and b, [Q, 2]; in no checkpoint, since they never change.
        prior: shares of the bins among colours of the corpus, [Q].
        weights: of colours in the loss, [Q].
    """

    bins: Tensor
    prior: Tensor
    weights: Tensor
    title = "Colorization"
    reference = "pretext/colorization"
    unlearnt = ("one answer for all", "that of the best one")
    exemplar_state = ("prior", "weights")
    Settings = Settings
    pictures = Pictures(
        "Colours predicted",
        "Grey images as the network sees them, and the mean colours that it predicts, spread over cells, on their "
        "lightness.",
        ("grey", "predicted", "image"),
    )
    spoilers = MappingProxyType(
        dict.fromkeys(("jitter", "grayscale", "solarise"), "colours that are changed at random cannot be told")
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config, self._run = _settings(config), config
        self.backbone, self.num_features = build_backbone(config.model)
        channels = map_channels(config.model, self.num_features)
        self.decoder = DenseDecoder(channels, self.config.decoder, self._num_classes)
        self.register_buffer("bins", self._bins(), persistent=False)
        for name in ("prior", "weights"):
            self.register_buffer(name, torch.zeros(self._num_classes), persistent=False)
        names = ("weight", "weight_right", "square_error", "square_chroma", "coloured")
        self.signs = {name: Sign() for name in names}

    def _bins(self) -> Tensor:
        # On the host even where modules are built without memory: weights are put into those, but not these.
        return torch.tensor(gamut(self.config.bin_step), dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def finish_initialisation(self) -> None:
        """Put the bins back where memory was allocated anew."""
        self.bins.copy_(self._bins())

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """Bins."""
        return len(gamut(_settings(config).bin_step))

    def begin(self) -> None:
        """No colour weighs more than another before the prior is known."""
        self.prior.fill_(1 / self._num_classes)
        self.weights.fill_(1)

    def phase_due(self, step: int) -> bool:
        """Before the first step."""
        return step == 0

    def phase_sums(self, step: int) -> bool:
        """Counts of the corpus are all that is wanted."""
        return True

    def plain(self, images: Tensor) -> Tensor:
        """Of images that show colours, how many cells are of each bin, and a 1: [B, Q + 1]; else zeros."""
        colours = self._colours(in_range(images, self._run))
        shows = coloured(colours)[:, None]
        counts = counts_of(colours, self.bins.to(colours.dtype))
        return torch.cat([counts, torch.ones_like(counts[:, :1])], dim=1) * shows

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Take the prior of colours, and weights by it.

        Raises:
            InputError: no image shows colours; on all ranks.

        Collectives: one all-reduce.
        """
        read = corpus.readable.sum().to(corpus.vectors)
        total = sum_over_ranks({"counts": corpus.vectors.sum(0), "read": read})
        counts, colourful = total["counts"][:-1].double(), float(total["counts"][-1])
        if not colourful:
            raise InputError(
                f"data.shards: none of {int(total['read']):,} images shows colours, which method.name=colorization is "
                "to tell; train on coloured ones, or choose another method"
            )
        shares = counts / counts.sum()
        weights = rebalancing(shares, self.bins.double(), self.config.sigma, self.config.uniform_share)
        self.prior.copy_(shares)
        self.weights.copy_(weights)
        return {"coloured_images": colourful / float(total["read"]), "bins_used": float((counts > 0).double().mean())}

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """The prior and weights, which all ranks hold."""
        same = {"prior": self.prior, "weights": self.weights}
        return {name: replicated(value, mesh) for name, value in same.items()}

    def _colours(self, images: Tensor) -> Tensor:
        """a and b of cells [B, h, w, 2] of images in [0, 1]: those of a pixel in the middle of each, since the mean of
        two colours is neither.
        """
        cell = self.config.cell
        count = images.shape[-1] // cell
        middles = images[..., cell // 2 :: cell, cell // 2 :: cell][..., :count, :count]
        return lab_of(middles)[:, 1:].movedim(1, -1)

    def task_views(self, views: Views, step: int) -> Views:
        """Grey views [B, 3, S, S] of the same lightness, and as a fact the colours of their cells [B, h, w, 2]."""
        [images] = views.images
        srgb = in_range(images, self._run)
        return views._replace(images=[in_grey(srgb, self._run, images.dtype)], facts={"colours": self._colours(srgb)})

    def embed(self, views: Views) -> Named:
        """`logits` of the cells' bins, [1, B, h, w, Q]."""
        [grey] = views.images
        logits = self.decoder(feature_map(self.backbone, grey), grey.shape[-1] // self.config.cell)
        return {"logits": logits.movedim(1, -1)[None]}

    def draw(self, views: Views) -> list[Tensor]:
        """Grey images, with the colours that are predicted, and as they are."""
        whole = in_range(views.images[0], self._run)
        logits = self.embed(self.task_views(views, 0))["logits"][0].to(whole.dtype)
        colours = annealed_mean(logits, self.bins.to(whole.dtype), self.config.temperature).movedim(-1, 1)
        spread = interpolate(colours, size=list(whole.shape[-2:]), mode="bilinear")
        predicted = srgb_of(torch.cat([lab_of(whole)[:, :1], spread], dim=1))
        return [grey_of(whole).expand_as(whole), predicted, whole]

    def targets(self, views: Views) -> Named:
        """`colours` of the cells, [1, B, h, w, 2]."""
        return {"colours": views.facts["colours"][None]}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The weighted cross entropy, a mean over cells. Collectives: none."""
        logits, colours = inputs["logits"][0], inputs["colours"][0]
        with torch.autocast(logits.device.type, enabled=False):
            logs = at_least_float32(logits).log_softmax(-1)
            bins, shows = self.bins.to(logs.dtype), coloured(colours)[:, None, None]
            nearest, shares = soft_bins(colours.to(logs.dtype), bins, self.config.neighbours, self.config.sigma)
            weights = self.weights.to(logs.dtype)[nearest[..., 0]] * shows
            loss = -(weights * (logs.gather(-1, nearest) * shares).sum(-1)).mean()
            guess = annealed_mean(logs.detach(), bins, self.config.temperature)
        right = logs.detach().argmax(-1) == nearest[..., 0]
        signs = {
            "weight": weights.mean(),
            "weight_right": (weights * right).mean(),
            "square_error": ((guess - colours).square().sum(-1) * shows).mean(),
            "square_chroma": (colours.square().sum(-1) * shows).mean().to(logs.dtype),
            "coloured": shows.to(logs.dtype).mean(),
        }
        return Output(loss, signs, {})

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """The weighted share of cells told right, that of the best answer that is always the same, the loss over that
        of such an answer, and how far colours are from the mean of what is predicted and from grey.
        """
        found = {name: float(value) for name, value in signs.items()}
        weight, shown = max(found["weight"], 1e-12), max(found["coloured"], 1e-12)
        return {
            "task_accuracy": found["weight_right"] / weight,
            "task_chance": float((self.prior * self.weights).max()),
            "loss_over_ln_k": loss / weight / self._loss_of_one_answer(),
            "colour_error": math.sqrt(found["square_error"] / shown),
            "grey_error": math.sqrt(found["square_chroma"] / shown),
            "coloured": found["coloured"],
        }

    def _loss_of_one_answer(self) -> float:
        """Of the best answer that is always the same, over the weights, if colours were in the middle of their bins:
        the entropy of the mean of what is wanted.
        """
        nearest, shares = soft_bins(self.bins, self.bins, self.config.neighbours, self.config.sigma)
        shares = (self.prior * self.weights)[:, None] * shares
        wanted = torch.zeros_like(self.prior).index_add_(0, nearest.flatten(), shares.flatten())
        return max(float(torch.special.entr(wanted).sum()), 1e-12)

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Also that most images show no colours."""
        grey = Symptom(
            "most images are grey",
            sign=lambda row: row.get("coloured"),
            sick=(0, _MOSTLY_GREY),
            recovery="up",
            seen=lambda row: f"{row['coloured']:.0%} of the images show colours",
            meaning="there is nothing to learn from the others",
            remedy="Train on coloured images, or choose another method",
            in_settings=True,
        )
        return [*super().symptoms(config), grey]

    @classmethod
    def brief(cls, row: Row) -> str:
        """The weighted share told right, and how far off colours are."""
        return f"{super().brief(row)}, colours off by {row['colour_error']:.1f}" if "colour_error" in row else ""

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Also how far colours are off."""
        curves = {"mean of what is predicted": "colour_error", "always grey": "grey_error"}
        return [*super().panels(config), Panel("Distance of colours from the right ones", curves)]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
