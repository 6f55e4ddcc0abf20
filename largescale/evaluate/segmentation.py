"""Segmentation by a linear classifier on the frozen network's maps, or by a fully convolutional network (FCN).

linear    BatchNorm and a 1 x 1 convolution, by DINOv3's linear protocol (arXiv 2508.10104) as far as it fits a
          convolutional network: AdamW, a rate of 1e-3 that warms up and falls along a cosine, weight decay 1e-3; no
          dropout
fcn       the whole network, by MoCo's protocol on VOC (arXiv 1911.05722; see `fcn.py`): SGD with momentum 0.9, a rate
          of 0.003, a tenth of it after 70 % and 90 % of the training, weight decay 1e-4, 30,000 steps of 16 images

Both see images of half to twice the size, random crops and flips.
Intersection over union of a class is over the pixels of the centre crops of all test images: shorter side to
`evaluate.resize`, then a square of `evaluate.size`. Masks are resized alike, to the nearest neighbour, and cut; scores
are brought to the crop's size bilinearly. Pixels outside of it do not count, unlike in figures over whole masks at
their own size. The mean is over the classes that occur in what is left of the test masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from largescale.config import Config, EvaluateConfig
from largescale.config.setting import setting
from largescale.distributed.out_of_memory import memory_for
from largescale.evaluate.fcn import Fcn
from largescale.evaluate.image_training import Trial, average_gradients, refuse_no_number, refuse_single_images
from largescale.evaluate.masks import IGNORED, Cut, MaskedImages, centre, random_cut
from largescale.evaluate.own_samples import OwnSamples
from largescale.evaluate.shares import from_all_ranks, total
from largescale.evaluate.stage_maps import StageMaps
from largescale.evaluate.training_recipe import Recipe, batch_for, rate_factor
from largescale.evaluate.training_state import TrainingState
from largescale.parallel.batchnorm import synchronize_batchnorm
from largescale.processes import rank, world_size
from shards.ground.errors import InputError

CHOSEN_ON = "nothing; the rate is given and the last epoch is measured"

_WARM_UP = 0.0375
"""Of the linear classifier's training: 1,500 of 40,000 steps."""
_DROPS = (0.7, 0.9)
"""Shares of the FCN's training after which its rate is a tenth."""
_LINEAR, _FCN = "evaluate.segmentation_head=linear", "evaluate.segmentation_head=fcn"


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    segmentation_masks: str = setting(
        "mask.png",
        "Member of each sample that is its mask: grey or a palette, numbers of classes; 255 is ignored.",
        min_length=1,
        free=True,
    )
    segmentation_head: str = setting(
        "linear",
        "What is trained: linear classifies the pixels of the frozen network's maps, fcn fine-tunes the whole network.",
        one_of=("linear", "fcn"),
        free=True,
    )
    segmentation_batch: int = setting(
        16, "Images per step of training, over all ranks.", at_least=1, at_most=2**31, free=True
    )
    segmentation_stages: list[int] = setting(
        [],
        "Stages of the backbone, counted from 1, whose maps are classified, side by side; empty takes the last.",
        at_least=1,
        used_if=_LINEAR,
        free=True,
    )
    segmentation_epochs: int = setting(
        30, "Epochs of the classifier's training.", at_least=1, at_most=10**6, used_if=_LINEAR, free=True
    )
    segmentation_rate: float = setting(1e-3, "Its learning rate.", above=0, at_most=1e9, used_if=_LINEAR, free=True)
    segmentation_weight_decay: float = setting(
        1e-3, "Its weight decay.", at_least=0, at_most=1e6, used_if=_LINEAR, free=True
    )
    segmentation_fcn_epochs: int = setting(
        45,
        "Epochs of the FCN's training (VOC: 45; Cityscapes: 484).",
        at_least=1,
        at_most=10**6,
        used_if=_FCN,
        free=True,
    )
    segmentation_fcn_rate: float = setting(
        3e-3, "Its learning rate (VOC: 0.003; Cityscapes: 0.01).", above=0, at_most=1e9, used_if=_FCN, free=True
    )
    segmentation_fcn_weight_decay: float = setting(
        1e-4, "Its weight decay.", at_least=0, at_most=1e6, used_if=_FCN, free=True
    )
    segmentation_fcn_width: int = setting(
        256, "Channels of its head.", at_least=1, at_most=65536, used_if=_FCN, free=True
    )


def measure(trial: Trial, config: Settings) -> dict[str, Any]:
    """Mean intersection over union, and that of each class by its number.

    Raises:
        InputError: no masks, masks that are not as they must be, a stage that the backbone does not have, or a loss
            that is not a number.

    Collectives: every rank must call it; those of `MaskedImages`, an all-reduce of gradients and one of a count per
    step, one of the loss now and then, those of BatchNorm, an all-reduce, and two all-gathers of objects.
    """
    train, test = (MaskedImages(part, trial.config, config.segmentation_masks) for part in (trial.train, trial.test))
    num_classes = max(train.num_classes, test.num_classes)
    recipe = _recipe(config)
    network = (
        Fcn(trial, num_classes, config.segmentation_fcn_width, recipe.seed)
        if config.segmentation_head == "fcn"
        else Segmenter(trial, num_classes, config.segmentation_stages)
    )
    _train(network, trial, recipe, train)
    confusion = _confusion(network.eval(), trial, test, num_classes)
    shares = intersections_over_unions(confusion)
    unread = {what: len(from_all_ranks(one.unreadable)) for one, what in ((train, "training"), (test, "test"))}
    if not shares:
        raise InputError(
            f"evaluate.segmentation_masks={config.segmentation_masks}: all pixels of the test crops are ignored"
        )
    return {
        "miou": sum(shares.values()) / len(shares),
        "pixel_accuracy": float(confusion.diagonal().sum() / confusion.sum()),
        "iou_by_class": {str(number): share for number, share in shares.items()},
        "num_classes": len(shares),
        "num_train": len(train.ids),
        "num_test": len(test.ids) - unread["test"],
        "doubts": [
            *(f"{num:,} {what} images are left out: they cannot be read" for what, num in unread.items() if num),
            *(
                f"{one.num_samples - len(one.ids):,} {what} images are left out: they have no "
                f"{config.segmentation_masks}"
                for one, what in ((train, "training"), (test, "test"))
                if len(one.ids) < one.num_samples
            ),
        ],
    }


def _recipe(config: Settings) -> Recipe:
    if config.segmentation_head == "linear":
        return Recipe(
            epochs=config.segmentation_epochs,
            batch=config.segmentation_batch,
            batch_key="evaluate.segmentation_batch",
            trunk_rate=0.0,
            head_rate=config.segmentation_rate,
            weight_decay=config.segmentation_weight_decay,
        )
    return Recipe(
        epochs=config.segmentation_fcn_epochs,
        batch=config.segmentation_batch,
        batch_key="evaluate.segmentation_batch",
        trunk_rate=config.segmentation_fcn_rate,
        head_rate=config.segmentation_fcn_rate,
        weight_decay=config.segmentation_fcn_weight_decay,
        drops=_DROPS,
    )


def intersections_over_unions(confusion: Tensor) -> dict[int, float]:
    """By class that occurs, of pixel counts [C, C]: rows are the truth, columns what was found."""
    hits = confusion.diagonal()
    unions = confusion.sum(0) + confusion.sum(1) - hits
    present = (confusion.sum(1) > 0).nonzero().flatten().tolist()
    return {number: float(hits[number] / unions[number]) for number in present}


class Segmenter(nn.Module):
    """A frozen network and a linear classifier of its maps' pixels: images to scores [B, classes, h, w]."""

    def __init__(self, trial: Trial, num_classes: int, stages: list[int]) -> None:
        super().__init__()
        self.trunk = StageMaps(trial.method)
        size = trial.config.evaluate.size
        maps, _ = self.trunk(torch.zeros(1, 3, size, size, device=trial.device))
        if any(number > len(maps) for number in stages):
            raise InputError(f"evaluate.segmentation_stages={stages}: expected stages from 1 to {len(maps)}")
        self._stages = sorted({number - 1 for number in stages}) or [len(maps) - 1]
        width = sum(maps[number].shape[1] for number in self._stages)
        norm, linear = nn.BatchNorm2d(width), nn.Conv2d(width, num_classes, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            linear.weight.copy_(0.01 * torch.randn(linear.weight.shape, generator=generator))
            nn.init.zeros_(cast(Tensor, linear.bias))
        self.head: nn.Module = nn.Sequential(norm, linear).to(trial.device)
        if world_size() > 1:
            self.head = synchronize_batchnorm(self.head, trial.device)

    @property
    def trained(self) -> nn.Module:
        """What is trained: the classifier."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """Scores of normalised images [B, 3, S, S], as large as the largest of the maps."""
        found, _ = self.trunk(images)
        maps = [found[number] for number in self._stages]
        side = max((tuple(one.shape[2:]) for one in maps), key=math.prod)
        return self.head(torch.cat([_resized(one, side) for one in maps], dim=1))


def _resized(maps: Tensor, side: tuple[int, ...]) -> Tensor:
    same = tuple(maps.shape[2:]) == side
    return maps if same else interpolate(maps, side, mode="bilinear", align_corners=False)


def _train(network: Segmenter | Fcn, trial: Trial, recipe: Recipe, images: MaskedImages) -> None:
    batch = batch_for(recipe, len(images.ids), world_size())
    steps = recipe.epochs * (len(images.ids) // batch)
    optimizer, trained = _optimizer(network, recipe), network.trained.state_dict()
    state = (
        TrainingState(trial.unfinished, trained, optimizer, batch, steps, images.unreadable)
        if trial.unfinished
        else None
    )
    first = state.load() if state else 0
    samples = OwnSamples(images.ids, batch, recipe.seed)
    network.train()
    refuse_single_images(network, batch, recipe)
    source = images.batches(_cuts(trial.config, samples, step) for step in range(first, steps))
    said = f"training on {trial.train.manifest.root.name}"
    with tqdm(
        total=steps, initial=first, desc=said, unit="step", leave=False, mininterval=1, disable=rank() > 0
    ) as bar:
        for step, pair in enumerate(source, first):
            warm_up = 1.0 if recipe.drops else min(1.0, (step + 1) / max(1.0, _WARM_UP * steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.head_rate * warm_up * rate_factor(recipe, step / steps)
            with memory_for(f"lower {recipe.batch_key}"):
                loss = _step(network, trial, pair.image, pair.mask, optimizer)
            if step % 50 == 0 or step + 1 == steps:  # seldom, since the host waits for it
                refuse_no_number(loss, step, steps)
            if state:
                state.save(step + 1)
            bar.update()


def _optimizer(network: Segmenter | Fcn, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = network.trained.parameters()
    if isinstance(network, Segmenter):
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=recipe.weight_decay)


def _step(
    network: Segmenter | Fcn, trial: Trial, images: Tensor, masks: Tensor, optimizer: torch.optim.Optimizer
) -> Tensor:
    truth = masks.to(trial.device).long()
    scores = _resized(network(_normalised(images, trial)), tuple(truth.shape[1:]))
    known = (truth != IGNORED).sum()
    if world_size() > 1:
        dist.all_reduce(known)
    # Summed here and averaged over ranks: the mean over the pixels of the whole batch.
    loss = world_size() * cross_entropy(scores, truth, ignore_index=IGNORED, reduction="sum") / known.clamp_min(1)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if world_size() > 1:
        average_gradients([one.grad for one in network.trained.parameters() if one.grad is not None])
    optimizer.step()
    return loss.detach()


def _normalised(images: Tensor, trial: Trial) -> Tensor:
    mean, std = (
        torch.tensor(values, device=trial.device)[:, None, None]
        for values in (trial.config.data.mean, trial.config.data.std)
    )
    x = (images.to(trial.device).float() / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


def _cuts(config: Config, samples: OwnSamples, step: int) -> tuple[np.ndarray, list[Cut]]:
    """This rank's samples of a step, and how they are cut."""
    ids, randoms = samples.of(step)
    return ids, [random_cut(config, random) for random in randoms]


@torch.no_grad()
def _confusion(network: Segmenter | Fcn, trial: Trial, images: MaskedImages, num_classes: int) -> Tensor:
    """Pixel counts [C, C] over the centre crops of all test images. Collectives: one all-reduce."""
    size = trial.config.evaluate.batch
    batches = [images.ids[start : start + size] for start in range(0, len(images.ids), size)][rank() :: world_size()]
    cut, counts = centre(trial.config), torch.zeros(num_classes * num_classes, dtype=torch.int64)
    for pair in images.batches((ids, [cut] * len(ids)) for ids in batches):
        with memory_for(f"lower evaluate.batch={size}"):
            scores = network(_normalised(pair.image, trial))
        for one, mask in zip(scores, pair.mask, strict=True):  # one by one: scores at full size are large
            found = _resized(one[None], tuple(mask.shape))[0].argmax(0).cpu()
            known = mask != IGNORED
            cells = mask[known].long() * num_classes + found[known]
            counts += torch.bincount(cells, minlength=num_classes * num_classes)
    return total(counts).view(num_classes, num_classes)
