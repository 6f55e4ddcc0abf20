"""The settings of the data: corpora, crops, augmentation, loading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from largescale.config.setting import LONGEST_RUN_S, LONGEST_WAIT_S, setting

_PROBABILITY: dict[str, Any] = {"at_least": 0, "at_most": 1, "expected": "a probability from 0 to 1"}
_RANGE: dict[str, Any] = {"above": 0, "length": 2, "ascending": True}


@dataclass
class CropGroup:
    """A group of views of one size."""

    num: int = setting(2, "Views of this size per image.", at_least=1, at_most=1000)
    size: int = setting(224, "Side in pixels of the square view.", at_least=2, at_most=16384)
    scale: list[float] = setting(
        [0.14, 1.0],
        "Smallest and largest fraction of the image's area that a crop covers.",
        **_RANGE,
        at_most=1,
        expected="[smallest, largest] within (0, 1]",
    )
    ratio: list[float] = setting(
        [0.75, 4 / 3],
        "Smallest and largest width / height of a crop.",
        **_RANGE,
        at_most=1000,
        expected="[smallest, largest], above 0 and at most 1000",
    )
    augment: dict[str, Any] = setting(
        {},
        "Keys of data.augment to override for these views, such as {blur: 1.0, solarise: 0.2}; put views that "
        "differ in groups of their own.",
        expected="{KEY: value} with keys of data.augment",
    )


@dataclass
class AugmentConfig:
    """Photometric and geometric changes of the views; a strength or probability of 0 switches one off."""

    flip: float = setting(0.5, "Probability of a horizontal flip.", **_PROBABILITY)
    rotate_degrees: float = setting(
        0.0, "Views are turned by at most this many degrees, in either direction.", at_least=0, at_most=180
    )
    jitter: float = setting(0.8, "Probability of colour jitter; its strengths follow.", **_PROBABILITY)
    brightness: float = setting(
        0.8, "Multiplies brightness by 1 + U(-x, x).", at_least=0, at_most=1000, used_if="data.augment.jitter"
    )
    contrast: float = setting(
        0.8, "Multiplies contrast by 1 + U(-x, x).", at_least=0, at_most=1000, used_if="data.augment.jitter"
    )
    saturation: float = setting(
        0.8, "Multiplies saturation by 1 + U(-x, x).", at_least=0, at_most=1000, used_if="data.augment.jitter"
    )
    hue: float = setting(
        0.2, "Rotates hue by U(-x, x) full turns.", at_least=0, at_most=0.5, used_if="data.augment.jitter"
    )
    gamma: float = setting(0.0, "Draws the gamma exponent as exp(U(-gamma, gamma)).", at_least=0, at_most=10)
    gain: float = setting(
        0.0,
        "Multiplies intensities by 1 + U(-gain, gain) without clipping: unlike brightness, it loses nothing.",
        at_least=0,
        at_most=1000,
    )
    grayscale: float = setting(0.2, "Probability of turning a view grey.", **_PROBABILITY)
    blur: float = setting(0.5, "Probability of Gaussian blur.", **_PROBABILITY)
    blur_sigma: list[float] = setting(
        [0.1, 2.0],
        "Smallest and largest standard deviation of the blur, in pixels of the view.",
        **_RANGE,
        at_most=1000,
        used_if="data.augment.blur",
        expected="[smallest, largest], above 0 and at most 1000",
    )
    solarise: float = setting(
        0.0, "Probability of solarising a view: intensities from the threshold up are inverted.", **_PROBABILITY
    )
    solarise_threshold: float = setting(
        0.5, "Smallest intensity to invert, where white is 1.", at_least=0, at_most=1, used_if="data.augment.solarise"
    )
    noise: float = setting(
        0.0, "Largest standard deviation of Gaussian noise, where white is 1.", at_least=0, at_most=1000
    )
    erase: float = setting(0.0, "Probability of erasing one rectangle to uniform grey.", **_PROBABILITY)
    erase_side: list[float] = setting(
        [0.2, 0.5],
        "Smallest and largest side of that rectangle, as a fraction of the view's side.",
        at_least=0,
        at_most=1,
        length=2,
        ascending=True,
        used_if="data.augment.erase",
        expected="[smallest, largest] within [0, 1]",
    )


@dataclass
class Corpus:
    """One of several corpora: an element of the list that `data.shards` may be."""

    path: str
    weight: float = 1.0
    subset: str = ""


@dataclass
class DataConfig:
    """The images: where they are, in what order they come, how they become views."""

    shards: Annotated[Any, str | list[str | Corpus]] = setting(
        "???",
        "Shard folder to pretrain on, or its URL (s3://..., http://..., anything fsspec knows); labels are "
        "ignored, but for those of method.support. A list mixes several: {path: FOLDER, weight: SHARE, subset: FILE}.",
        free=True,
    )
    subset: str = setting(
        "",
        "File that lists the samples to use: a .npy of sample numbers, or text with one key per line (one number "
        "per line if the first line is `# numbers`); empty uses all.",
        free=True,
        place=True,
    )
    eval_shards: str = setting("", "Labelled shard folder to evaluate on.", free=True, place=True)
    audit: bool = setting(False, "Record the keys each rank trained on in audit/rank-*.jsonl.", free=True)
    workers: int = setting(
        -1,
        "Loader processes per rank; -1 chooses by the available CPUs, 0 loads in the training process.",
        at_least=-1,
        at_most=1024,
        expected="0 or more (at most 1024), or -1",
        free=True,
    )
    threads: int = setting(0, "Decoding threads per loader process; 0 chooses.", at_least=0, at_most=1024, free=True)
    prefetch: int = setting(4, "Steps to load ahead.", at_least=1, at_most=10_000, free=True)
    cache: str = setting(
        "",
        "Folder to cache shards of a store in, shared by all runs on a node; empty uses the temporary disk.",
        free=True,
        place=True,
    )
    cache_gb: float = setting(
        0.0, "Size limit of the cache folder in GB; 0 is half of the free space.", at_least=0, at_most=1e9, free=True
    )
    fetches: int = setting(
        4, "Shards a rank fetches from a store at the same time.", at_least=1, at_most=1024, free=True
    )
    store_patience_s: float = setting(
        600.0,
        "Seconds to keep retrying a store that fails, or to wait for a folder that is away, before the run stops.",
        at_least=0,
        at_most=LONGEST_RUN_S,
        free=True,
    )
    store_stall_s: float = setting(
        60.0,
        "Seconds without an answer before a request to a store is retried, and before a stalled loader process "
        "is named in the log.",
        above=0,
        at_most=LONGEST_WAIT_S,
        free=True,
    )
    streams: int = setting(
        8,
        "Canonical streams that an epoch's order is laid out over; must divide train.global_batch.",
        at_least=1,
        at_most=2**31,
    )
    shuffle_window: int = setting(65536, "Samples of a stream that are shuffled together.", at_least=1, at_most=2**40)
    crops: list[CropGroup] = setting(
        [CropGroup(), CropGroup(num=6, size=96, scale=[0.05, 0.14])],
        "Views of an image, one group per size.",
        min_length=1,
        expected="at least one group",
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: list[float] = setting(
        [0.485, 0.456, 0.406],
        "Mean of each channel, subtracted from views.",
        length=3,
        at_least=-1000,
        at_most=1000,
        expected="three numbers, one per channel",
    )
    std: list[float] = setting(
        [0.229, 0.224, 0.225],
        "Standard deviation of each channel, which views are divided by.",
        length=3,
        at_least=1e-6,
        at_most=1000,
        expected="three numbers above 0, one per channel",
    )
    scaled_decode: float = setting(
        2.0,
        "Decode JPEGs at reduced size (1/2, 1/4, 1/8) as long as every crop keeps at least this many source "
        "pixels per view pixel along each side; 0 always decodes whole images.",
        at_least=0,
        at_most=1e6,
    )
    max_skipped: int = setting(
        1000,
        "Stop after this many images could not be read; each counts once, however often it is drawn.",
        at_least=0,
        free=True,
    )
    max_skipped_in_row: int = setting(
        100, "Neighbours of an unreadable image to try before the run stops.", at_least=1, free=True
    )
    max_skipped_rate: float = setting(
        0.5,
        "Stop if more than this fraction of images in a logging interval had to be replaced.",
        at_least=0,
        at_most=1e6,
        free=True,
    )
    max_pixels: int = setting(
        178_956_970,
        "Skip larger images before decoding them (decompression bombs), and in evaluation thin ones that are larger "
        "once resized.",
        at_least=1,
        free=True,
    )
