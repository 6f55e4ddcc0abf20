"""PIRL: an image and its shuffled patches are found among all images of the corpus, by a bank of what they were like
(arXiv 1912.01991, section 3).

Of an image i, v is the embedding of a view, p that of its patches in random order, m[i] its row of the bank; all are
unit vectors. Noise-contrastive estimation asks of every similarity whether it is of the image or of n others, drawn
from all N. The naive loop::

    def h(a, b):                                                # probability that it is of the image
        P = exp(a @ b / temperature) / Z
        return P / (P + n / N)

    others = n images at random                                 # the same ones for all images of a step
    for i in images:
        for z in (p[i], v[i]):                                  # each counts one half
            loss += -log(h(z, m[i])) / 2
            for j in others:
                loss += -log(1 - h(z, m[j])) / 2
    loss /= B
    for i in images:                                            # after the step
        m[i] = unit(bank_momentum * m[i] + (1 - bank_momentum) * v[i])

Z is N times the mean of exp(z @ m / temperature) over all similarities of the first (micro-)batch, and stays.

The bank starts from random unit vectors, as in the published code, where epochs are many. In a run of a few it can
start from the network: a row is renewed once per epoch, half of it, so that random ones are what most of such a run
would teach.

Three departures from the published code. Patches are cut out of an augmented view, so photometric changes are those of
the view, not of each patch. The images at random are drawn from (seed, step) for all ranks, so that a step does not
depend on how many there are; of 32,000 one or two may be of the batch, as there. And BatchNorm's running statistics are
those of images alone: features of images are what is evaluated, and patches have other statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import softplus

from largescale.config import Config, require
from largescale.config.setting import setting
from largescale.data.device_random import uniform
from largescale.data.length import Length
from largescale.data.task_views.tiles import Grid, shuffled_tiles
from largescale.data.views import Views
from largescale.distributed.collectives import exchanging, gather_rows
from largescale.methods.choice import Choice
from largescale.methods.contrastive import Contrastive, ContrastiveSettings
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.picks import Picks
from largescale.methods.method import Output
from largescale.methods.phase import PlainEmbeddings, centred
from largescale.methods.replicated import replicated
from largescale.methods.rows_by_id import RowsById, too_many_rows
from largescale.methods.state_size import bytes_per_number
from largescale.methods.tile_task import require_visible
from largescale.models.backbones import build_backbone
from largescale.models.evaluation_mode import running_statistics_used
from largescale.models.heads import hidden_widths, projection_head
from largescale.models.running_statistics import statistics_untouched
from largescale.processes import rank, world_size

_FEW_EPOCHS = 3
_PATCH_OF_CELL = 64 / 75
"""Sides; the published ones (arXiv 1912.01991)."""
_PURPOSE = 41
"""Keeps the numbers that choose images at random apart from others of the same seed and step."""


@dataclass
class Settings(ContrastiveSettings):
    """PIRL's keys under `method`."""

    hidden: list[int] = hidden_widths(())
    temperature: float = setting(0.07, "Divides cosines.", at_least=1e-6, at_most=1e6)
    cells: int = setting(
        3, "Cells along a side of the second view, each of which gives a patch.", at_least=1, at_most=16
    )
    patch: int = setting(64, "Side of a patch in pixels, at most that of a cell.", at_least=1, at_most=2**20)
    negatives: int = setting(
        32000, "Images at random that similarities are compared with, in every step.", at_least=1, at_most=2**31
    )
    bank_momentum: float = setting(
        0.5, "Fraction of itself that an image's row of the bank keeps when the image is met.", at_least=0, at_most=1
    )
    bank_start: str = setting(
        "random",
        "What the bank holds of an image before it is met: a random unit vector, or the untrained network's embedding "
        "minus the mean of all, which costs a pass over the images and suits runs of few epochs.",
        one_of=("random", "network"),
    )
    max_bank_gb: float = setting(
        16.0,
        "Largest part of the bank in GB on a rank, with the embeddings that method.bank_start=network fills it from; a "
        "larger one is refused before anything is read.",
        above=0,
        at_most=1e9,
        free=True,
    )

    def check(self, config: Config) -> None:
        """Two crop groups of a view each; the patches fit into the second."""
        groups = config.data.crops
        require(
            [group.num for group in groups] == [1, 1],
            "data.crops",
            [group.num for group in groups],
            "two groups of one view each, the image and what patches are cut from, such as [{num: 1, size: 224}, "
            "{num: 1, size: 255, scale: [0.6, 1.0]}]",
        )
        cell = groups[1].size // self.cells
        require(self.patch <= cell, "method.patch", self.patch, f"at most {cell}, the side of a cell of data.crops.1")
        require_visible(config, "method.patch", self.patch)


class PIRL(Contrastive):
    """Backbone, a head for images and one for patches, the bank by sample id, and the loss of a batch.

    Evidence: `embeddings` [2, B, D] of patches and images.
    """

    title = "PIRL"
    reference = "pirl/resnet50_200ep"
    head_name = "projection"
    Settings = Settings
    log_z: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert isinstance(config.method, Settings)
        settings = self.config = config.method
        self._seed, self._micro_batches = config.run.seed, config.train.accumulate
        self._piece = config.train.global_batch // self._micro_batches // world_size()
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(self.num_features, settings.hidden, settings.embedding, batchnorm=False)
        self.patch_projection = nn.Linear(self.num_features, settings.embedding)
        self.patches_together = nn.Linear(settings.cells**2 * settings.embedding, settings.embedding)
        self.bank = RowsById(settings.embedding)
        self.register_buffer("log_z", torch.zeros(1), persistent=False)
        self.signs = self.contrastive_signs(settings.embedding)
        self._fresh: list[tuple[Tensor, Tensor]] = []
        self._others: Tensor | None = None

    @classmethod
    def young_epochs(cls, config: Config) -> float:
        """An epoch that fills the memory and one that compares with what is in it, unless it is full from the start."""
        assert isinstance(config.method, Settings)
        return 0.0 if config.method.bank_start == "network" else 2.0

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """The bank may be too large, or what fills it."""
        assert isinstance(config.method, Settings)
        width, number, most = config.method.embedding, bytes_per_number(config), config.method.max_bank_gb
        line = too_many_rows(length.num_samples, width, number, key="method.max_bank_gb", max_gb=most)
        size, ranks = cls.phase_bytes(config, length.num_samples) / 1e9, world_size()
        if line or size <= most:
            return line
        return (
            f"method.max_bank_gb={most:g}: the bank and the embeddings that fill it before the first step take "
            f"{size:.3g} GB on each of {ranks} rank{'s' * (ranks > 1)}; use more ranks or a smaller method.embedding, "
            "raise it, or set method.bank_start=random"
        )

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks: the bank, and as many embeddings."""
        assert isinstance(config.method, Settings)
        if config.method.bank_start != "network":
            return 0
        return 2 * -(-images // world_size()) * config.method.embedding * bytes_per_number(config)

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """Patches for the size of the second view, and negatives for the number of images."""
        settings = config.method
        assert isinstance(settings, Settings)
        cell = config.data.crops[-1].size // settings.cells
        negatives = max(1, min(settings.negatives, length.num_samples // 2))
        return {
            "patch": Choice(int(_PATCH_OF_CELL * cell), f"of cells of {cell} px, as 64 of 75 px published"),
            "negatives": Choice(negatives, "at most half of the images: few meet themselves among them"),
        }

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Whether images come back, and whether there are enough of them to be compared with."""
        assert isinstance(config.method, Settings)
        epochs, negatives, images = (
            length.num_steps / length.steps_per_epoch,
            config.method.negatives,
            length.num_samples,
        )
        found = []
        if epochs < _FEW_EPOCHS and config.method.bank_start == "random":
            found.append(
                f"the run has {epochs:.3g} epochs: rows of the bank are random until their image has been met, so most "
                f"of it teaches nothing; set train.epochs={_FEW_EPOCHS} or more, or method.bank_start=network"
            )
        if negatives >= images:
            found.append(
                f"method.negatives={negatives}: as many as there are images, {images:,}, so each meets itself among "
                f"them; set method.negatives={max(1, images // 2)}"
            )
        return [*super().complaints(config, length), *found]

    def begin(self) -> None:
        """Make the bank: random rows, also of images that a phase may find unreadable."""
        self.bank.make_room(self.length.num_samples, key="method.max_bank_gb", max_gb=self.config.max_bank_gb)
        self.bank.draw_unit_rows(self._seed)

    def phase_due(self, step: int) -> bool:
        """Before the first step, if the bank is to be the network's."""
        return step == 0 and self.config.bank_start == "network"

    def plain(self, images: Tensor) -> Tensor:
        """Embeddings of images: unit vectors [B, D], by BatchNorm's running statistics."""
        with running_statistics_used(self.backbone.modules()):
            return unit(self.projection(self.backbone(images)))

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Fill the bank; images that could not be read keep random rows. Collectives: those of `centred`."""
        for theirs, rows in centred(corpus):
            self.bank.own[theirs] = rows.to(self.bank.rows.dtype)
        return {}

    def task_views(self, views: Views, step: int) -> Views:
        """The first view as it is, and shuffled patches of the second, [B * cells^2, 3, P, P]."""
        image, second = views.images
        grid = Grid(self.config.cells, self.config.patch)
        cut = shuffled_tiles(second, views.ids, grid, seed=self._seed, step=step)
        return views._replace(images=[image, cut.contiguous(memory_format=torch.channels_last)])

    def embed(self, views: Views) -> Named:
        """`embeddings` [2, B, D] of patches and images, unit vectors."""
        images, patches = views.images
        image = self.projection(self.backbone(images))
        with statistics_untouched(self.backbone.modules()):
            each = self.patch_projection(self.backbone(patches)).unflatten(0, (len(images), -1))
        return {"embeddings": unit(torch.stack([self.patches_together(each.flatten(1)), image]))}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; all of a step see the bank as it was before.

        Collectives: an all-gather of ids and one of embeddings, an all-reduce of the rows of the batch and, in a step's
        first micro-batch, of the images at random; in the first step also one of a number.
        """
        z = inputs["embeddings"]
        batch = ids.shape[0]
        all_ids = gather_rows(ids)
        with torch.autocast(z.device.type, enabled=False):
            known, other = (rows.to(z.dtype) for rows in self._read(all_ids, step))
            own = known[rank() * batch : (rank() + 1) * batch]
            logits = torch.cat([(z * own).sum(-1, keepdim=True), z @ other.T], dim=-1) / self.config.temperature
            if step == 0 and not self._fresh:
                self._fix_z(logits.detach())
            # log(P N / n), whose sigmoid is h.
            odds = logits - self.log_z.to(z.dtype) + math.log(self.length.num_samples / self.config.negatives)
            loss = (softplus(-odds[..., 0]) + softplus(odds[..., 1:]).sum(-1)).mean()
            self._keep(z[1].detach(), known, all_ids)
        picks = Picks.of(logits[0, :, :1], logits[0, :, 1:])  # of what is known of its image, by patches
        return Output(loss, self.watch(z[1], z[0], picks), {"embeddings": z.detach()})

    def _read(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Rows of some images, and those of the images at random, which all micro-batches of a step share."""
        if self._others is not None:
            return self.bank.read(ids), self._others
        draws = uniform(self._seed, step, _PURPOSE, num=self.config.negatives, device=ids.device)
        others = (draws * self.length.num_samples).long()
        known, self._others = self.bank.read(torch.cat([ids, others])).split([len(ids), len(others)])
        return known, self._others

    @torch.no_grad()
    def _fix_z(self, logits: Tensor) -> None:
        total = logits.double().exp().mean()
        if world_size() > 1:
            with exchanging("normalisation"):
                dist.all_reduce(total)
        self.log_z.copy_((total / world_size() * self.length.num_samples).log())

    @torch.no_grad()
    def _keep(self, images: Tensor, known: Tensor, all_ids: Tensor) -> None:
        """Note what the bank is to hold of these images, and write it once the step's last micro-batch is through."""
        momentum = self.config.bank_momentum
        rows = unit(momentum * known + (1 - momentum) * gather_rows(images))

        def of_micro_batches(values: Tensor) -> list[Tensor]:
            # Ranks hold a piece of each micro-batch: [ranks, micro-batches, B].
            return list(values.unflatten(0, (world_size(), -1, self._piece)).transpose(0, 1).flatten(1, 2))

        self._fresh += zip(of_micro_batches(all_ids), of_micro_batches(rows), strict=True)
        if len(self._fresh) == self._micro_batches:
            ids, new = (torch.cat(parts) for parts in zip(*self._fresh, strict=True))
            self.bank.write(ids, new)
            self._fresh.clear()
            self._others = None

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """The bank, sharded by sample id, and ln Z."""
        return {"bank": self.bank.tensor(mesh), "log_z": replicated(self.log_z, mesh)}

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss if all similarities were those of the first batch."""
        assert isinstance(config.method, Settings)
        n = config.method.negatives
        return {"a guess": math.log(1 + n) + n * math.log(1 + 1 / n)}
