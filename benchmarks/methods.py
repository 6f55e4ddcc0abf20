"""Methods side by side at the demo's size, over seeds, against raw pixels and the untrained network.

    python -m benchmarks.methods [--seeds 0 1 2] [--ranks 2] [--variants NAME ...]

Each method has a recipe in configs/small: the same images, network, optimizer and steps, and views as the method needs
them. Every run goes the way of `make pretrain`, whose shards it needs. Writes
benchmarks/results/methods.json and methods.md.
"""

from __future__ import annotations

from benchmarks.accuracies import ROOT, Variant, main

NEED_MORE = {"colorization", "distillation", "paws"}
"""Than these grey images: colours, a teacher, and labels (`benchmarks/few_labels.py`)."""

VARIANTS = {
    path.stem: Variant(str(path.relative_to(ROOT)))
    for path in sorted((ROOT / "configs" / "small").glob("*.yaml"))
    if path.stem not in {"base", *NEED_MORE}
}

if __name__ == "__main__":
    main(
        "methods",
        "Methods side by side",
        VARIANTS,
        of="method",
        description=__doc__,
        about=" What recipes share (the demo's network, views and optimizer), SwAV, and PIRL's patches, bank and rate "
        "were chosen on training images held out from the others; else the recipes (configs/small) have the published "
        "values or their equivalent at this size.",
    )
