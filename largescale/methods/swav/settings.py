"""SwAV's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from largescale.config.schema import MOST_STEPS, Config, MethodConfig
from largescale.config.setting import setting
from largescale.config.values import require
from largescale.methods.embedding_method import SPANS
from largescale.methods.multi_crop import num_sizes, require_large_first
from largescale.methods.queue import max_queue_setting
from largescale.models.heads import hidden_widths


@dataclass
class Settings(MethodConfig):
    """SwAV's keys under `method`."""

    moved: ClassVar[dict[str, str]] = {
        f"model.{key}": f"method.{key}" for key in ("hidden", "head_batchnorm", "embedding", "prototypes")
    }
    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    hidden: list[int] = hidden_widths()
    head_batchnorm: bool = setting(True, "BatchNorm after each hidden layer of the projection head.")
    head_per_group: bool = setting(
        False,
        "Pass views of each size through the projection head by themselves, as through the backbone, so that its "
        "BatchNorm sees crops of one size at a time; the published code passes all at once.",
    )
    overlap_codes: bool = setting(
        True,
        "Compute codes, and wait for other ranks, while small crops are in the network; the result is the same.",
        used_if="method.head_per_group",
        free=True,
    )
    embedding: int = setting(128, "Dimension in which views are compared with prototypes.", at_least=1, at_most=2**24)
    prototypes: Any = setting(
        3000,
        "Number of prototypes; a list makes several heads.",
        whole=True,
        at_least=2,
        at_most=2**31,
        min_length=1,
        expected="a number above 1 (at most 2147483648), or a list of them",
    )
    temperature: float = setting(0.1, "Divides scores in the softmax of predictions.", at_least=1e-6, at_most=1e6)
    epsilon: float = setting(
        0.05, "Entropy regularisation of the assignments: smaller is sharper.", at_least=1e-6, at_most=1e6
    )
    sinkhorn_iterations: int = setting(
        3, "Sinkhorn iterations per assignment, each with one all-reduce.", at_least=1, at_most=10_000
    )
    temperature_end: float = setting(
        0.0,
        "Value of method.temperature in the last step, reached by half a cosine; 0: as at the start.",
        at_least=0,
        at_most=1e6,
    )
    epsilon_end: float = setting(
        0.0,
        "Value of method.epsilon in the last step, reached by half a cosine; 0: as at the start.",
        at_least=0,
        at_most=1e6,
    )
    sinkhorn_iterations_end: int = setting(
        0,
        "Value of method.sinkhorn_iterations in the last step, reached evenly; 0: as at the start.",
        at_least=0,
        at_most=10_000,
    )
    hard_codes_steps: int = setting(
        0,
        "Steps at the start in which a code is the prototype with the largest share alone.",
        at_least=0,
        at_most=MOST_STEPS,
    )
    prior_power: float = setting(
        0.0,
        "Power of the law by which prototypes share the samples, for long-tailed images: the k-th gets k^-power of the "
        "first's share; 0: all get the same.",
        at_least=0,
        at_most=10,
    )
    fused_sinkhorn: bool = setting(
        False,
        "Compute assignments on CUDA by kernels that read each score once per iteration (Triton); the same but for "
        "roundings. Elsewhere, and for more than 16,384 prototypes or an epsilon below 1/35, it changes nothing.",
        free=True,
    )
    freeze_prototypes_steps: int = setting(
        0, "Steps at the start that leave the prototypes as they are.", at_least=0, at_most=MOST_STEPS
    )
    queue: int = setting(
        0,
        "Samples of earlier steps that take part in the assignment; a multiple of train.global_batch.",
        at_least=0,
        at_most=2**40,
    )
    queue_start_step: int = setting(
        0,
        "Step at which the queue starts to fill; it is used once full.",
        at_least=0,
        at_most=MOST_STEPS,
        used_if="method.queue",
    )
    max_queue_gb: float = max_queue_setting("on a rank, which holds its images' part")

    @property
    def counts(self) -> list[int]:
        """Prototypes of each head."""
        return list(self.prototypes) if isinstance(self.prototypes, list) else [self.prototypes]

    def overlaps(self, config: Config) -> bool:
        """Whether codes are computed beside the network: large crops are then embedded by themselves, and something
        comes after them. A loss over several micro-batches comes when all are embedded.
        """
        over_batch = config.train.loss_spans == "global_batch" and config.train.accumulate > 1
        return self.head_per_group and self.overlap_codes and num_sizes(config.data.crops) > 1 and not over_batch

    def check(self, config: Config) -> None:
        """An image has at least two views, large ones first; the queue holds whole batches; a schedule ends where its
        value may be.
        """
        for key in ("temperature_end", "epsilon_end"):
            end = getattr(self, key)
            require(end == 0 or end >= 1e-6, f"method.{key}", end, "0, or at least 1e-06")
        require(sum(group.num for group in config.data.crops) > 1, "data.crops", "one view", "at least two views")
        require_large_first(config)
        batch = config.train.global_batch
        require(self.queue % batch == 0, "method.queue", self.queue, f"a multiple of train.global_batch={batch}")
