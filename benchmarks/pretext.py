"""Pretext tasks where the table of methods has none: on coloured pictures of 64 px, and layers that learn one by one.

    python -m benchmarks.pretext [--seeds 0 1 2] [--ranks 1] [--variants NAME ...]

Needs the shards of `make pretrain` and of `benchmarks/coloured_pictures.py`. Writes benchmarks/results/pretext.json and
pretext.md.
"""

from __future__ import annotations

from benchmarks.accuracies import Variant, main

STACKED = ["method.layers=one_by_one", "optim.final_lr=0.002"]
"""The rate stays, so that the last layer learns too."""
COLOURED = [
    "data.shards=data/shards/coloured-pictures",
    "data.eval_shards=data/shards/coloured-pictures/holdout",
    "data.crops=[{num: 1, size: 64, scale: [0.25, 1.0]}]",
    "data.mean=[0.485, 0.456, 0.406]",
    "data.std=[0.229, 0.224, 0.225]",
    "data.augment.flip=0.5",
    *(f"data.augment.{key}=0" for key in ("rotate_degrees", "gamma", "gain", "blur", "noise", "erase")),
    "model.width=16",
    "optim.warmup_epochs=1",
    "train.epochs=8",
    "evaluate.resize=64",
    "evaluate.size=64",
    "evaluate.online_every=0",
]
"""Views whose colours nothing changes, and half the width: 1,751 pictures are few."""

VARIANTS = {
    "denoising": Variant("configs/small/denoising.yaml"),
    "denoising_stacked": Variant("configs/small/denoising.yaml", STACKED),
    "colorization": Variant("configs/small/colorization.yaml", COLOURED),
    "context_encoder": Variant(
        "configs/small/context_encoder.yaml",
        [*COLOURED, "method.overlap=2", "method.decoder=[64, 32, 16, 16]", "method.discriminator=[16, 32, 64]"],
    ),
    "artifacts": Variant(
        "configs/small/artifacts.yaml",
        [*COLOURED, "method.autoencoder=[16, 32, 64, 128]", "method.autoencoder_epochs=2.5"],
    ),
}

IMAGES = (
    "images that no choice was made on; kNN with k = 20. `denoising` and `denoising_stacked`, whose layers learn one "
    "by one: the demo's grey images, 10,000 for bank and probe and 2,000 to test, sampling error about 0.8. Others: "
    "coloured pictures of Debian's openclipart-png in 14 classes, 1,751 for bank and probe and 418 to test, pictures "
    "that look like another left out, sampling error about 2.4."
)

ABOUT = (
    "\n\nOn coloured pictures networks of half the demo's width see views of 64 px for 8 epochs, 14,000 views; `task` "
    "is the share of training views told right at the end and that of chance, or what of the variance is missing. "
    "Untrained networks differ by 1.0 between seeds in linear. Above them by more are colorization and "
    "context_encoder, in each of three seeds (means of 5.4 and 4.6 points), and in linear a little above raw pixels; "
    "artifacts is as good as untrained (means of 40.7 and 41.3): what was dropped is told of 68% of its images, and "
    "too few images and steps may be why. Layers one by one give less than all at once (81.1 and 83.9, one seed). What "
    "is not in the table is not measured."
)

if __name__ == "__main__":
    main("pretext", "Pretext tasks elsewhere", VARIANTS, of="method", description=__doc__, about=ABOUT, images=IMAGES)
