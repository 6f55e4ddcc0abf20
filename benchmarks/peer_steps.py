"""Training steps with the heads and losses of lightly and solo-learn, in a loop as their users write it.

Neither is a dependency: `pip install lightly` and `pip install --no-deps solo-learn` for the benchmark. Of solo-learn,
which does not import beside today's versions of what it needs, the files of losses are loaded by themselves.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from importlib.metadata import files
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from largescale.config import Config
from largescale.methods.teachers import cosine_momentum
from largescale.models.backbones import build_backbone
from largescale.optim.roles import parameter_groups

Loss = Callable[[Sequence[Tensor]], Tensor]
"""Of the two views of a batch."""


class PeerStep:
    """A network under another library's heads and loss, and plain AdamW with the rates and decay of the recipe.

    Attributes:
        backbone: starts from the weights that the recipe's own method has at this seed.
    """

    def __init__(self, config: Config, library: str, num_steps: int) -> None:
        torch.manual_seed(config.run.seed)
        self.backbone, width = build_backbone(config.model)
        self._num_steps, self._step = num_steps, 0
        self._heads = nn.ModuleDict()
        make = {"lightly": self._of_lightly, "solo-learn": self._of_solo}[library]
        self._loss = make(config.method, width)
        trained = nn.ModuleDict({"backbone": self.backbone, "heads": self._heads})
        groups = parameter_groups(trained, [], config.optim)
        self._optimizer = torch.optim.AdamW(
            [{key: group[key] for key in ("params", "weight_decay")} for group in groups if group["params"]],
            betas=tuple(config.optim.betas),
        )

    def __call__(self, views: Sequence[Tensor], lr: float) -> float:
        """One step; returns the loss, in the library's own scale."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(views)
        loss.backward()
        self._optimizer.step()
        self._step += 1
        return float(loss)

    def _of_lightly(self, method: Any, width: int) -> Loss:
        from lightly import loss
        from lightly.models.modules import heads

        wide, narrow = method.hidden[0], method.embedding
        if method.name == "byol":
            self._heads["projection"] = heads.BYOLProjectionHead(width, wide, narrow)
            self._heads["predictor"] = heads.BYOLPredictionHead(narrow, method.predictor_hidden[0], narrow)
            cosine = loss.NegativeCosineSimilarity()
            return self._bootstrapped(method.momentum, lambda p, k: cosine(p, k))
        kinds: dict[str, tuple[Callable[..., nn.Module], nn.Module]] = {
            "simclr": (heads.SimCLRProjectionHead, loss.NTXentLoss(method.__dict__.get("temperature", 1.0))),
            "barlow": (heads.BarlowTwinsProjectionHead, loss.BarlowTwinsLoss(method.__dict__.get("off_diagonal", 0))),
            "vicreg": (heads.VICRegProjectionHead, loss.VICRegLoss()),
        }
        head, criterion = kinds[method.name]
        self._heads["projection"] = head(width, wide, narrow)
        return self._of_embeddings(criterion)

    def _of_solo(self, method: Any, width: int) -> Loss:
        losses = _solo_losses(method.name)
        wide, narrow = method.hidden[0], method.embedding
        if method.name == "byol":
            self._heads["projection"] = _mlp(width, wide, narrow)
            self._heads["predictor"] = _mlp(narrow, method.predictor_hidden[0], narrow)
            return self._bootstrapped(method.momentum, losses.byol_loss_func)
        if method.name == "simclr":  # its head has no BatchNorm
            self._heads["projection"] = nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, narrow))
            return self._of_embeddings(lambda a, b: losses.simclr_loss_func(a, b, temperature=method.temperature))
        self._heads["projection"] = _mlp(width, wide, wide, narrow)
        if method.name == "barlow":
            return self._of_embeddings(
                lambda a, b: losses.barlow_loss_func(a, b, lamb=method.off_diagonal, scale_loss=0.1)
            )
        return self._of_embeddings(losses.vicreg_loss_func)

    def _of_embeddings(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        return lambda views: criterion(*(self._heads["projection"](self.backbone(view)) for view in views))

    def _bootstrapped(self, momentum: float, criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        student = nn.Sequential(self.backbone, self._heads["projection"])
        teacher = copy.deepcopy(student).requires_grad_(False)
        predictor = self._heads["predictor"]

        def loss(views: Sequence[Tensor]) -> Tensor:
            kept = cosine_momentum(momentum, self._step, self._num_steps)
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    old.mul_(kept).add_(new, alpha=1 - kept)
                targets = [teacher(view) for view in views]
            first, second = (predictor(student(view)) for view in views)
            return (criterion(first, targets[1]) + criterion(second, targets[0])) / 2

        return loss


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers with biases, BatchNorm and ReLU between them: the heads of solo-learn."""
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.BatchNorm1d(next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def _solo_losses(name: str) -> ModuleType:
    [file] = [one for one in files("solo-learn") or [] if str(one) == f"solo/losses/{name}.py"]
    spec = importlib.util.spec_from_file_location(f"solo_losses_{name}", file.locate())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
