"""The one configuration schema: every setting, its type, its default, its legal range and what it means."""

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

    dir: str = setting("runs/${name}", "Folder that receives everything the run writes.", min_length=1, free=True)
    seed: int = setting(0, "Seed of every random choice: weights, order, views.", at_least=0, at_most=2**62)
    log_every: int = setting(50, "Steps between two lines of metrics.jsonl and of the console.", at_least=1, free=True)
    hang_timeout_s: float = setting(
        1800, "Time without progress after which the rank that is behind is named and the run ends; 0 waits forever.",
        at_least=0, at_most=_LONGEST_WAIT_S, free=True)
    join_timeout_s: float = setting(
        0, "Time within which all ranks have to come at the start; 0 is 50 s on one node and 300 s on several, where "
        "a cold start takes longer.", at_least=0, at_most=_LONGEST_WAIT_S, free=True)
    time_limit_s: float = setting(
        0, "Time that the run has; 0 is none but the SLURM job's, if there is one.",
        at_least=0, at_most=_LONGEST_RUN_S, free=True)
    stop_before_s: float = setting(
        120, "Time before run.time_limit_s at which the run saves and stops; shorter than that.", at_least=0,
        at_most=_LONGEST_RUN_S, free=True)
    lease_s: float = setting(
        30, "Time without a sign of life from the training that owns the folder after which another may take it over; "
        "one whose process is gone from this machine is not waited for.", above=0, at_most=3600, free=True)
    owner_wait_s: float = setting(
        10, "How long to wait for the end of another training in the same folder before giving up.",
        at_least=0, at_most=_LONGEST_WAIT_S, free=True)


@dataclass
class CropGroup:
    """A group of views of one size."""

    num: int = setting(2, "Views of this size per image.", at_least=1, at_most=1000)
    size: int = setting(224, "Side in pixels of the square view.", at_least=1, at_most=16384)
    scale: list[float] = setting(
        [0.14, 1.0], "Smallest and largest share of the image's area that a crop covers.", **_RANGE, at_most=1,
        expected="[smallest, largest] within (0, 1]")
    ratio: list[float] = setting(
        [0.75, 4 / 3], "Smallest and largest width / height of a crop.", **_RANGE, at_most=1000,
        expected="[smallest, largest], above 0 and at most 1000")


@dataclass
class AugmentConfig:
    """Photometric and geometric changes of the views; a strength or probability of 0 switches one off."""

    flip: float = setting(0.5, "Probability of a horizontal flip.", **_PROBABILITY)
    rotate_degrees: float = setting(0.0, "Largest rotation, either way.", at_least=0, at_most=180)
    jitter: float = setting(0.8, "Probability of the colour jitter; its strengths follow.", **_PROBABILITY)
    brightness: float = setting(
        0.8, "Brightness times 1 + U(-x, x), not below 0.", at_least=0, at_most=1000, used_if="data.augment.jitter")
    contrast: float = setting(
        0.8, "Contrast times 1 + U(-x, x), not below 0.", at_least=0, at_most=1000, used_if="data.augment.jitter")
    saturation: float = setting(
        0.8, "Saturation times 1 + U(-x, x), not below 0.", at_least=0, at_most=1000, used_if="data.augment.jitter")
    hue: float = setting(
        0.2, "Hue turned by U(-x, x) full turns.", at_least=0, at_most=0.5, used_if="data.augment.jitter")
    gamma: float = setting(0.0, "Exponent drawn as exp(U(-gamma, gamma)).", at_least=0, at_most=10)
    gain: float = setting(
        0.0, "Intensities times 1 + U(-gain, gain), not clipped: unlike brightness it loses nothing.",
        at_least=0, at_most=1000)
    grayscale: float = setting(0.2, "Probability that a view loses its colours.", **_PROBABILITY)
    blur: float = setting(0.5, "Probability of Gaussian blur.", **_PROBABILITY)
    blur_sigma: list[float] = setting(
        [0.1, 2.0], "Smallest and largest standard deviation of that blur, in pixels of the view.", **_RANGE,
        at_most=1000, used_if="data.augment.blur", expected="[smallest, largest], above 0 and at most 1000")
    noise: float = setting(
        0.0, "Largest standard deviation of Gaussian noise, in units where white is 1.", at_least=0, at_most=1000)
    erase: float = setting(0.0, "Probability of one rectangle of uniform grey.", **_PROBABILITY)
    erase_side: list[float] = setting(
        [0.2, 0.5], "Smallest and largest side of that rectangle, as a share of the view's side.",
        at_least=0, at_most=1, length=2, ascending=True, used_if="data.augment.erase",
        expected="[smallest, largest] within [0, 1]")


@dataclass
class DataConfig:
    """The images: where they are, in which order they come, how they become views."""

    shards: Any = setting(
        "???", "Shard folder to pretrain on, or its URL (s3://..., http://..., any that fsspec knows); labels, if "
        "there are any, are not looked at. A list mixes several: {path: FOLDER, weight: SHARE, subset: FILE}.",
        free=True)
    subset: str = setting(
        "", "File that lists the samples to use: .npy of their numbers, or a key per line (numbers where the first "
        "line is `# numbers`); empty uses all.", free=True)
    eval_shards: str = setting("", "Labelled shard folder that the evaluation tests on.", free=True)
    audit: bool = setting(False, "Write the keys that each rank trained on to audit/rank-*.jsonl.", free=True)
    workers: int = setting(
        -1, "Loader processes per rank; -1 chooses by the CPUs there are, 0 loads in the training process.",
        at_least=-1, at_most=1024, expected="0 or more (at most 1024), or -1", free=True)
    threads: int = setting(
        0, "Decoding threads of each loader process; 0 chooses.", at_least=0, at_most=1024, free=True)
    prefetch: int = setting(4, "Steps that are loaded ahead.", at_least=1, at_most=10_000, free=True)
    cache: str = setting(
        "", "Folder for the shards of a store, shared by the runs of a node; empty is one on the temporary disk.",
        free=True)
    cache_gb: float = setting(
        0.0, "Gigabytes that the folder of the cache may take; 0 is half of what is free.", at_least=0, at_most=1e9,
        free=True)
    fetches: int = setting(
        4, "Shards that a rank fetches from a store at the same time.", at_least=1, at_most=1024, free=True)
    store_patience_s: float = setting(
        600.0, "Time for which a store that fails is asked again, or a folder that is away waited for, before the run "
        "stops.", at_least=0, at_most=_LONGEST_RUN_S, free=True)
    store_stall_s: float = setting(
        60.0, "Time without an answer after which a request to a store is made again, and a loader process that stands "
        "still is named.", above=0, at_most=_LONGEST_WAIT_S, free=True)
    streams: int = setting(
        8, "Canonical streams the epoch's order is laid out over; divides train.global_batch.",
        at_least=1, at_most=2**31)
    shuffle_window: int = setting(
        65536, "Samples of a stream that are shuffled among each other.", at_least=1, at_most=2**40)
    crops: list[CropGroup] = setting(
        [CropGroup(), CropGroup(num=6, size=96, scale=[0.05, 0.14])],
        "Views of an image, one group per size.", min_length=1,
        expected="at least one group")
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: list[float] = setting(
        [0.485, 0.456, 0.406], "Mean of each channel, which is subtracted from views.", length=3, at_least=-1000,
        at_most=1000, expected="three numbers, one per channel")
    std: list[float] = setting(
        [0.229, 0.224, 0.225], "Standard deviation of each channel, by which views are divided.", length=3,
        at_least=1e-6, at_most=1000, expected="three numbers above 0, one per channel")
    scaled_decode: float = setting(
        2.0, "Decode a JPEG at 1/2, 1/4 or 1/8 of its size where all its crops stay this many times larger than their "
        "views; 0 always decodes whole images.", at_least=0, at_most=1e6)
    max_skipped: int = setting(1000, "The run stops after this many images had to be replaced.", at_least=0, free=True)
    max_skipped_in_row: int = setting(
        100, "Neighbours of an unreadable image that are tried before the run stops.", at_least=1, free=True)
    max_skipped_rate: float = setting(
        0.5, "The run stops if more than this share of the images between two logged steps had to be replaced.",
        at_least=0, at_most=1e6, free=True)
    max_pixels: int = setting(
        178_956_970, "Larger images are skipped before they are decoded (decompression bombs).", at_least=1, free=True)


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
        [2, 2, 2, 2], "Blocks of each stage, for `resnet`.", at_least=1, at_most=1000, min_length=1,
        used_if="model.backbone=resnet", expected="blocks of each stage, at least 1 and at most 1000")
    width: int = setting(
        64, "Channels of the first stage, for `resnet`; each stage doubles them.", at_least=1, at_most=2**20,
        used_if="model.backbone=resnet")
    block: str = setting(
        "basic", "`basic` or `bottleneck`, for `resnet`.", one_of=("basic", "bottleneck"),
        used_if="model.backbone=resnet")
    recompute_stages: list[int] = setting(
        [], "Stages, from 1, whose blocks' activations are recomputed in the backward pass instead of kept "
        "(checkpointing).", free=True)
    compile_stages: list[int] = setting(
        [], "Stages, from 1, whose blocks go through torch.compile; not those that are recomputed.", free=True)


@dataclass
class MethodConfig:
    """The method, and what can be set of it.

    This is what every method has; its own settings are a subclass beside it, which `config.slots` puts in this place.

    Attributes:
        moved: keys that were called otherwise in earlier versions, by their old names; these still work.
        loss_spans: what `train.loss_spans` may be; see `largescale/methods/embedding_method.py`.
    """

    moved: ClassVar[dict[str, str]] = {}
    loss_spans: ClassVar[tuple[str, ...]] = ("micro_batch",)

    name: str = setting("swav", "The method that trains the network.", table="largescale.methods:METHODS")

    def check(self, config: Config) -> None:
        """Check what must fit other settings.

        Raises:
            InputError: naming the key, what it got and what it expects.
        """


@dataclass
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = setting("lars", "The optimizer.", table="largescale.optim.optimizers:OPTIMIZERS")
    lr: float = setting(4.8, "Learning rate at its peak.", above=0, at_most=1e38)
    final_lr: float = setting(0.0, "Learning rate at the end of the run.", at_least=0, at_most=1e38)
    warmup_lr: float = setting(0.0, "Learning rate of the first step of the warm-up.", at_least=0, at_most=1e38)
    warmup_epochs: float = setting(0.0, "Epochs of linear warm-up.", at_least=0, at_most=1e9)
    weight_decay: float = setting(1e-6, "Share of a weight that joins its gradient.", at_least=0, at_most=1e6)
    momentum: float = setting(
        0.9, "Share of the earlier updates in an update.", at_least=0, below=1, used_if="optim.name=lars|sgd",
        expected="at least 0 and below 1")
    betas: list[float] = setting(
        [0.9, 0.999], "Memory of the mean gradient and of its square.", at_least=0, below=1, length=2,
        used_if="optim.name=adamw", expected="two numbers, each at least 0 and below 1")
    trust_coefficient: float = setting(
        0.001, "Length of an update over the length of its weights, before the learning rate.", above=0, at_most=1e6,
        used_if="optim.name=lars")
    exclude_bias_and_norm: bool = setting(
        True, "Biases and normalisation parameters get no weight decay and no LARS scaling.")
    clip_grad_norm: float = setting(
        0.0, "Largest global gradient norm; 0 does not clip.", at_least=0, at_most=1e30)


@dataclass
class TrainConfig:
    """How long and in which batches and numbers to train, and what happens after a bad step."""

    epochs: float = setting(100.0, "Times that all images are used, where `steps` is 0.", at_least=0, at_most=1e9)
    steps: int = setting(
        0, "Optimizer steps; 0 derives them from epochs. A later file or an override that sets `epochs` makes it 0.",
        at_least=0, at_most=MOST_STEPS)
    global_batch: int = setting(256, "Images per step over all ranks.", at_least=1, at_most=2**31)
    accumulate: int = setting(
        1, "Micro-batches that a step is cut into, one after the other: less memory, the same images in a step. "
        "BatchNorm sees one micro-batch of all ranks at a time; the loss too, unless loss_spans says otherwise.",
        at_least=1, at_most=2**31)
    loss_spans: str = setting(
        "micro_batch", "What the loss compares where train.accumulate is above 1: `micro_batch`, or `global_batch`, as "
        "if the step were not cut, for a forward pass more per step.", one_of=("micro_batch", "global_batch"))
    precision: str = setting(
        "auto", "Numbers to compute with; auto is bf16 on CUDA and fp32 elsewhere.",
        one_of=PRECISIONS)
    deterministic: bool = setting(
        False, "Only algorithms that give the same bits every time (on CUDA; slower).")
    spike_factor: float = setting(
        0.0, "A gradient norm of this many times its running average is treated like one that is not finite; 0 never.",
        at_least=0, at_most=1e30)
    max_rollbacks: int = setting(
        0, "How often the run may go back to its last checkpoint after a step that is not finite; then it stops.",
        at_least=0, free=True)
    rollback_window: int = setting(
        10, "Steps of data, up to the bad one, that are left out after going back.", at_least=1, at_most=MOST_STEPS,
        used_if="train.max_rollbacks", free=True)


@dataclass
class ParallelConfig:
    """How model and statistics are spread over ranks."""

    strategy: str = setting(
        "ddp", "How the model is spread over ranks.", table="largescale.parallel.strategies:STRATEGIES", free=True)
    replicate: int = setting(
        1, "Copies of the sharded model (HSDP); gradients are averaged over them. Neighbouring ranks share a "
        "copy, so that a node can hold one.", at_least=1, at_most=2**31, used_if="parallel.strategy=fsdp", free=True)
    shard: int = setting(
        0, "Ranks that a copy is cut over; 0 is all ranks / replicate.", at_least=0, at_most=2**31,
        used_if="parallel.strategy=fsdp", free=True)
    cpu_offload: bool = setting(
        False, "Keep sharded parameters and optimizer state in host memory, and update there.",
        used_if="parallel.strategy=fsdp|zero1|zero2|zero3", free=True)
    sync_batchnorm: bool = setting(
        True, "Batch statistics over all ranks, so that results do not depend on their number.")
    batchnorm_group_size: int = setting(
        0, "Neighbouring ranks that share batch statistics; 0, or more than there are, is all of them.",
        at_least=0, at_most=2**31, used_if="parallel.sync_batchnorm", free=True)
    reshard_after_forward: bool = setting(
        True, "Free gathered parameters after the forward pass.", used_if="parallel.strategy=fsdp", free=True)
    unit_min_parameters: int = setting(
        2_000_000, "Blocks with fewer parameters are gathered with the whole model instead of one by one.",
        at_least=0, used_if="parallel.strategy=fsdp", free=True)
    sharded_init: bool = setting(
        False, "No rank ever builds the whole network; each draws the pieces it holds (another draw than the "
        "whole one, the same on any number of ranks).", used_if="parallel.strategy=fsdp", free=True)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, which are kept, and where they are copied to."""

    every_steps: int = setting(
        1000, "Steps between checkpoints; 0 saves only at the end.", at_least=0, at_most=MOST_STEPS, free=True)
    keep: int = setting(3, "Newest checkpoints to keep.", at_least=1, free=True)
    keep_every: int = setting(
        0, "Also keep the checkpoints of every so many steps; 0 keeps none of these.", at_least=0,
        at_most=MOST_STEPS, free=True)
    mirror: str = setting(
        "", "Folder in a store (s3://..., any that fsspec knows) where checkpoints are copied to, and fetched from if "
        "the run's folder has none as new.", free=True)
    background: bool = setting(
        True, "Write while the training goes on, from a copy of the state in host memory.", free=True)


@dataclass
class EvaluateConfig:
    """What `largescale evaluate` measures with."""

    train_shards: str = setting(
        "", "Labelled shard folder for the kNN bank and the linear probe; empty means data.shards.", free=True)
    resize: int = setting(256, "Shorter side before the centre crop.", at_least=1, at_most=16384, free=True)
    size: int = setting(224, "Side of the centre crop; at most evaluate.resize.", at_least=1, at_most=16384, free=True)
    batch: int = setting(256, "Images per forward pass.", at_least=1, at_most=2**20, free=True)
    baselines: bool = setting(True, "Also measure the untrained network and raw pixels.", free=True)
    knn_neighbours: list[int] = setting(
        [10, 20, 50, 100, 200], "Numbers of neighbours that vote.", at_least=1, min_length=1, free=True)
    knn_temperature: float = setting(
        0.07, "A neighbour's vote weighs exp(cosine / temperature).", at_least=1e-6, at_most=1e6, free=True)
    linear_epochs: int = setting(100, "Epochs of the linear probe.", at_least=1, at_most=10**6, free=True)
    linear_batch: int = setting(512, "Images per step of the linear probe.", at_least=1, at_most=2**31, free=True)
    linear_rates: list[float] = setting(
        [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0], "Learning rates that the linear probe tries.", above=0, at_most=1e9,
        min_length=1, free=True)
    linear_weight_decay: float = setting(0.0, "Weight decay of the linear probe.", at_least=0, at_most=1e6, free=True)


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
