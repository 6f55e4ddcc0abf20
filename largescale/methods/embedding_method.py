"""Methods whose loss takes nothing of a batch but embeddings of its images.

Such a loss can span a batch that is too large for one forward and backward pass (GradCache, arXiv 2101.06983)::

    z = [embed(micro_batch) for micro_batch in batch]               # without a graph
    g = gradient of loss(z) with respect to z                       # small: no network in it
    for micro_batch, own in zip(batch, g):
        (embed(micro_batch) * own).sum().backward()                 # with a graph, a micro-batch at a time

The engine does so where `train.loss_spans` is `global_batch`, which a method has to offer (`SPANS`), through the parts
below. BatchNorm's statistics stay those of a micro-batch of all ranks, and running statistics are fed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from largescale.data.views import Views
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Method, Output
from largescale.models.running_statistics import statistics_untouched

Named = dict[str, Tensor]
"""Tensors [X, B, ...] by name, the images of a batch on the second axis."""

SPANS = ("micro_batch", "global_batch")
"""`loss_spans` of the settings of those whose loss of an image depends on the others of its batch. For a mean over
images a second forward pass would change nothing, so it is refused."""

Part = Literal["all", "inputs", "loss", "embed", "plain"]


class Embedded:
    """What the loss takes of all images of a rank. A plain class: FSDP2 would cast what it finds in a tuple or in a
    data class.

    Attributes:
        embeddings, targets: of `EmbeddingMethod.embed` and `.targets`, micro-batch after micro-batch.
        ids: of the samples, in the same order, int64 [B].
    """

    def __init__(self, inputs: list[tuple[Named, Named]], ids: Tensor) -> None:
        self.ids = ids
        self.embeddings, self.targets = (
            {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
            for parts in zip(*inputs, strict=True)
        )


@dataclass
class Gradients:
    """Of a loss at the embeddings of all micro-batches, but for those that it takes no gradient of."""

    by_name: Named

    def loss_at(self, embeddings: Named, number: int, count: int) -> Tensor:
        """A scalar whose gradients are those of one micro-batch (of several) at its embeddings.

        In float32 at least: a loss scale need not fit into fp16.
        """
        total: Tensor | float = 0.0
        for name, gradient in self.by_name.items():
            own = gradient.unflatten(1, (count, -1))[:, number]
            total = total + (at_least_float32(embeddings[name]) * at_least_float32(own)).sum()
        assert isinstance(total, Tensor), "a loss that depends on no embedding"
        return total


class EmbeddingMethod(Method):
    """A method in two parts; `forward` is made of them."""

    def task_views(self, views: Views, step: int) -> Views:
        """What `embed` and `targets` see of views, such as patches cut out of them: a pure function of both and
        of the configuration.
        """
        return views

    def embed(self, views: Views) -> Named:
        """What the loss takes of views, with its gradient. Called twice with the same views where the loss spans
        several micro-batches, so it must not depend on anything that the first call changes.
        """
        raise NotImplementedError

    def targets(self, views: Views) -> Named:
        """What it takes besides that has no gradient, such as a teacher's embeddings; called once."""
        return {}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of embeddings and targets; of parameters it may use values, but must take no gradient.

        Args:
            inputs: of `embed` and `targets` together; of one micro-batch, or of all that the loss spans.
            ids: of the samples, int64 [B].
            step: of the run.
        """
        raise NotImplementedError

    def forward(self, views: Views | Embedded | Tensor, step: int, part: Part = "all") -> Any:
        """The loss of a micro-batch, or that part of it which the engine asks for.

        Wrappers gather weights around `forward`, so everything goes through it.
        """
        if isinstance(views, Embedded):
            assert part == "loss"
            return self._loss_and_gradients(views, step)
        if part == "plain":
            return self.plain(cast(Tensor, views))
        views = self.task_views(cast(Views, views), step)
        if part == "embed":
            return self.embed(views)
        with torch.no_grad():
            targets = self.targets(views)
        if part == "inputs":
            # Views are embedded once more, and feed running statistics then; a teacher sees them this once.
            with statistics_untouched(self.modules()):
                return self.embed(views), targets
        return self.loss_of_views(views, targets, step)

    def loss_of_views(self, views: Views, targets: Named, step: int) -> Output:
        """`loss` of what `embed` makes of a micro-batch. A method may begin with its loss, or with what that exchanges
        between ranks, before the last view is embedded, if the result is the same.
        """
        return self.loss(self.embed(views) | targets, views.ids, step)

    def _loss_and_gradients(self, whole: Embedded, step: int) -> tuple[Output, Gradients]:
        """The loss, and its gradient at each embedding. Called without a graph, so that no wrapper prepares a backward
        pass; makes one that ends at the embeddings.
        """
        with torch.enable_grad():
            # The loss scale comes later, so gradients of half precision would lose what is small.
            leaves = {name: _float32(value.detach()).requires_grad_() for name, value in whole.embeddings.items()}
            targets = {name: _float32(value) for name, value in whole.targets.items()}
            output = self.loss(leaves | targets, whole.ids, step)
            found = torch.autograd.grad(output.loss, list(leaves.values()), allow_unused=True)
        gradients = {name: one for name, one in zip(leaves, found, strict=True) if one is not None}
        return output._replace(loss=output.loss.detach()), Gradients(gradients)


def _float32(value: Tensor) -> Tensor:
    """Floating-point numbers in float32 at least."""
    return at_least_float32(value) if value.is_floating_point() else value
