"""Methods side by side at the demo's size, over seeds, against raw pixels and the untrained network.

    python -m benchmarks.methods [--seeds 0 1 2] [--ranks 2] [--variants NAME ...]

Each method has a recipe in configs/small: the same images, network, optimizer and steps, and views as the method needs
them. Every run goes the way of `make pretrain`, whose shards it needs. Writes
benchmarks/results/methods.json and methods.md.
"""

from __future__ import annotations

from benchmarks.accuracies import ROOT, Variant, main

NEED_MORE = {"avc", "avol", "colorization", "distillation", "opn", "paws", "shuffle_learn", "colour_tracking"}
"""Than these grey images: colours, a teacher, labels (`benchmarks/few_labels.py`), or clips
(`benchmarks/clips_learned.py`).
"""

VARIANTS = {
    path.stem: Variant(str(path.relative_to(ROOT)))
    for path in sorted((ROOT / "configs" / "small").glob("*.yaml"))
    if path.stem not in {"base", *NEED_MORE}
}

ABOUT = (
    " What recipes share (the demo's network, views and optimizer), SwAV, and PIRL's patches, bank and rate were "
    "chosen on training images held out from the others; else the recipes (configs/small) have the published values "
    "or their equivalent at this size.\n\n"
    "Pretext tasks: `task` is the share told right at the end and that of chance, or what of the variance is "
    "missing in images made; older rows lack it. The recipe of cpc leaves out erasing now, which was in its rows. "
    "Linear probes on untrained networks differ by 1.3 between seeds. "
    "Above that by more, in each of three seeds, are rotation, denoising, patches, cpc, context_encoder and jigsaw "
    "(means of 6.3, 4.9, 4.8, 3.5, 3.5 and 3.4 points); cpc, context_encoder and jigsaw are no better than raw pixels "
    "all the same, jigsaw since 28 px leave little to tell tiles by. "
    "artifacts is not above it: a garment of 28 px has a code of 7 x 7 entries, of which dropped ones are told no "
    "better than by chance; the method is published at 96 px and more, which is not measured here. colorization is "
    "not in the table, since these images are grey; coloured ones are in benchmarks/results/pretext.md."
)

if __name__ == "__main__":
    main("methods", "Methods side by side", VARIANTS, of="method", description=__doc__, about=ABOUT)
