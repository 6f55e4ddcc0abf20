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

ABOUT = " What was chosen by, and other choices: `benchmarks/results/demo_choices.md`."


if __name__ == "__main__":
    main("demo", "The demo over seeds", VARIANTS, of="variant", about=ABOUT, description=__doc__)
