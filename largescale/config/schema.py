"""The one configuration schema: every setting, its type, its default and what it means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16", "fp64")


@dataclass
class RunConfig:
    dir: str = "runs/${name}"
    """Folder that receives everything the run writes."""
    seed: int = 0
    log_every: int = 50
    """Steps between two lines of metrics.jsonl and of the console."""
    hang_timeout_s: float = 1800
    """Time without progress after which the rank that is behind is named and the run ends; 0 waits for ever."""
    time_limit_s: float = 0
    """Time that the run has; 0 is none but the SLURM job's, if there is one."""
    stop_before_s: float = 120
    """Time before that limit at which the run saves and stops; shorter than the limit."""
    lease_s: float = 30
    """Time without a sign of life from the training that owns the folder after which another may take it over; one
    whose process is gone from this machine is not waited for."""
    owner_wait_s: float = 10
    """How long to wait for the end of another training in the same folder before giving up."""


@dataclass
class CropGroup:
    num: int = 2
    size: int = 224
    """Side in pixels of the square view."""
    scale: list[float] = field(default_factory=lambda: [0.14, 1.0])
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    """Smallest and largest width / height of a crop."""


@dataclass
class AugmentConfig:
    """Photometric and geometric changes of the views; a strength or probability of 0 switches one off."""

    flip: float = 0.5
    rotate_degrees: float = 0.0
    jitter: float = 0.8
    """Probability of the colour jitter; its strengths follow."""
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    gamma: float = 0.0
    """Exponent drawn as exp(U(-gamma, gamma))."""
    gain: float = 0.0
    """Intensities times 1 + U(-gain, gain), not clipped: unlike brightness it loses nothing."""
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, in units where white is 1."""
    erase: float = 0.0
    """Probability of one rectangle of uniform grey."""
    erase_side: list[float] = field(default_factory=lambda: [0.2, 0.5])
    """Smallest and largest side of that rectangle, as a share of the view's side."""


@dataclass
class DataConfig:
    shards: Any = "???"
    """Shard folder to pretrain on, or its URL (s3://..., http://..., any that fsspec knows); labels, if there are any,
    are not looked at. A list mixes several: {path: FOLDER, weight: SHARE, subset: FILE}."""
    subset: str = ""
    """File that lists the samples to use: .npy of their numbers, or a key a line (numbers where the first line is
    `# numbers`); empty uses all."""
    eval_shards: str = ""
    """Labelled shard folder that the evaluation tests on."""
    audit: bool = False
    """Write the keys that each rank trained on to audit/rank-*.jsonl."""
    workers: int = -1
    """Loader processes a rank; -1 chooses by the CPUs there are, 0 loads in the training process."""
    threads: int = 0
    """Decoding threads of each loader process; 0 chooses."""
    prefetch: int = 4
    """Steps that are loaded ahead."""
    cache: str = ""
    """Folder for the shards of a store, shared by the runs of a node; empty is one on the temporary disk."""
    cache_gb: float = 0.0
    """What that folder may take; 0 is half of what is free."""
    fetches: int = 4
    """Shards that a rank fetches from a store at the same time."""
    store_patience_s: float = 600.0
    """Time for which a store that fails is asked again, or a folder that is away waited for, before the run stops."""
    store_stall_s: float = 60.0
    """Time without an answer after which a request to a store is made again, and a loader process that stands still is
    named."""
    streams: int = 8
    """Canonical streams the epoch's order is laid out over; divides train.global_batch."""
    shuffle_window: int = 65536
    """Samples of a stream that are shuffled among each other."""
    crops: list[CropGroup] = field(
        default_factory=lambda: [CropGroup(), CropGroup(num=6, size=96, scale=[0.05, 0.14])]
    )
    """Views of an image, one group a size; codes come from the first group."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    scaled_decode: float = 2.0
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where all its crops stay so many times larger than their views; 0
    always decodes whole images."""
    max_skipped: int = 1000
    """Places of batches whose image was unreadable after which the run stops."""
    max_skipped_in_row: int = 100
    """Neighbours of an unreadable image that are tried before the run stops."""
    max_skipped_rate: float = 0.5
    """Share of the places of batches between two logged steps whose image was unreadable at which the run stops."""
    max_pixels: int = 178_956_970
    """Larger images are skipped before they are decoded (decompression bombs)."""


@dataclass
class ModelConfig:
    backbone: str = "resnet50"
    """A torchvision resnet* / wide_resnet* / regnet_* name; resnet50w2, w4, w5 (SwAV's); regnet_y_64gf, 256gf, 10b
    (SEER's); or `resnet` with the depths and width below."""
    stem: str = "imagenet"
    """`imagenet` as published, `3x3s2` or `3x3`: one 3x3 convolution (stride 2 or 1), no pooling."""
    depths: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """Blocks of each stage, for `resnet`."""
    width: int = 64
    """Channels of the first stage, for `resnet`; each stage doubles them."""
    block: str = "basic"
    """`basic` or `bottleneck`, for `resnet`."""
    hidden: list[int] = field(default_factory=lambda: [2048])
    """Hidden widths of the projection head."""
    head_batchnorm: bool = True
    embedding: int = 128
    """Dimension in which views meet prototypes."""
    prototypes: Any = 3000
    """Number of prototypes; a list makes several heads."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages, from 1, whose blocks' activations are recomputed in the backward pass instead of kept (checkpointing)."""
    compile_stages: list[int] = field(default_factory=list)
    """Stages, from 1, whose blocks go through torch.compile; not those that are recomputed."""


@dataclass
class MethodConfig:
    name: str = "swav"
    temperature: float = 0.1
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    freeze_prototypes_steps: int = 0
    queue: int = 0
    """Samples of earlier steps that take part in the assignment; a multiple of train.global_batch."""
    queue_start_step: int = 0
    """Step at which the queue begins to fill; it is used once it is full."""


@dataclass
class OptimConfig:
    name: str = "lars"
    lr: float = 4.8
    final_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup_epochs: float = 0.0
    weight_decay: float = 1e-6
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    trust_coefficient: float = 0.001
    exclude_bias_and_norm: bool = True
    """Biases and normalisation parameters get no weight decay and no LARS scaling."""
    clip_grad_norm: float = 0.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass
class TrainConfig:
    epochs: float = 100.0
    """Times that all images are used, where `steps` is 0."""
    steps: int = 0
    """Optimizer steps; 0 derives them from epochs. A later file or an override that sets `epochs` makes it 0."""
    global_batch: int = 256
    """Images a step over all ranks."""
    accumulate: int = 1
    """Micro-batches that a step is cut into, one after the other: less memory, the same images in a step. BatchNorm and
    Sinkhorn see one micro-batch of all ranks at a time (and the queue)."""
    precision: str = "auto"
    """fp32, tf32, bf16, fp16 or fp64, see largescale/precision.py; auto is bf16 on CUDA and fp32 elsewhere."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time (on CUDA; slower)."""
    spike_factor: float = 0.0
    """A gradient norm of so many times its running average is treated like one that is not finite; 0 never."""
    max_rollbacks: int = 0
    """How often the run may go back to its last checkpoint after a step that is not finite; then it stops."""
    rollback_window: int = 10
    """Steps of data, up to the bad one, that are left out after going back."""


@dataclass
class ParallelConfig:
    strategy: str = "ddp"
    replicate: int = 1
    """fsdp: copies of the sharded model (HSDP); gradients are averaged over them. Neighbouring ranks share a copy, so
    that a node can hold one."""
    shard: int = 0
    """fsdp: ranks that a copy is cut over; 0 is all ranks / replicate."""
    cpu_offload: bool = False
    """fsdp, zero: keep sharded parameters and optimizer state in host memory, and update there."""
    sync_batchnorm: bool = True
    """Batch statistics over all ranks, so that results do not depend on their number."""
    batchnorm_group_size: int = 0
    """Neighbouring ranks that share batch statistics; 0, or more than there are, is all of them."""
    reshard_after_forward: bool = True
    """fsdp: free gathered parameters after the forward pass."""
    unit_min_parameters: int = 2_000_000
    """fsdp: blocks with fewer parameters are gathered with the whole model instead of one by one."""
    sharded_init: bool = False
    """fsdp: no rank ever builds the whole network; each draws the pieces it holds (another draw than the whole one, the
    same on any number of ranks)."""


@dataclass
class CheckpointConfig:
    every_steps: int = 1000
    """0 saves only at the end."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep those of every so many steps; 0 keeps none of these."""
    mirror: str = ""
    """Folder in a store (s3://..., any that fsspec knows) where checkpoints are copied to, and fetched from if the
    run's folder has none as new."""
    background: bool = True
    """Write while the training goes on, from a copy of the state in host memory."""


@dataclass
class EvaluateConfig:
    train_shards: str = ""
    """Labelled shard folder for the kNN bank and the linear probe; empty means data.shards."""
    resize: int = 256
    """Shorter side before the centre crop."""
    size: int = 224
    """Side of the centre crop."""
    batch: int = 256
    baselines: bool = True
    """Also measure the untrained network and raw pixels."""
    knn_neighbours: list[int] = field(default_factory=lambda: [10, 20, 50, 100, 200])
    knn_temperature: float = 0.07
    linear_epochs: int = 100
    linear_batch: int = 512
    linear_rates: list[float] = field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    linear_weight_decay: float = 0.0


@dataclass
class Config:
    name: str = "???"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
