"""Detection: torchvision's Faster or Mask R-CNN on the backbone with a feature pyramid, all of it trained.

The schedule is COCO's "1x" (90,000 steps of 16 images) as MoCo has it for Mask R-CNN with FPN (arXiv 1911.05722): SGD
with momentum 0.9, a rate of 0.02 with warm-up, a tenth of it after two thirds and eight ninths, weight decay 1e-4,
shorter sides of 640 to 800 px, random flips; BatchNorm trained, over all ranks, in the pyramid as well. Detectors
differ in much else, so figures are to be compared with those of this program alone. The last epoch is measured, image
by image: average precision as COCO defines it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.distributed.out_of_memory import memory_for
from largescale.evaluate.annotations import AnnotatedImages, Scene
from largescale.evaluate.average_precision import AveragePrecision, need_packages
from largescale.evaluate.detector import Design, build_detector
from largescale.evaluate.image_training import Trial, average_gradients, refuse_no_number, refuse_single_images
from largescale.evaluate.own_samples import OwnSamples
from largescale.evaluate.read_ahead import read_ahead
from largescale.evaluate.shares import from_all_ranks
from largescale.evaluate.training_recipe import Recipe, batch_for
from largescale.evaluate.training_state import TrainingState
from largescale.processes import rank, world_size
from shards.ground.errors import InputError

CHOSEN_ON = "nothing; the rate is given and the last epoch is measured"

_RATE_IS_PER = 16
"""Images per step that the learning rate is given for."""


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    detection_model: str = setting(
        "faster_rcnn",
        "What is trained: faster_rcnn finds boxes, mask_rcnn masks as well (published: mask_rcnn for COCO, faster_rcnn "
        "for VOC).",
        one_of=("faster_rcnn", "mask_rcnn"),
        free=True,
    )
    detection_annotations: str = setting(
        "json:annotations", "Where a sample's objects are: json:FIELD, a list as COCO has it.", min_length=1, free=True
    )
    detection_epochs: int = setting(
        12, "Epochs of its training (COCO 1x: 12, 2x: 24; VOC07+12: 24).", at_least=1, at_most=10**6, free=True
    )
    detection_batch: int = setting(16, "Images per step of it, over all ranks.", at_least=1, at_most=2**31, free=True)
    detection_rate: float = setting(
        0.02,
        "Its learning rate per 16 images (MoCo: 0.02; VISSL chose from 0.001 to 0.1).",
        above=0,
        at_most=1e9,
        free=True,
    )
    detection_warmup: float = setting(
        0.011,
        "Share of the training in which the rate rises to it (1,000 of 90,000 steps; VOC: 100 of 24,000).",
        at_least=0,
        at_most=1,
        free=True,
    )
    detection_drops: list[float] = setting(
        [0.667, 0.889],
        "Shares of the training after which the rate is a tenth (COCO 1x: these; VOC: 0.75, 0.917).",
        at_least=0,
        at_most=1,
        ascending=True,
        free=True,
    )
    detection_weight_decay: float = setting(
        1e-4, "Its weight decay (VISSL for RegNetY: 5e-5).", at_least=0, at_most=1e6, free=True
    )
    detection_batchnorm: str = setting(
        "synchronised",
        "BatchNorm is synchronised: trained, over all ranks, in the pyramid as well (MoCo, VISSL); or frozen: as it "
        "was pretrained, and none in the pyramid (torchvision's own recipes).",
        one_of=("synchronised", "frozen"),
        free=True,
    )
    detection_sizes: list[int] = setting(
        [640, 672, 704, 736, 768, 800],
        "Shorter sides of training images in px, one of them drawn each time (VOC: 480 to 800).",
        at_least=1,
        at_most=16384,
        min_length=1,
        free=True,
    )
    detection_size: int = setting(800, "Shorter side of test images in px.", at_least=1, at_most=16384, free=True)
    detection_max_side: int = setting(1333, "Longer side in px, at most.", at_least=1, at_most=65536, free=True)
    detection_anchor: float = setting(
        8.0,
        "Side of anchors in strides of their level: 32 to 512 px for strides of 4 to 64.",
        above=0,
        at_most=1000,
        free=True,
    )
    detection_width: int = setting(
        256, "Channels of the feature pyramid and of the mask head.", at_least=1, at_most=65536, free=True
    )
    detection_regions: int = setting(
        512, "Regions per image that the box head learns from.", at_least=1, at_most=10**6, free=True
    )


def measure(trial: Trial, config: Settings) -> dict[str, Any]:
    """Average precision of boxes and, with Mask R-CNN, of masks.

    Raises:
        InputError: a package is missing, annotations are missing or not as they must be, there are no objects, or the
            loss is not a number.

    Collectives: every rank must call it; those of `AnnotatedImages`, of BatchNorm, of `Resizing`, an all-reduce of
    gradients per step and one of the loss now and then, and those of `AveragePrecision` and `_doubts`.
    """
    need_packages()
    masks = config.detection_model == "mask_rcnn"
    train, test = (
        AnnotatedImages(part, trial.config, config.detection_annotations, masks=masks)
        for part in (trial.train, trial.test)
    )
    for one, key in ((train, "evaluate.train_shards"), (test, "data.eval_shards")):
        if not one.counts:
            raise InputError(f"{key}: no objects in {config.detection_annotations} of its {len(one.ids)} images")
    categories = sorted({*train.counts, *test.counts})
    with torch.random.fork_rng(devices=_devices(trial)):
        detector = _trained(trial, config, train, categories)
    found = _measured(detector.eval(), trial, test, categories, masks=masks)
    num_test = found.pop("num_images")
    return {
        **found,
        "num_categories": len(categories),
        "num_train": len(train.ids),
        "num_test": num_test,
        "doubts": _doubts(train, test, config.detection_annotations),
    }


def _doubts(train: AnnotatedImages, test: AnnotatedImages, source: str) -> list[str]:
    """Collectives: those of `from_all_ranks`, twice."""
    doubts = []
    for one, what in ((train, "training"), (test, "test")):
        if missing := one.num_samples - len(one.ids):
            doubts.append(f"{missing:,} {what} images are left out: they have no {source}")
        if one.num_flat:
            doubts.append(f"{one.num_flat:,} objects of {what} images are left out: their boxes have no area")
        if unread := from_all_ranks(one.unreadable):
            doubts.append(f"{len(unread):,} {what} images are left out: they cannot be read")
    if unseen := sorted({*test.counts} - {*train.counts}):
        shown = ", ".join(map(str, unseen[:5])) + ", ..." * (len(unseen) > 5)
        doubts.append(f"{len(unseen)} categories of the test images have no training object: {shown}")
    return doubts


def _trained(trial: Trial, config: Settings, images: AnnotatedImages, categories: Sequence[int]) -> Any:
    recipe = Recipe(
        epochs=config.detection_epochs,
        batch=config.detection_batch,
        batch_key="evaluate.detection_batch",
        trunk_rate=config.detection_rate,
        head_rate=config.detection_rate,
        weight_decay=config.detection_weight_decay,
    )
    torch.manual_seed(recipe.seed)  # of what the checkpoint does not have
    detector = _detector(trial, config, len(categories))
    batch = batch_for(recipe, len(images.ids), world_size())
    steps = recipe.epochs * (len(images.ids) // batch)
    parameters = [one for one in detector.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=recipe.weight_decay)
    state = (
        TrainingState(trial.unfinished, detector.state_dict(), optimizer, batch, steps, images.unreadable)
        if trial.unfinished
        else None
    )
    first = state.load() if state else 0
    detector.train()
    refuse_single_images(detector, batch, recipe)
    samples, views = OwnSamples(images.ids, batch, recipe.seed), _Views(images, config)
    source = read_ahead(views.read, map(samples.of, range(first, steps)))
    said = f"training on {trial.train.manifest.root.name}"
    with tqdm(
        total=steps, initial=first, desc=said, unit="step", leave=False, mininterval=1, disable=rank() > 0
    ) as bar:
        for step, views_of_step in enumerate(source, first):
            for group in optimizer.param_groups:
                group["lr"] = recipe.trunk_rate * batch / _RATE_IS_PER * _factor(config, step, steps)
            torch.manual_seed(recipe.seed + 1 + step * world_size() + rank())  # which regions are learnt from
            with memory_for(f"lower {recipe.batch_key}"):
                loss = _step(detector, trial, views_of_step, categories, optimizer)
            if step % 50 == 0 or step + 1 == steps:
                refuse_no_number(loss, step, steps)
            if state:
                state.save(step + 1)
            bar.update()
    return detector


def _detector(trial: Trial, config: Settings, num_categories: int) -> Any:
    design = Design(
        model=config.detection_model,
        frozen=config.detection_batchnorm == "frozen",
        width=config.detection_width,
        anchor=config.detection_anchor,
        regions=config.detection_regions,
        size=config.detection_size,
        max_side=config.detection_max_side,
        mean=list(trial.config.data.mean),
        std=list(trial.config.data.std),
    )
    backbone = trial.method.get_submodule(trial.method.encoder_name)
    return build_detector(backbone, num_categories, design, trial.device)


def _factor(config: Settings, step: int, steps: int) -> float:
    """What the rate is multiplied by in a step."""
    warm_up = min(1.0, (step + 1) / max(1.0, config.detection_warmup * steps))
    return warm_up * 0.1 ** bisect_right(config.detection_drops, step / steps)


@dataclass(frozen=True)
class _View:
    scene: Scene
    size: int


class _Views:
    """Training images: flipped or not, of one of the sizes, without crowds."""

    def __init__(self, images: AnnotatedImages, config: Settings) -> None:
        self._images, self._sizes = images, config.detection_sizes

    def read(self, number: int, random: np.random.Generator) -> _View:
        """One image; a black one without objects where it cannot be read."""
        size, flip = int(random.choice(self._sizes)), random.random() < 0.5
        scene = self._images.scene(number)
        if scene is None:
            black = torch.zeros(3, size, size, dtype=torch.uint8)
            none = torch.zeros(0, size, size, dtype=torch.uint8) if self._images.masks else None
            return _View(Scene(black, torch.zeros(0, 4), *(torch.zeros(0, dtype=torch.int64),) * 3, none), size)
        kept = ~scene.crowds
        masks = None if scene.masks is None else scene.masks[kept]
        scene = Scene(
            scene.image, scene.boxes[kept], scene.categories[kept], scene.crowds[kept], scene.areas[kept], masks
        )
        return _View(_flipped(scene) if flip else scene, size)


def _flipped(scene: Scene) -> Scene:
    left, top, right, bottom = scene.boxes.unbind(1)
    width = scene.image.shape[2]
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    masks = None if scene.masks is None else scene.masks.flip(2)
    return Scene(scene.image.flip(2), boxes, scene.categories, scene.crowds, scene.areas, masks)


def _step(
    detector: Any, trial: Trial, views: Sequence[_View], categories: Sequence[int], optimizer: torch.optim.Optimizer
) -> Tensor:
    images = [view.scene.image.to(trial.device).float() / 255 for view in views]
    known = torch.tensor(categories)
    targets = []
    for view in views:
        target = {"boxes": view.scene.boxes, "labels": 1 + torch.searchsorted(known, view.scene.categories)}
        if view.scene.masks is not None:
            target["masks"] = view.scene.masks
        targets.append({name: one.to(trial.device) for name, one in target.items()})
    detector.transform.drawn = [view.size for view in views]
    loss = torch.stack([*detector(images, targets).values()]).sum()
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for one in parameters:  # not None: what no region of this rank says anything of, others' may
        one.grad = torch.zeros_like(one)
    loss.backward()
    if world_size() > 1:
        average_gradients([one.grad for one in parameters])
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _measured(
    detector: Any, trial: Trial, images: AnnotatedImages, categories: Sequence[int], *, masks: bool
) -> dict[str, Any]:
    """Figures of all test images, seen one by one: padding beside others would change what is found.

    Raises:
        InputError: what can be read has no objects.

    Collectives: those of `AveragePrecision`.
    """
    figures, known = AveragePrecision(masks=masks), torch.tensor(categories)
    own = images.ids[rank() :: world_size()]
    source = read_ahead(lambda number, _: images.scene(number), ((np.array([one]), [None]) for one in own))
    said = f"objects of {trial.test.manifest.root.name}"
    for number, (scene,) in zip(
        own, tqdm(source, desc=said, total=len(own), leave=False, disable=rank() > 0), strict=True
    ):
        if scene is None:
            continue
        with memory_for("lower evaluate.detection_size"):
            (found,) = detector([scene.image.to(trial.device).float() / 255])
        found = {name: one.cpu() for name, one in found.items()}
        figures.add(int(number), {**found, "labels": known[found["labels"] - 1]}, scene)
    result = figures.figures()
    if "box_ap" not in result:
        raise InputError(f"data.eval_shards: no objects in what can be read of its {len(images.ids)} images")
    return result


def _devices(trial: Trial) -> list[int]:
    return [trial.device.index or 0] if trial.device.type == "cuda" else []
