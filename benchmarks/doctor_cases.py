"""What `benchmarks.doctor` trains: recipe, changes and images of runs that are sick on purpose and of healthy ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CLOTHES = "clothes"
IMAGES = {
    "colorization": "coloured",
    "shuffle_learn": "moving-squares",
    "opn": "nearing-squares",
    "colour_tracking": "coloured-squares",
    "avc": "sounding",
    "avol": "sounding",
}
"""What healthy runs of a recipe are trained on where it is not CLOTHES, the demo's images; made for them."""

TINY = [
    "data.crops=[{num: 2, size: 20, scale: [0.8, 1.0]}]",
    "model.depths=[1,1]",
    "model.width=16",
    "train.global_batch=64",
    "train.steps=240",
    "train.precision=fp32",
    "parallel.strategy=ddp",
    "optim.warmup_epochs=0.15",
    "run.log_every=10",
    "checkpoint.every_steps=0",
    "checkpoint.background=false",
    "evaluate.online_every=0",
]
STILL = [
    "data.crops=[{num: 2, size: 20, scale: [1.0, 1.0], ratio: [1.0, 1.0]}]",
    *(f"data.augment.{name}=0" for name in ("rotate_degrees", "gamma", "gain", "blur", "noise", "erase")),
]
ONE_VIEW = ["data.crops=[{num: 1, size: 20, scale: [0.8, 1.0]}]"]
WHOLE = "data.crops=[{{num: {num}, size: 32, scale: [1.0, 1.0], ratio: [1.0, 1.0]}}]"
SMALL_FRAME = "data.crops=[{num: 1, size: 32, scale: [0.6, 1.0]}]"
QUARTER_SECOND = ["method.sound.seconds=0.25", "method.sound.rate=8000"]
MILD = [*(f"data.augment.{name}=0" for name in ("gamma", "gain", "erase")), "data.augment.noise=0.02"]
FROZEN = ["method.freeze_prototypes_steps=240"]
NOISE = [
    "data.crops=[{num: 2, size: 20, scale: [0.01, 0.03]}]",
    "data.augment.noise=2",
    "data.augment.erase=1",
    "data.augment.erase_side=[0.7,0.9]",
]
SOON = ["method.freeze_last_layer_epochs=0.1", "method.outputs=128", "method.momentum=0.98"]
NO_SHARPENING = ["method.teacher_temperature=0.1", "method.warmup_teacher_temperature=0.1"]


@dataclass(frozen=True)
class Sick:
    """A run that is sick on purpose.

    Attributes:
        diagnosis: that is right.
        recipe: in configs/small.
        overrides: on top of TINY.
        images: CLOTHES, or "one", "two", "four" or "eight" images made for it, again and again.
        held_out: whether the rules were chosen without looking at it.
        also: diagnoses that are right too, at some time of the run, as what follows from the first.
        remedy: what the advice must name.
        missed: the doctor is wrong about it, and the page says so.
    """

    diagnosis: str
    recipe: str
    overrides: Sequence[str] = ()
    images: str = CLOTHES
    held_out: bool = False
    also: Sequence[str] = ()
    remedy: str = ""
    missed: bool = False


RATE, SLOW, SAME, IDENTICAL = "learning rate too high", "learns too slowly", "images all the same", "views identical"
UNIFORM_CODES, STUCK, FEW = "uniform codes", "stuck at ln K", "few prototypes"
LOW_RANK, QUEUE, COLLAPSE = "features of low rank", "queue harmful", "embeddings collapsed"
UNIFORM_OUTPUTS, ONE_OUTPUT = "uniform outputs", "one output for all"

SICK = {
    "swav-sgd-rate-30": Sick(RATE, "swav", ["optim.name=sgd", "optim.lr=30", "optim.weight_decay=0"]),
    "swav-rate-0.2-no-batchnorm": Sick(RATE, "swav", ["optim.lr=0.2", "method.head_batchnorm=false"]),
    "swav-rate-10": Sick(RATE, "swav", ["optim.lr=10", "optim.weight_decay=0"]),
    "swav-sgd-rate-300": Sick(RATE, "swav", ["optim.name=sgd", "optim.lr=300", "optim.weight_decay=0"]),
    "mocov2-rate-0.5": Sick(RATE, "mocov2", ["optim.lr=0.5", "method.queue=512"]),
    "byol-rate-0.5": Sick(RATE, "byol", ["optim.lr=0.5"]),
    "vicreg-rate-0.5": Sick(RATE, "vicreg", ["optim.lr=0.5", "method.hidden=[128]", "method.embedding=128"]),
    # Recorded before `agreement_of_others` was logged, so that images can only stand beside what follows from them.
    "swav-one-image": Sick(UNIFORM_CODES, "swav", images="one", also=[LOW_RANK], remedy="look at them"),
    "swav-one-image-seed1": Sick(
        UNIFORM_CODES,
        "swav",
        ["run.seed=1", "method.prototypes=30"],
        images="one",
        also=[LOW_RANK, RATE],
        remedy="look at them",
    ),
    "simclr-one-image": Sick(SAME, "simclr", images="one"),
    "byol-one-image": Sick(SAME, "byol", images="one"),
    "barlow-one-image": Sick(SAME, "barlow", ["method.hidden=[128]", "method.embedding=128"], images="one"),
    "simclr-one-image-still": Sick(SAME, "simclr", STILL, images="one", held_out=True),
    "swav-views-identical": Sick(IDENTICAL, "swav", STILL),
    "simclr-views-identical": Sick(IDENTICAL, "simclr", STILL),
    "byol-views-identical": Sick(IDENTICAL, "byol", [*STILL, "run.seed=1"], held_out=True),
    "dino-views-identical": Sick(IDENTICAL, "dino", [*SOON, *STILL], held_out=True),
    "swav-epsilon-5": Sick(UNIFORM_CODES, "swav", ["method.epsilon=5"]),
    "swav-epsilon-1": Sick(UNIFORM_CODES, "swav", ["method.epsilon=1", "run.seed=2"], held_out=True),
    "swav-epsilon-0.5-k30": Sick(UNIFORM_CODES, "swav", ["method.epsilon=0.5", "method.prototypes=30"], held_out=True),
    "swav-rate-1e-5": Sick(SLOW, "swav", ["method.epsilon=0.1", "optim.lr=0.00001"]),
    "swav-rate-3e-6": Sick(
        SLOW, "swav", ["method.epsilon=0.1", "optim.lr=0.000003", "run.seed=1", "method.prototypes=50"], held_out=True
    ),
    "swav-temperature-30": Sick(STUCK, "swav", ["method.temperature=30"], remedy="method.temperature=0.1"),
    "swav-temperature-20": Sick(
        STUCK,
        "swav",
        ["method.temperature=20", "method.prototypes=300", "run.seed=1"],
        held_out=True,
        remedy="method.temperature=0.1",
    ),
    "swav-views-of-noise": Sick(SAME, "swav", [*NOISE, "method.epsilon=0.01"], also=[STUCK], remedy="data.augment"),
    "swav-four-images": Sick(FEW, "swav", [*MILD, *FROZEN, "method.prototypes=1000"], images="four"),
    "swav-eight-images": Sick(
        FEW, "swav", [*MILD, *FROZEN, "run.seed=1", "method.prototypes=2000"], images="eight", held_out=True
    ),
    "swav-two-images": Sick(
        FEW, "swav", [*MILD, *FROZEN, "run.seed=1", "method.prototypes=500"], images="two", missed=True
    ),
    "swav-low-rank": Sick(LOW_RANK, "swav", ["method.hidden=[1]"], also=[FEW]),
    "swav-low-rank-seed1": Sick(LOW_RANK, "swav", ["method.hidden=[1]", "run.seed=1"], also=[FEW]),
    "simclr-low-rank": Sick(LOW_RANK, "simclr", ["method.hidden=[1]", "run.seed=1"], held_out=True),
    "barlow-off-diagonal-0": Sick(
        LOW_RANK, "barlow", ["method.off_diagonal=0", "method.hidden=[128]", "method.embedding=128"]
    ),
    "swav-queue-old": Sick(
        QUEUE,
        "swav",
        ["method.queue=3840", "method.queue_start_step=20", "method.epsilon=0.02", "optim.lr=0.02"],
        also=[RATE],
    ),
    "swav-queue-older": Sick(
        QUEUE, "swav", ["method.queue=6400", "method.queue_start_step=0", "optim.lr=0.03", "run.seed=1"]
    ),
    "swav-queue-k-500": Sick(
        QUEUE,
        "swav",
        ["method.queue=3840", "method.queue_start_step=60", "method.prototypes=500", "optim.lr=0.01", "run.seed=3"],
        held_out=True,
        also=[FEW, RATE],
    ),
    "simsiam-no-stop-gradient": Sick(
        LOW_RANK, "simsiam", ["method.stop_gradient=false"], remedy="method.stop_gradient=true"
    ),
    "byol-no-predictor": Sick(
        COLLAPSE, "byol", ["method.predictor=false", "run.seed=1"], held_out=True, remedy="method.predictor=true"
    ),
    "vicreg-no-variance": Sick(
        COLLAPSE,
        "vicreg",
        ["method.variance=0", "method.hidden=[128]", "method.embedding=128"],
        held_out=True,
        remedy="method.variance=25",
    ),
    "dino-no-centring": Sick(
        ONE_OUTPUT, "dino", [*SOON, "method.centring=false"], held_out=True, remedy="method.centring=true"
    ),
    "dino-no-sharpening": Sick(
        UNIFORM_OUTPUTS, "dino", [*SOON, *NO_SHARPENING], held_out=True, remedy="method.teacher_temperature="
    ),
}
HEALTHY = {
    "swav-tiny": ("swav", []),
    "swav-queue-tiny": ("swav", ["method.queue=512", "method.queue_start_step=60"]),
    "swav-batch-16-queue-tiny": (
        "swav",
        ["train.global_batch=16", "optim.lr=0.001", "method.queue=256", "method.queue_start_step=60"],
    ),
    "swav-k-3000-tiny": ("swav", ["method.prototypes=3000", "method.epsilon=0.005", "method.head_batchnorm=false"]),
    "simclr-tiny": ("simclr", []),
    "byol-tiny": ("byol", []),
    "simsiam-tiny": ("simsiam", []),
    "barlow-tiny": ("barlow", ["method.hidden=[128]", "method.embedding=128"]),
    "vicreg-tiny": ("vicreg", ["method.hidden=[128]", "method.embedding=128"]),
    "dino-tiny": ("dino", SOON),
    "mocov2-tiny": ("mocov2", ["method.queue=512"]),
    "pirl-tiny": (
        "pirl",
        ["data.crops=[{num: 1, size: 28, scale: [0.8, 1.0]}, {num: 1, size: 30, scale: [0.8, 1.0]}]"],
    ),
    "mocov1-tiny": ("mocov1", ["method.queue=512"]),
    "mocov3-tiny": ("mocov3", []),
    "nnclr-tiny": ("nnclr", ["method.queue=512"]),
    "densecl-tiny": ("densecl", ["method.queue=512", "method.dense_start_step=60"]),
    "pcl-tiny": ("pcl", ["method.queue=512", "method.clusters=[50,100]", "method.wrong_clusters=64"]),
    "directpred-tiny": ("directpred", []),
    "deepcluster-tiny": ("deepcluster", ["method.clusters=50", "method.components=32"]),
    "deepclusterv2-tiny": ("deepclusterv2", ["method.clusters=[50,50]"]),
    "deepercluster-tiny": (
        "deepercluster",
        ["method.clusters=50", "method.super_clusters=2", "method.components=32", "method.recluster_epochs=1"],
    ),
    "sela-tiny": ("sela", ["method.clusters=[50,50]"]),
    "rotation-tiny": ("rotation", ONE_VIEW),
    "jigsaw-tiny": ("jigsaw", ["data.crops=[{num: 1, size: 48, scale: [0.6, 1.0]}]", "method.tile=12"]),
    "patches-tiny": (
        "patches",
        ["data.crops=[{num: 1, size: 48, scale: [0.6, 1.0]}]", "method.tile=12", "method.gap=2"],
    ),
    "cpc-tiny": ("cpc", ["data.crops=[{num: 1, size: 40, scale: [0.8, 1.0]}]"]),
    "denoising-tiny": ("denoising", [*ONE_VIEW, "method.decoder=[32,16]"]),
    "context_encoder-tiny": ("context_encoder", [*ONE_VIEW, "method.decoder=[32,16]", "method.discriminator=[16,32]"]),
    "artifacts-tiny": ("artifacts", [*ONE_VIEW, "method.autoencoder=[16,32]", "method.autoencoder_epochs=0.5"]),
    "paws-tiny": ("paws", ["method.predictor_batchnorm=false", "method.head_per_size=false"]),  # as it was recorded
    "distillation-tiny": ("distillation", ONE_VIEW),
    "colorization-tiny": ("colorization", [*ONE_VIEW, "method.decoder=[32,16]"]),
    "odc-tiny": ("odc", ["method.clusters=50"]),
    "shuffle_learn-tiny": ("shuffle_learn", [WHOLE.format(num=3)]),
    "opn-tiny": ("opn", [WHOLE.format(num=4)]),
    "colour_tracking-tiny": ("colour_tracking", [WHOLE.format(num=3)]),
    "avc-tiny": ("avc", [SMALL_FRAME, "method.sound_widths=[8,16,32]", *QUARTER_SECOND]),
    "avol-tiny": ("avol", [SMALL_FRAME, "method.sound_widths=[8,16,32]", *QUARTER_SECOND]),
    "swav-rate-0.2": ("swav", ["optim.lr=0.2"]),
    "swav-rate-1": ("swav", ["optim.lr=1", "run.seed=1"]),
    "swav-rate-0.05-no-batchnorm": ("swav", ["optim.lr=0.05", "method.head_batchnorm=false", "run.seed=3"]),
    "simclr-rate-0.2": ("simclr", ["optim.lr=0.2"]),
    "simclr-rate-5": ("simclr", ["optim.lr=5", "optim.weight_decay=0"]),
}
"""Recipes and overrides. The last five have 25 to 2,500 times the recipe's rate, but AdamW and BatchNorm survive that:
they learn to the end, if less, and their own course does not tell that they could do better.
"""
MEANT_SICK = list(HEALTHY)[-5:]
FULL_LENGTH = [
    "demo",
    *(f"{name}-seed0" for name in ("barlow", "directpred", "pirl", "simsiam", "vicreg")),
    *(f"{name}-seed{seed}" for name in ("mocov2", "simclr", "swav") for seed in range(3)),
]
"""Healthy runs of `benchmarks/methods.py` that were kept, and the demo."""
