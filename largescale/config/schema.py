"""The settings that every run has: type, default, legal range and meaning of each.

What belongs to one method, optimizer, strategy or protocol is declared beside it, in a subclass of `MethodConfig`,
`OptimConfig`, `ParallelConfig` or `EvaluateConfig` that the table in `owners` names; `config.slots` puts all together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from largescale.config.data_settings import DataConfig
from largescale.config.frame_settings import WantedFrames
from largescale.config.model_settings import ModelConfig
from largescale.config.setting import LONGEST_RUN_S, LONGEST_WAIT_S, setting
from largescale.config.sound_settings import SoundConfig
from largescale.config.support_settings import SupportConfig

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16", "fp64")

MOST_STEPS = 10**12


@dataclass
class RunConfig:
    """The run: its folder, its seed, what it logs, how long it may take and wait."""

    dir: str = setting("runs/${name}", "Folder for everything the run writes.", min_length=1, free=True)
    seed: int = setting(0, "Seed of all random choices: weights, order, views.", at_least=0, at_most=2**62)
    log_every: int = setting(50, "Steps between log lines (metrics.jsonl and console).", at_least=1, free=True)
    trackers: list[str] = setting(
        [],
        "Experiment trackers that also get the metrics, `wandb` and `mlflow`, each where its own environment variables "
        "say; TensorBoard's files are always written.",
        table="largescale.observe.trackers:SESSIONS",
        free=True,
    )
    hang_timeout_s: float = setting(
        1800,
        "Seconds without progress before the run names the rank that is behind and exits; 0 waits forever.",
        at_least=0,
        at_most=LONGEST_WAIT_S,
        free=True,
    )
    join_timeout_s: float = setting(
        0,
        "Seconds for all ranks to join at the start; 0 is 50 s on one node and 300 s on several, where a cold start "
        "takes longer.",
        at_least=0,
        at_most=LONGEST_WAIT_S,
        free=True,
    )
    time_limit_s: float = setting(
        0, "Wall-clock limit in seconds; 0 uses SLURM's limit, if any.", at_least=0, at_most=LONGEST_RUN_S, free=True
    )
    stop_before_s: float = setting(
        120,
        "Seconds before the time limit at which the run saves and stops; must be less than it.",
        at_least=0,
        at_most=LONGEST_RUN_S,
        free=True,
    )
    lease_s: float = setting(
        30,
        "Seconds without a sign of life from the training that owns the folder before another may take it over. An "
        "owner on this machine whose process is gone is not waited for.",
        above=0,
        at_most=3600,
        free=True,
    )
    owner_wait_s: float = setting(
        10,
        "Seconds to wait for another training in the same folder to end before giving up.",
        at_least=0,
        at_most=LONGEST_WAIT_S,
        free=True,
    )


@dataclass
class MethodConfig:
    """The method and its settings.

    Every method has these; its own settings are a subclass beside it, which `config.slots` puts in this place.

    Attributes:
        moved: present names of renamed keys by their old names, which still work.
        facts: what it wants to know of views besides their pixels, of `data.views.FACTS`.
        loss_spans: what `train.loss_spans` may be; see `largescale/methods/embedding_method.py`.
    """

    moved: ClassVar[dict[str, str]] = {}
    facts: ClassVar[tuple[str, ...]] = ()
    loss_spans: ClassVar[tuple[str, ...]] = ("micro_batch",)
    owners: ClassVar[str] = "largescale.methods:METHODS"

    name: str = setting("swav", "The method that trains the network.", table=owners)

    def check(self, config: Config) -> None:
        """Check what depends on other settings.

        Raises:
            InputError: naming the key, what it got and what it expects.
        """

    def supports(self) -> SupportConfig | None:
        """What labelled images a method wants in every step beside the others, if any: those of its key `support`."""
        return None

    def uses_labels(self) -> bool:
        """Whether the network learns from labels: those of `supports`, or those that its teacher was made with."""
        return self.supports() is not None

    def sounds(self) -> SoundConfig | None:
        """What a method wants to hear with every image, if anything: that of its key `sound`."""
        return None

    def frame_tuples(self) -> WantedFrames | None:
        """Which frames of a clip are the views of a sample, if it wants several: with settings of its key `frames`."""
        return None


@dataclass
class OptimConfig:
    """The optimizer and its learning rate."""

    owners: ClassVar[str] = "largescale.optim.optimizers:OPTIMIZERS"
    chosen_by: ClassVar[str] = "optim.name"

    name: str = setting("lars", "The optimizer.", table=owners)
    lr: float = setting(4.8, "Peak learning rate.", above=0, at_most=1e38)
    final_lr: float = setting(0.0, "Learning rate at the end of the run.", at_least=0, at_most=1e38)
    warmup_lr: float = setting(0.0, "Learning rate of the first step of the warm-up.", at_least=0, at_most=1e38)
    warmup_epochs: float = setting(0.0, "Epochs of linear warm-up.", at_least=0, at_most=1e9)
    weight_decay: float = setting(1e-6, "Fraction of each weight added to its gradient.", at_least=0, at_most=1e6)
    exclude_bias_and_norm: bool = setting(
        True, "No weight decay and no LARS scaling for biases and normalisation parameters."
    )
    bias_and_norm_lr_factor: float = setting(
        1.0, "Learning rate of biases and normalisation parameters over that of weights.", at_least=0, at_most=1e6
    )
    clip_grad_norm: float = setting(
        0.0,
        "Clip the global gradient norm to this; 0 does not clip. Gradients of frozen parameters count.",
        at_least=0,
        at_most=1e30,
    )
    clip_tensor_norm: float = setting(
        0.0,
        "Clip the gradient norm of each parameter to this, by itself; 0 does not clip. Not with `clip_grad_norm`.",
        at_least=0,
        at_most=1e30,
    )


@dataclass
class TrainConfig:
    """How long to train, in what batches and precision, and what to do after a bad step."""

    epochs: float = setting(100.0, "Passes over all images, if `steps` is 0.", at_least=0, at_most=1e9)
    steps: int = setting(
        0,
        "Optimizer steps; 0 derives them from epochs. Setting `epochs` in a later file or override resets it to 0.",
        at_least=0,
        at_most=MOST_STEPS,
    )
    global_batch: int = setting(256, "Images per step over all ranks.", at_least=1, at_most=2**31)
    accumulate: int = setting(
        1,
        "Micro-batches that each step is split into, one after the other: less memory, the same images per step. "
        "BatchNorm sees one micro-batch of all ranks at a time; so does the loss, unless train.loss_spans says "
        "otherwise.",
        at_least=1,
        at_most=2**31,
    )
    loss_spans: str = setting(
        "micro_batch",
        "What the loss compares when train.accumulate is above 1: `micro_batch`, or `global_batch`, as "
        "if the step were not split, at the price of one more forward pass per step.",
        one_of=("micro_batch", "global_batch"),
    )
    precision: str = setting(
        "auto",
        "Precision to compute in. auto is that of the run's checkpoint; for a new run bf16 on CUDA, fp16 where a GPU "
        "is older than Ampere and the strategy trains in it, and fp32 elsewhere.",
        one_of=PRECISIONS,
    )
    deterministic: bool = setting(False, "Use only algorithms that give the same bits every time (on CUDA; slower).")
    spike_factor: float = setting(
        0.0,
        "Treat a gradient norm of this many times its running average as not finite; 0 never does.",
        at_least=0,
        at_most=1e30,
    )
    max_rollbacks: int = setting(
        0,
        "How often the run may go back to its last checkpoint after a non-finite step before it stops.",
        at_least=0,
        free=True,
    )
    rollback_window: int = setting(
        10,
        "Steps of data to leave out after going back, up to and including the bad one.",
        at_least=1,
        at_most=MOST_STEPS,
        used_if="train.max_rollbacks",
        free=True,
    )


@dataclass
class ParallelConfig:
    """How the model and its batch statistics are spread over ranks."""

    owners: ClassVar[str] = "largescale.parallel.strategies:STRATEGIES"
    chosen_by: ClassVar[str] = "parallel.strategy"

    strategy: str = setting("ddp", "How the model is spread over ranks.", table=owners, free=True)
    sync_batchnorm: bool = setting(
        True, "Compute batch statistics over all ranks, so that results do not depend on how many there are."
    )
    batchnorm_group_size: int = setting(
        0,
        "Neighbouring ranks that share batch statistics; 0, or more than there are, means all.",
        at_least=0,
        at_most=2**31,
        used_if="parallel.sync_batchnorm",
        free=True,
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written, which are kept, and where they are copied."""

    every_steps: int = setting(
        1000,
        "Steps between checkpoints; 0 saves only at the end and before offline phases.",
        at_least=0,
        at_most=MOST_STEPS,
        free=True,
    )
    keep: int = setting(3, "How many of the newest checkpoints to keep.", at_least=1, free=True)
    keep_every: int = setting(
        0,
        "Also keep checkpoints at multiples of this many steps; 0 keeps none of these.",
        at_least=0,
        at_most=MOST_STEPS,
        free=True,
    )
    mirror: str = setting(
        "",
        "Folder in a store (s3://..., anything fsspec knows) to copy checkpoints to, and to fetch them from if the "
        "run's folder has none as new.",
        free=True,
        place=True,
    )
    background: bool = setting(
        True, "Write while training continues, from a copy of the state in host memory.", free=True
    )


@dataclass
class EvaluateConfig:
    """How `largescale evaluate` measures."""

    owners: ClassVar[str] = "largescale.evaluate.protocols:PROTOCOLS"
    chosen_by: ClassVar[str] = ""  # the command says which

    train_shards: str = setting(
        "",
        "Labelled shard folder for the kNN bank and the linear probe; empty uses data.shards.",
        free=True,
        place=True,
    )
    resize: int = setting(256, "Shorter side before the centre crop.", at_least=1, at_most=16384, free=True)
    size: int = setting(224, "Side of the centre crop; at most evaluate.resize.", at_least=1, at_most=16384, free=True)
    batch: int = setting(256, "Images per forward pass.", at_least=1, at_most=2**20, free=True)
    baselines: bool = setting(True, "Also measure the untrained network and raw pixels.", free=True)
    online_every: float = setting(
        0.0,
        "Epochs between measurements during pretraining (kNN on training images if they have labels, effective rank "
        "and others), made at the next logged step; 0 makes none. They change nothing in the run.",
        at_least=0,
        at_most=1e9,
        free=True,
    )
    online_bank: int = setting(
        2000,
        "Training images that vote in them.",
        at_least=1,
        at_most=10**6,
        used_if="evaluate.online_every",
        free=True,
    )
    online_queries: int = setting(
        500,
        "Other training images that are classified. All are kept in memory, shared by the ranks.",
        at_least=1,
        at_most=10**6,
        used_if="evaluate.online_every",
        free=True,
    )


@dataclass
class Config:
    name: str = setting("???", "Name of the run.", min_length=1, free=True)
    init_from: str = setting(
        "", "Folder of a run, or of one of its checkpoints, whose weights a new run starts from.", place=True
    )
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
