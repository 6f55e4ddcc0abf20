"""DirectPred, DirectSet and DirectCopy: BYOL whose predictor is a matrix that is set, not trained.

The matrix W follows from the second moments F of its inputs, the student's embeddings f; it takes no gradient. The
naive loop::

    p = W f                                                     # then BYOL's loss of p
    F = decay * F + (1 - decay) * mean(f f^T)                   # all views and ranks, not centred; at first the mean
    Q, l = eigenvectors and eigenvalues of F
    l = max(l, 0) / max(l)
    if which == "directpred":                                   # after the update; arXiv 2102.06810, section 4
        W = Q diag(max(sqrt(l) + eps, 1e-4)) Q^T
    elif which == "directset":                                  # arXiv 2110.04947
        W = Q diag(max(l ** power + eps, 1e-4)) Q^T
    else:                                                       # directcopy, of the same paper: no eigenvectors
        W = F + eps * I

The loss does not see the scale of W. In the first step W is the identity. The published code can train W by gradient
between updates of F that are some steps apart; here F and W move in every step, and by this alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from largescale.config import Config
from largescale.config.setting import setting
from largescale.distributed.collectives import exchanging
from largescale.methods.bootstrapped import Bootstrapped, TeacherSettings
from largescale.methods.embedding_method import Named
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Output
from largescale.methods.replicated import replicated
from largescale.models.heads import hidden_widths, mlp
from largescale.processes import world_size

_SMALLEST = 1e-4
"""Of the eigenvalues of W; rounding may make those of F negative."""


@dataclass
class Settings(TeacherSettings):
    """Keys under `method` of DirectPred and its relatives."""

    hidden: list[int] = hidden_widths([512])
    embedding: int = setting(128, "Dimension of the embeddings.", at_least=1, at_most=2**14)
    which: str = setting(
        "directpred",
        "How the predictor follows from the moments of embeddings: square roots of their eigenvalues (`directpred`), "
        "a power of them (`directset`), or as they are (`directcopy`).",
        one_of=("directpred", "directset", "directcopy"),
    )
    power: float = setting(0.5, "Power of the eigenvalues.", at_least=0, at_most=10, used_if="method.which=directset")
    eps: float = setting(0.01, "Added to the predictor's eigenvalues.", at_least=0, at_most=1e6)
    decay: float = setting(0.3, "Fraction of themselves that the moments keep per step.", at_least=0, below=1)


class DirectPred(Bootstrapped):
    """Student, teacher, moments of embeddings and the predictor that follows from them.

    Moments and predictor are the same on all ranks.
    """

    title = "DirectPred"
    reference = "directpred/resnet50_300ep"
    Settings = Settings
    moments: Tensor
    weight: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = config.method
        assert isinstance(settings, Settings)
        self.config = settings
        self._local_batch = config.train.global_batch // world_size()
        width = settings.embedding
        self.projection = mlp([self.num_features, *settings.hidden, width], bias=True, last_bias=True, norm="plain")
        self.predictor = nn.Identity()  # W is not a parameter; `loss` applies it
        self.make_teacher()
        for name in ("moments", "weight"):
            self.register_buffer(name, torch.zeros(width, width), persistent=False)
        self._total: Tensor | None = None
        self._seen = 0
        self.finish_initialisation()

    def finish_initialisation(self) -> None:
        """Start with a predictor that predicts its input; `models.initialise` calls it as well."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(len(self.weight), device=self.weight.device))

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; all of a step share a predictor.

        Collectives: one all-reduce of D^2 numbers per step.
        """
        f = at_least_float32(inputs["predictions"])
        with torch.autocast(f.device.type, enabled=False):
            output = self.bootstrap_loss(f @ self.weight.to(f.dtype).T, inputs)
            self._keep(f.detach(), step)
        return output

    def _keep(self, f: Tensor, step: int) -> None:
        """Move the moments towards those of a step's embeddings [V, B, D], once its last micro-batch is through."""
        rows = f.flatten(0, 1)
        own = rows.T @ rows
        total = own if self._total is None else self._total + own
        self._total, self._seen = total, self._seen + f.shape[1]
        if self._seen < self._local_batch:
            return
        self._total, self._seen = None, 0
        if world_size() > 1:
            with exchanging("moments of embeddings"):
                dist.all_reduce(total)
        mean = total / (len(f) * self._local_batch * world_size())
        self.moments = mean if step == 0 else self.moments.to(mean.dtype).lerp(mean, 1 - self.config.decay)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Set the predictor, alike on all ranks; on a GPU the host waits to hear that eigenvalues were found.

        Collectives: none.
        """
        settings = self.config
        if settings.which == "directcopy":
            one = torch.eye(len(self.moments), dtype=self.moments.dtype, device=self.moments.device)
            self.weight = self.moments + settings.eps * one
            return
        power = 0.5 if settings.which == "directpred" else settings.power
        # In float64: the square root of a small eigenvalue shows the rounding of F.
        values, vectors = torch.linalg.eigh(self.moments.double())
        shares = values.clamp_min(0) / values.max().clamp_min(torch.finfo(values.dtype).tiny)
        weight = (vectors * (shares**power + settings.eps).clamp_min(_SMALLEST)) @ vectors.T
        self.weight = weight.to(self.moments.dtype)

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """The moments and the predictor that follows from them, which all ranks hold, in float32 at least."""
        self.moments, self.weight = at_least_float32(self.moments), at_least_float32(self.weight)
        return {"moments": replicated(self.moments, mesh), "predictor": replicated(self.weight, mesh)}
