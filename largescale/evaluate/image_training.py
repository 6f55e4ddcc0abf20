"""Training a classifier on a method's backbone with augmented images: frozen with a linear head, or the whole network.

The images come through the training stream (random resized crop and flip), so the samples of a step and their views are
the same on any number of ranks; gradients are averaged over ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from largescale.config import Config, DataConfig, MethodConfig
from largescale.config.data_settings import AugmentConfig, CropGroup
from largescale.data.corpora import Corpus
from largescale.data.loaded import Batch
from largescale.data.stream import Stream
from largescale.distributed.out_of_memory import memory_for
from largescale.evaluate import tuning_optimizer
from largescale.evaluate.extract import extract
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.logistic_start import start_from_logistic
from largescale.evaluate.splits import keep_subset
from largescale.evaluate.stand_ins import StandIns
from largescale.evaluate.training_recipe import EVEN, Recipe, batch_for, rate_factor
from largescale.evaluate.training_state import TrainingState, Unfinished
from largescale.methods import Method
from largescale.models.image_classifier import ImageClassifier, first_layers
from largescale.models.keep_zeros import keep_zeros
from largescale.models.narrow import pick_in_narrow
from largescale.parallel.batchnorm import synchronize_batchnorm
from largescale.processes import from_rank_0, rank, world_size
from shards.ground.errors import InputError

_RATE_IS_PER = 256
"""Images per step that a learning rate is given for; it grows in proportion."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A network to train on labelled images, and what with.

    Attributes:
        config: of the run.
        method: with the weights to start from; it is changed.
        train, test: labelled shards.
        place: of the training shards, as the configuration names it.
        scratch: a folder of this measurement.
        device: that it is on.
        unfinished: where the state of a training is kept, so that a killed one goes on; None keeps none.
        keep: takes the trained classifier, when it has been measured.
        doubts: sentences about the measurement, which training adds to.
    """

    config: Config
    method: Method
    train: Corpus
    test: Corpus
    place: str
    scratch: Path
    device: torch.device
    unfinished: Unfinished | None = None
    keep: Callable[[ImageClassifier], None] | None = None
    doubts: list[str] = field(default_factory=list)


class Probe(nn.Module):
    """A network with classifiers: from normalised images to scores [B, classes] or, with several, [B, heads, classes].

    `train` must leave what is frozen in evaluation mode.
    """

    def groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Parameters that are trained, as an optimizer takes them, each group with its `rate` per 256 images."""
        raise NotImplementedError

    def trained(self) -> dict[str, Tensor]:
        """Parameters and buffers that change, by name."""
        raise NotImplementedError


def trained_scores(trial: Trial, recipe: Recipe) -> FeatureSet | None:
    """Train a classifier on the training shards; the scores [N, classes] of the test images, on rank 0.

    Raises:
        InputError: fewer training images, or images per step, than ranks; or a loss that is not a number.

    Collectives: those of `scores_of`, of BatchNorm, and of `start_from_logistic` if the classifier starts so.
    """
    network = Classifier(trial, recipe)
    if recipe.starts_linear:
        network.start_from_logistic(trial, recipe)
    scores = scores_of(network, trial, recipe)
    if trial.keep:
        trial.keep(network.alone())
    return scores


def scores_of(network: Probe, trial: Trial, recipe: Recipe) -> FeatureSet | None:
    """Train classifiers on the labelled images; the scores of the test images, flattened to [N, heads * classes], on
    rank 0.

    Raises:
        InputError: as `trained_scores`.

    Collectives: every rank must call it; an all-reduce per step, one of the loss now and then, those of `extract`, an
    all-gather of images that cannot be read, and a broadcast where training images have no label.
    """
    _train(network, trial, _of_labelled(trial, recipe))
    network.eval()
    return extract(trial.test, trial.config, {"fine-tuned": lambda x: network(x).flatten(1)}, trial.device).get(
        "fine-tuned"
    )


def _of_labelled(trial: Trial, recipe: Recipe) -> Recipe:
    """The recipe with the labelled images as its subset, if it has none and some have no label: these would take part
    in steps and in BatchNorm's statistics, and make the gradient of the others smaller.

    Raises:
        InputError: none has a label.
    """
    known = labelled(trial.train)
    if recipe.subset or len(known) == trial.train.manifest.num_samples:
        return recipe
    if not len(known):
        raise InputError(f"{trial.train.where}: none of its images has a label; nothing can be trained on them")
    return replace(recipe, subset=str(keep_subset(trial.scratch, known.ids, "labelled")))


def labelled(corpus: Corpus) -> FeatureSet:
    """Labels and ids of the labelled samples of a corpus, without features."""
    labels = labels_of(corpus)
    ids = (labels >= 0).nonzero().flatten()
    return FeatureSet(torch.empty(len(ids), 0), labels[ids], ids, tuple(corpus.manifest.classes))


def accuracies(scores: FeatureSet | None) -> dict[str, Any]:
    """Top-1 and top-5 shares, and `hits`, on every rank. Collectives: one broadcast of an object."""
    if scores is None:
        return from_rank_0({})
    num_classes = scores.features.shape[1]
    best = scores.features.topk(min(5, num_classes), dim=1).indices == scores.labels[:, None]
    top5 = float(best.any(1).double().mean()) if num_classes > 5 else None
    hits = best[:, 0]
    return from_rank_0({"top1": float(hits.double().mean()), "top5": top5, "hits": hits.tolist()})


class Classifier(Probe):
    """A method's features, layers of its head if the recipe keeps some, and a linear classifier, N(0, 0.01) with bias
    0: images to scores [B, classes]. What is zero in a network that was trained under `model.mask` stays zero.

    Raises:
        InputError: the method's head has fewer layers, or none.

    Source of keeping layers: arXiv 2006.10029, section 2.
    """

    method: Method

    def __init__(self, trial: Trial, recipe: Recipe) -> None:
        super().__init__()
        self.frozen = recipe.trunk_rate == 0
        self.method = trial.method.float()
        if not self.frozen and world_size() > 1:
            self.method = cast(Method, synchronize_batchnorm(self.method, trial.device))
        self.kept = kept_layers(self.method, recipe)
        widths = [layer.out_features for layer in self.kept if isinstance(layer, nn.Linear)]
        width = widths[-1] if widths else trial.method.num_features
        self.head = nn.Linear(width, len(trial.train.manifest.classes)).to(trial.device)
        generator = torch.Generator().manual_seed(recipe.seed)
        with torch.no_grad():
            self.head.weight.copy_(0.01 * torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()
        self.method.requires_grad_(False)
        if not self.frozen:
            self._trunk().requires_grad_(True)
            if trial.device.type == "cpu":
                pick_in_narrow(self._encoder())
            if trial.config.model.mask:
                keep_zeros(self._encoder())

    def groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The classifier, and the trunk if it is trained."""
        groups: list[dict[str, Any]] = [{"params": [*self.head.parameters()], "rate": recipe.head_rate}]
        if not self.frozen:
            groups.append({"params": [*self._trunk().parameters()], "rate": recipe.trunk_rate, "is_trunk": True})
        return groups

    def trained(self) -> dict[str, Tensor]:
        """The classifier's, and the trunk's if that is trained."""
        tensors = self.head.state_dict(prefix="head.")
        if self.frozen:
            return tensors
        return tensors | self._encoder().state_dict(prefix="encoder.") | self.kept.state_dict(prefix="kept.")

    def forward(self, images: Tensor) -> Tensor:
        """Scores of normalised images [B, 3, S, S]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self._features(images)
        return self.head(features)

    def train(self, mode: bool = True) -> Classifier:
        """A frozen trunk stays in evaluation mode, with its running statistics."""
        super().train(mode)
        if self.frozen:
            self.method.eval()
            self.kept.eval()
        return self

    @torch.no_grad()
    def start_from_logistic(self, trial: Trial, recipe: Recipe) -> None:
        """Set the classifier to logistic regression on the images of the recipe; collectives as of that."""
        self.eval()
        ids = np.load(recipe.subset) if recipe.subset else np.arange(trial.train.manifest.num_samples)
        start_from_logistic(self.head, self._features, trial.train, ids, trial.config, trial.device)

    def alone(self) -> ImageClassifier:
        """The same network without the method; its own modules."""
        return ImageClassifier(self._encoder(), nn.Sequential(*self.kept, self.head))

    def _features(self, images: Tensor) -> Tensor:
        return self.kept(self.method.encode(images))

    def _encoder(self) -> nn.Module:
        """The network that is evaluated, which need not be the one that the method trains: it may be a teacher's."""
        return self.method.get_submodule(self.method.encoder_name)

    def _trunk(self) -> nn.Module:
        return nn.ModuleList([self._encoder(), self.kept])


def kept_layers(method: Method, recipe: Recipe) -> nn.Sequential:
    """The layers of a method's head that a recipe keeps; its own modules.

    Raises:
        InputError: it has fewer, or no head.
    """
    if recipe.head_layers == 0:
        return nn.Sequential()
    asked = f"{recipe.head_layers_key}={recipe.head_layers}"
    if not method.head_name:
        raise InputError(f"{asked}: a {method.title} has no projection head; leave it at 0")
    try:
        return first_layers(method.get_submodule(method.head_name), recipe.head_layers)
    except InputError as error:
        raise InputError(f"{asked}: {error}") from error


def _train(network: Probe, trial: Trial, recipe: Recipe) -> None:
    config = stream_config(trial, recipe)
    stream = Stream(config, rank=rank(), world_size=world_size(), device=trial.device, dtype=torch.float32)
    batch, steps = config.train.global_batch, stream.num_steps
    if rank() == 0 and batch != (alone := batch_for(recipe, _num_images(trial, recipe), 1)):
        _log.warning(
            "%d ranks train on %d images per step, one would on %d: results differ", world_size(), batch, alone
        )
    network.train()
    refuse_single_images(network, batch, recipe)
    optimizer = tuning_optimizer.build(
        recipe.optimizer, network.groups(recipe), weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    state, stand_ins = None, StandIns()
    if trial.unfinished:
        state = TrainingState(trial.unfinished, network.trained(), optimizer, batch, steps, stand_ins.reasons)
    first = state.load() if state else 0
    labels = labels_of(trial.train, recipe.subset)
    said = f"training on {trial.train.manifest.root.name}"
    with tqdm(
        total=steps, initial=first, desc=said, unit="step", leave=False, mininterval=1, disable=rank() > 0
    ) as bar:
        for one in stand_ins.noting(_batches(stream, range(first, steps))):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * batch / _RATE_IS_PER * rate_factor(recipe, one.step / steps)
            with memory_for(f"lower {recipe.batch_key}"):
                loss = _step(network, one, labels[one.ids].to(trial.device), optimizer)
            # Seldom, since the host waits for it.
            if one.step % 50 == 0 or one.step + 1 == steps:
                refuse_no_number(loss, one.step, steps)
            if state:
                state.save(one.step + 1)
            bar.update()
    trial.doubts.extend(stand_ins.doubts("training images cannot be read"))


def refuse_single_images(network: nn.Module, batch: int, recipe: Recipe) -> None:
    """BatchNorm in training mode has no statistics of one image.

    Raises:
        InputError: a step has one image, and the network such a BatchNorm.
    """
    if batch < 2 and any(isinstance(module, _BatchNorm) and module.training for module in network.modules()):
        raise InputError(
            f"{recipe.batch_key}={recipe.batch}: steps of one image, of which BatchNorm has no statistics; it takes at "
            f"least 2 training images, and 2 per step"
        )


def _step(network: Probe, batch: Batch, labels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    images = batch.views[0].contiguous(memory_format=torch.channels_last)
    scores = network(images)
    heads = [scores] if scores.ndim == 2 else scores.unbind(1)  # they share no parameter, so their losses may be added
    loss = torch.stack([cross_entropy(one, labels) for one in heads]).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if world_size() > 1:
        average_gradients([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
    optimizer.step()
    return loss.detach()


def refuse_no_number(loss: Tensor, step: int, steps: int) -> None:
    """Refuse a loss that is not a number on any rank, on all of them. Collectives: one all-reduce."""
    if world_size() > 1:
        dist.all_reduce(loss)
    mean = loss.item() / world_size()
    if not math.isfinite(mean):
        raise InputError(f"the loss is {mean} at step {step} of {steps}; lower the learning rate")


def average_gradients(gradients: list[Tensor]) -> None:
    """Replace gradients by their mean over ranks. Collectives: one all-reduce."""
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    parts = (message / world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _batches(stream: Stream, steps: range) -> Iterator[Batch]:
    with closing(stream(steps)) as batches:
        yield from batches


def stream_config(trial: Trial, recipe: Recipe) -> Config:
    """The run's configuration, with a stream of single views of the labelled images: random resized crop and flip."""
    config: Any = deepcopy(trial.config)
    config.data.shards, config.data.subset = trial.place, recipe.subset
    config.data.crops = [CropGroup(num=1, size=config.evaluate.size, scale=[*recipe.crop_scale])]
    for item in fields(AugmentConfig):  # a strength or probability of 0 switches a change off
        if isinstance(getattr(config.data.augment, item.name), float):
            setattr(config.data.augment, item.name, 0.0)
    config.data.augment.flip, config.data.audit, config.method = recipe.flip, False, MethodConfig()
    config.train.global_batch = batch_for(recipe, _num_images(trial, recipe), world_size())
    config.train.accumulate, config.train.steps, config.train.epochs = 1, 0, float(recipe.epochs)
    config.data.streams = math.gcd(config.train.global_batch, EVEN)
    window = DataConfig.shuffle_window  # like streams, not the run's: accuracies are compared
    if trial.train.cache is not None:  # a run may have lowered it, so that its cache holds what is read together
        window = min(config.data.shuffle_window, window)
    config.data.shuffle_window = window
    config.run.seed = recipe.seed
    return config


def _num_images(trial: Trial, recipe: Recipe) -> int:
    return len(np.load(recipe.subset, mmap_mode="r")) if recipe.subset else trial.train.manifest.num_samples


def labels_of(corpus: Corpus, subset: str = "") -> Tensor:
    """Labels by sample id as a stream of the subset counts them, int64; -1 for none."""
    numbers = range(len(corpus.manifest.shards))
    labels = np.concatenate([corpus.index(number).label for number in numbers])
    return torch.from_numpy((labels[np.load(subset)] if subset else labels).astype(np.int64))
