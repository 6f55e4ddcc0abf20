"""Crops, augmentation and normalisation for the images that were seen."""

from __future__ import annotations

from typing import Any

from largescale.config import AugmentConfig, Config, CropGroup
from largescale.methods import method_class
from largescale.methods.choice import Choice
from largescale.propose.corpus import CorpusFacts
from largescale.propose.references import changed_values

CPU_SIDE, SIDE, LARGE_SIDE = 64, 160, 224
"""Largest side of a large view in pixels: without a GPU, with one, and with one and `MANY` images."""
MANY = 100_000

_LEAST_SIDE, _STEP = 16, 4
"""Of a view: networks halve it four times."""

_LARGE, _SMALL = [0.14, 1.0], [0.05, 0.14]
"""Shares of an image that views show without a GPU, where recipes to follow are made for one data set."""

_LEAST_SOURCE = 12
"""Pixels of the image along the side of a crop: fewer show nothing of it."""

_ALMOST_ALL = 0.95
_LEAST_BLURRED = 48
_FLAT = 0.5
"""Share of pixels of the same colour as the one before, from which on images are taken for drawings."""
_WEAKER = {"brightness": 0.125, "contrast": 0.125, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0}
"""Of the usual strengths of what changes colours, for drawings."""
_WITH_CHANCE = {"blur": ("blur_sigma",), "jitter": ("brightness", "contrast", "saturation", "hue")}
"""What is only used with a change that has a probability."""
_LEAST_STD = 0.02
"""Images of a single colour have none, and nothing can be divided by 0."""


def views(reference: Config, corpus: CorpusFacts, *, small: bool) -> dict[str, Choice]:
    """Values and reasons of `data.crops`, `data.augment`, `data.mean`, `data.std` and what evaluation crops.

    Args:
        reference: the recipe whose groups of views are kept, in other sizes.
        corpus: the images.
        small: whether for training without a GPU.
    """
    side = _side(reference, corpus, small=small)
    measured = f"measured on {corpus.num_decoded:,} images"
    off = {**_switched_off(corpus, side), **method_class(reference).spoilers}
    crops = _crops(reference, corpus, side, set(off), small=small)
    seen = crops[0].value["size"]
    return {
        "data.crops": Choice(crops, ""),
        **{
            f"data.augment.{key}": choice for key, choice in _augment(reference, corpus, side, off, small=small).items()
        },
        "data.mean": Choice([round(value, 3) for value in corpus.mean], measured),
        "data.std": Choice([max(_LEAST_STD, round(value, 3)) for value in corpus.std], measured),
        "evaluate.resize": Choice(seen * 8 // 7 if seen < corpus.shorter[1] else seen, "shorter side of test images"),
        "evaluate.size": Choice(seen, "centre crop of these, as large as the first views"),
    }


def _side(reference: Config, corpus: CorpusFacts, *, small: bool) -> int:
    most = CPU_SIDE if small else LARGE_SIDE if corpus.num_samples >= MANY else SIDE
    most = min(most, method_class(reference).largest_view or most)
    return max(_LEAST_SIDE, min(most, corpus.shorter[1] // _STEP * _STEP))


def _crops(reference: Config, corpus: CorpusFacts, side: int, off: set[str], *, small: bool) -> list[Choice]:
    """Groups of views; `off` are the changes that none of them may switch on again."""
    groups = reference.data.crops
    largest = max(group.size for group in groups)
    found = []
    for group in groups:
        size = side if group.size == largest else round(group.size / largest * side / _STEP) * _STEP
        size = max(_LEAST_SIDE, size)
        large = size > 0.7 * side
        fixed = group.scale[0] == group.scale[1]
        scale = group.scale if fixed or not small else _LARGE if large else _SMALL
        value: dict[str, Any] = {"num": group.num, "size": size, "scale": _scale(scale, corpus.shorter[1])}
        ratio = [1.0, 1.0] if method_class(reference).square_crops else group.ratio
        if ratio != CropGroup().ratio:
            value["ratio"] = ratio
        own = {key: kept for key, kept in group.augment.items() if key not in {*off, "blur_sigma"}}
        if own and not small:
            value["augment"] = own
        found.append(
            Choice(value, _why(size, side, reference, corpus, small=small) if large else "parts, for the large ones")
        )
    return found


def _scale(scale: list[float], side: int) -> list[float]:
    """Shares of the area, none of so few pixels that there is nothing to see."""
    least = min(0.5, (_LEAST_SOURCE / max(1, side)) ** 2)
    if scale[0] >= least:
        return list(scale)
    return [round(least, 2), max(scale[1], round(2 * least, 2))]


def _why(size: int, side: int, reference: Config, corpus: CorpusFacts, *, small: bool) -> str:
    if size < side:
        return "in proportion to the largest"
    sides = f"half of the images have a shorter side of at most {corpus.shorter[1]:,} px"
    if side >= corpus.shorter[1] // _STEP * _STEP:
        return f"as large as the images: {sides}"
    if side == method_class(reference).largest_view:
        return f"as large as the method wants them; {sides}"
    return f"{sides}; more than {side} px costs too much {'on a CPU' if small else 'for what it gains'}"


def _switched_off(corpus: CorpusFacts, side: int) -> dict[str, str]:
    """The changes that do nothing for these images, or hide what is in them, and why."""
    found: dict[str, str] = {}
    if corpus.grey >= _ALMOST_ALL:
        why = f"{corpus.grey:.0%} of the images are grey: there is no colour to change"
        found |= dict.fromkeys(("saturation", "hue", "grayscale"), why)
    if side < _LEAST_BLURRED:
        found["blur"] = f"{side} px have no detail to spare"
    return found


def _augment(
    reference: Config, corpus: CorpusFacts, side: int, off: dict[str, str], *, small: bool
) -> dict[str, Choice]:
    usual = {} if small else changed_values(reference.data.augment)
    usual.pop("blur_sigma", None)
    defaults = AugmentConfig()
    found = {"flip": Choice(usual.pop("flip", defaults.flip), "set 0 if left and right differ, as in text")}
    found |= {key: Choice(value, "as published") for key, value in usual.items()}
    if corpus.flat >= _FLAT and corpus.grey < _ALMOST_ALL:
        why = f"drawings are told apart by colours: {corpus.flat:.0%} of pixels are like the one before"
        for key, share in _WEAKER.items():
            found[key] = Choice(round(share * usual.get(key, getattr(defaults, key)), 3), why)
    if "blur" not in off:
        most = round(2.0 * side / 224, 2)
        found["blur_sigma"] = Choice([0.1, most], f"of {side} px, as 2 of 224 px in published runs")
    found |= {key: Choice(0.0, why) for key, why in off.items()}
    strengths = {key: choice.value for key, choice in found.items()}
    own = [] if small else [group.augment for group in reference.data.crops]
    for chance, of_it in _WITH_CHANCE.items():
        used = [strengths.get(chance, getattr(defaults, chance)), *(values.get(chance, 0.0) for values in own)]
        if not any(used):
            found = {key: choice for key, choice in found.items() if key not in of_it}
    return found
