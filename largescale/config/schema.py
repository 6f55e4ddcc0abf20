"""The settings that every run has: type, default, legal range and meaning of each.

What belongs to one method, optimizer, strategy or protocol is declared beside it, in a subclass of `MethodConfig`,
`OptimConfig`, `ParallelConfig` or `EvaluateConfig` that the table in `owners` names; `config.slots` puts all together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from largescale.config.setting import setting

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16", "fp64")

# Clocks and byte counts overflow beyond these.
_LONGEST_WAIT_S = 1e6
_LONGEST_RUN_S = 1e9
MOST_STEPS = 10**12

_PROBABILITY: dict[str, Any] = {"at_least": 0, "at_most": 1, "expected": "a probability from 0 to 1"}
_RANGE: dict[str, Any] = {"above": 0, "length": 2, "ascending": True}


@dataclass
class RunConfig:
    """The run: its folder, its seed, what it logs, how long it may take and wait."""

    dir: str = setting("runs/${name}", "Folder for everything the run writes.", min_length=1, free=True)
    seed: int = setting(0, "Seed of all random choices: weights, order, views.", at_least=0, at_most=2**62)
    log_every: int = setting(50, "Steps between log lines (metrics.jsonl and console).", at_least=1, free=True)
    hang_timeout_s: float = setting(
        1800, "Seconds without progress before the run names the rank that is behind and exits; 0 waits forever.",
        at_least=0, at_most=_LONGEST_WAIT_S, free=True)
    join_timeout_s: float = setting(
        0, "Seconds for all ranks to join at the start; 0 is 50 s on one node and 300 s on several, where a cold start "
        "takes longer.", at_least=0, at_most=_LONGEST_WAIT_S, free=True)
    time_limit_s: float = setting(
        0, "Wall-clock limit in seconds; 0 uses SLURM's limit, if any.",
        at_least=0, at_most=_LONGEST_RUN_S, free=True)
    stop_before_s: float = setting(
        120, "Seconds before the time limit at which the run saves and stops; must be less than it.", at_least=0,
        at_most=_LONGEST_RUN_S, free=True)
    lease_s: float = setting(
        30, "Seconds without a sign of life from the training that owns the folder before another may take it over. An "
        "owner on this machine whose process is gone is not waited for.", above=0, at_most=3600, free=True)
    owner_wait_s: float = setting(
        10, "Seconds to wait for another training in the same folder to end before giving up.",
        at_least=0, at_most=_LONGEST_WAIT_S, free=True)


@dataclass
class CropGroup:
    """A group of views of one size."""

    num: int = setting(2, "Views of this size per image.", at_least=1, at_most=1000)
    size: int = setting(224, "Side in pixels of the square view.", at_least=1, at_most=16384)
    scale: list[float] = setting(
        [0.14, 1.0], "Smallest and largest fraction of the image's area that a crop covers.", **_RANGE, at_most=1,
        expected="[smallest, largest] within (0, 1]")
    ratio: list[float] = setting(
        [0.75, 4 / 3], "Smallest and largest width / height of a crop.", **_RANGE, at_most=1000,
        expected="[smallest, largest], above 0 and at most 1000")
    augment: dict[str, Any] = setting(
        {}, "Keys of data.augment to override for these views, such as {blur: 1.0, solarise: 0.2}; put views that "
        "differ in groups of their own.", expected="{KEY: value} with keys of data.augment")


@dataclass
class AugmentConfig:
    """Photometric and geometric changes of the views; a strength or probability of 0 switches one off."""

    flip: float = setting(0.5, "Probability of a horizontal flip.", **_PROBABILITY)
    rotate_degrees: float = setting(0.0, "Largest rotation in either direction.", at_least=0, at_most=180)
    jitter: float = setting(0.8, "Probability of colour jitter; its strengths follow.", **_PROBABILITY)
    brightness: float = setting(
        0.8, "Multiplies brightness by 1 + U(-x, x).", at_least=0, at_most=1000, used_if="data.augment.jitter")
    contrast: float = setting(
        0.8, "Multiplies contrast by 1 + U(-x, x).", at_least=0, at_most=1000, used_if="data.augment.jitter")
    saturation: float = setting(
        0.8, "Multiplies saturation by 1 + U(-x, x).", at_least=0, at_most=1000, used_if="data.augment.jitter")
    hue: float = setting(
        0.2, "Rotates hue by U(-x, x) full turns.", at_least=0, at_most=0.5, used_if="data.augment.jitter")
    gamma: float = setting(0.0, "Draws the gamma exponent as exp(U(-gamma, gamma)).", at_least=0, at_most=10)
    gain: float = setting(
        0.0, "Multiplies intensities by 1 + U(-gain, gain) without clipping: unlike brightness, it loses nothing.",
        at_least=0, at_most=1000)
    grayscale: float = setting(0.2, "Probability of turning a view grey.", **_PROBABILITY)
    blur: float = setting(0.5, "Probability of Gaussian blur.", **_PROBABILITY)
    blur_sigma: list[float] = setting(
        [0.1, 2.0], "Smallest and largest standard deviation of the blur, in pixels of the view.", **_RANGE,
        at_most=1000, used_if="data.augment.blur", expected="[smallest, largest], above 0 and at most 1000")
    solarise: float = setting(
        0.0, "Probability of solarising a view: intensities from the threshold up are inverted.", **_PROBABILITY)
    solarise_threshold: float = setting(
        0.5, "Smallest intensity to invert, where white is 1.", at_least=0, at_most=1, used_if="data.augment.solarise")
    noise: float = setting(
        0.0, "Largest standard deviation of Gaussian noise, where white is 1.", at_least=0, at_most=1000)
    erase: float = setting(0.0, "Probability of erasing one rectangle to uniform grey.", **_PROBABILITY)
    erase_side: list[float] = setting(
        [0.2, 0.5], "Smallest and largest side of that rectangle, as a fraction of the view's side.",
        at_least=0, at_most=1, length=2, ascending=True, used_if="data.augment.erase",
        expected="[smallest, largest] within [0, 1]")


@dataclass
class DataConfig:
    """The images: where they are, in what order they come, how they become views."""

    shards: Any = setting(
        "???", "Shard folder to pretrain on, or its URL (s3://..., http://..., anything fsspec knows); labels are "
        "ignored. A list mixes several: {path: FOLDER, weight: SHARE, subset: FILE}.",
        free=True)
    subset: str = setting(
        "", "File that lists the samples to use: a .npy of sample numbers, or text with one key per line (one number "
        "per line if the first line is `# numbers`); empty uses all.", free=True)
    eval_shards: str = setting("", "Labelled shard folder to evaluate on.", free=True)
    audit: bool = setting(False, "Record the keys each rank trained on in audit/rank-*.jsonl.", free=True)
    workers: int = setting(
        -1, "Loader processes per rank; -1 chooses by the available CPUs, 0 loads in the training process.",
        at_least=-1, at_most=1024, expected="0 or more (at most 1024), or -1", free=True)
    threads: int = setting(
        0, "Decoding threads per loader process; 0 chooses.", at_least=0, at_most=1024, free=True)
    prefetch: int = setting(4, "Steps to load ahead.", at_least=1, at_most=10_000, free=True)
    cache: str = setting(
        "", "Folder to cache shards of a store in, shared by all runs on a node; empty uses the temporary disk.",
        free=True)
    cache_gb: float = setting(
        0.0, "Size limit of the cache folder in GB; 0 is half of the free space.", at_least=0, at_most=1e9,
        free=True)
    fetches: int = setting(
        4, "Shards a rank fetches from a store at the same time.", at_least=1, at_most=1024, free=True)
    store_patience_s: float = setting(
        600.0, "Seconds to keep retrying a store that fails, or to wait for a folder that is away, before the run "
        "stops.", at_least=0, at_most=_LONGEST_RUN_S, free=True)
    store_stall_s: float = setting(
        60.0, "Seconds without an answer before a request to a store is retried, and before a stalled loader process "
        "is named in the log.", above=0, at_most=_LONGEST_WAIT_S, free=True)
    streams: int = setting(
        8, "Canonical streams that an epoch's order is laid out over; must divide train.global_batch.",
        at_least=1, at_most=2**31)
    shuffle_window: int = setting(
        65536, "Samples of a stream that are shuffled together.", at_least=1, at_most=2**40)
    crops: list[CropGroup] = setting(
        [CropGroup(), CropGroup(num=6, size=96, scale=[0.05, 0.14])],
        "Views of an image, one group per size.", min_length=1,
        expected="at least one group")
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: list[float] = setting(
        [0.485, 0.456, 0.406], "Mean of each channel, subtracted from views.", length=3, at_least=-1000,
        at_most=1000, expected="three numbers, one per channel")
    std: list[float] = setting(
        [0.229, 0.224, 0.225], "Standard deviation of each channel, which views are divided by.", length=3,
        at_least=1e-6, at_most=1000, expected="three numbers above 0, one per channel")
    scaled_decode: float = setting(
        2.0, "Decode JPEGs at reduced size (1/2, 1/4, 1/8) as long as every crop keeps at least this many source "
        "pixels per view pixel along each side; 0 always decodes whole images.", at_least=0, at_most=1e6)
    max_skipped: int = setting(1000, "Stop after this many images had to be replaced.", at_least=0, free=True)
    max_skipped_in_row: int = setting(
        100, "Neighbours of an unreadable image to try before the run stops.", at_least=1, free=True)
    max_skipped_rate: float = setting(
        0.5, "Stop if more than this fraction of images in a logging interval had to be replaced.",
        at_least=0, at_most=1e6, free=True)
    max_pixels: int = setting(
        178_956_970, "Skip larger images before decoding them (decompression bombs).", at_least=1, free=True)


@dataclass
class ModelConfig:
    """The backbone."""

    backbone: str = setting(
        "resnet50", "A torchvision resnet* / wide_resnet* / regnet_* name; resnet50w2, w4, w5 (SwAV's); regnet_y_64gf, "
        "256gf, 10b (SEER's); or `resnet` with the depths and width below.",
        table="largescale.models.backbones:available")
    stem: str = setting(
        "imagenet", "`imagenet` as published, `3x3s2` or `3x3`: one 3x3 convolution (stride 2 or 1), no pooling.",
        one_of=("imagenet", "3x3s2", "3x3"))
    depths: list[int] = setting(
        [2, 2, 2, 2], "Blocks per stage, for `resnet`.", at_least=1, at_most=1000, min_length=1,
        used_if="model.backbone=resnet", expected="blocks per stage, at least 1 and at most 1000")
    width: int = setting(
        64, "Channels of the first stage, for `resnet`; doubled at each stage.", at_least=1, at_most=2**20,
        used_if="model.backbone=resnet")
    block: str = setting(
        "basic", "`basic` or `bottleneck`, for `resnet`.", one_of=("basic", "bottleneck"),
        used_if="model.backbone=resnet")
    recompute_stages: list[int] = setting(
        [], "Stages (from 1) whose activations are recomputed in the backward pass instead of stored (checkpointing).",
        free=True)
    compile_stages: list[int] = setting(
        [], "Stages (from 1) whose blocks go through torch.compile; none of the recomputed ones.", free=True)


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
        True, "No weight decay and no LARS scaling for biases and normalisation parameters.")
    clip_grad_norm: float = setting(
        0.0, "Clip the global gradient norm to this; 0 does not clip.", at_least=0, at_most=1e30)


@dataclass
class TrainConfig:
    """How long to train, in what batches and precision, and what to do after a bad step."""

    epochs: float = setting(100.0, "Passes over all images, if `steps` is 0.", at_least=0, at_most=1e9)
    steps: int = setting(
        0, "Optimizer steps; 0 derives them from epochs. Setting `epochs` in a later file or override resets it to 0.",
        at_least=0, at_most=MOST_STEPS)
    global_batch: int = setting(256, "Images per step over all ranks.", at_least=1, at_most=2**31)
    accumulate: int = setting(
        1, "Micro-batches that each step is split into, one after the other: less memory, the same images per step. "
        "BatchNorm sees one micro-batch of all ranks at a time; so does the loss, unless train.loss_spans says "
        "otherwise.",
        at_least=1, at_most=2**31)
    loss_spans: str = setting(
        "micro_batch", "What the loss compares when train.accumulate is above 1: `micro_batch`, or `global_batch`, as "
        "if the step were not split, at the price of one more forward pass per step.",
        one_of=("micro_batch", "global_batch"))
    precision: str = setting(
        "auto", "Precision to compute in; auto is bf16 on CUDA and fp32 elsewhere.",
        one_of=PRECISIONS)
    deterministic: bool = setting(
        False, "Use only algorithms that give the same bits every time (on CUDA; slower).")
    spike_factor: float = setting(
        0.0, "Treat a gradient norm of this many times its running average as not finite; 0 never does.",
        at_least=0, at_most=1e30)
    max_rollbacks: int = setting(
        0, "How often the run may go back to its last checkpoint after a non-finite step before it stops.",
        at_least=0, free=True)
    rollback_window: int = setting(
        10, "Steps of data to leave out after going back, up to and including the bad one.", at_least=1,
        at_most=MOST_STEPS, used_if="train.max_rollbacks", free=True)


@dataclass
class ParallelConfig:
    """How the model and its batch statistics are spread over ranks."""

    owners: ClassVar[str] = "largescale.parallel.strategies:STRATEGIES"
    chosen_by: ClassVar[str] = "parallel.strategy"

    strategy: str = setting("ddp", "How the model is spread over ranks.", table=owners, free=True)
    sync_batchnorm: bool = setting(
        True, "Compute batch statistics over all ranks, so that results do not depend on how many there are.")
    batchnorm_group_size: int = setting(
        0, "Neighbouring ranks that share batch statistics; 0, or more than there are, means all.",
        at_least=0, at_most=2**31, used_if="parallel.sync_batchnorm", free=True)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, which are kept, and where they are copied."""

    every_steps: int = setting(
        1000, "Steps between checkpoints; 0 saves only at the end.", at_least=0, at_most=MOST_STEPS, free=True)
    keep: int = setting(3, "How many of the newest checkpoints to keep.", at_least=1, free=True)
    keep_every: int = setting(
        0, "Also keep checkpoints at multiples of this many steps; 0 keeps none of these.", at_least=0,
        at_most=MOST_STEPS, free=True)
    mirror: str = setting(
        "", "Folder in a store (s3://..., anything fsspec knows) to copy checkpoints to, and to fetch them from if the "
        "run's folder has none as new.", free=True)
    background: bool = setting(
        True, "Write while training continues, from a copy of the state in host memory.", free=True)


@dataclass
class EvaluateConfig:
    """How `largescale evaluate` measures."""

    owners: ClassVar[str] = "largescale.evaluate.protocols:PROTOCOLS"
    chosen_by: ClassVar[str] = ""  # the command says which

    train_shards: str = setting(
        "", "Labelled shard folder for the kNN bank and the linear probe; empty uses data.shards.", free=True)
    resize: int = setting(256, "Shorter side before the centre crop.", at_least=1, at_most=16384, free=True)
    size: int = setting(224, "Side of the centre crop; at most evaluate.resize.", at_least=1, at_most=16384, free=True)
    batch: int = setting(256, "Images per forward pass.", at_least=1, at_most=2**20, free=True)
    baselines: bool = setting(True, "Also measure the untrained network and raw pixels.", free=True)


@dataclass
class Config:
    name: str = setting("???", "Name of the run.", min_length=1, free=True)
    init_from: str = setting(
        "", "Folder of a run, or of one of its checkpoints, whose weights a new run starts from.")
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
