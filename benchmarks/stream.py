"""Images a second and core: our stream against the published SwAV pipeline, webdataset, and the limit of JPEG decoding.

    python benchmarks/stream.py [--images 384] [--rounds 5]

2 x 224 + 6 x 96 views of JPEGs of about 104 KB (benchmarks/images.py). One process with one thread on one core; the
pipelines take turns in every round, and the clock is the process's CPU time, so that what disturbs the machine meets
all alike. Writes benchmarks/results/stream.json and stream.md.

- classic: Pillow decodes, torchvision's transforms cut and change each view, as the SwAV paper describes it
  (arXiv 2006.09882, section 3.3 and appendix A); the bytes are in memory already.
- webdataset: its reader over the same shards (its own writer made them, an image and a small JSON per sample),
  torchvision's decoder and transforms v2 on uint8 tensors.
- ours: what a loader process does; photometric changes come later, batched on the device (listed apart).
- decode: simplejpeg (libjpeg-turbo) decodes and nothing else.
- cameras: photographs of 12 megapixels, with and without an EXIF block (benchmarks/cameras.py).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from cameras import camera_table, measure_cameras
from images import write_photographs
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from largescale.config import Config, DataConfig, TrainConfig
from largescale.data.augment import Augment
from largescale.data.batches import BatchMaker, Buffers
from largescale.data.corpora import open_corpora
from largescale.data.order import Mixture
from largescale.data.reader import ShardReader
from largescale.run.environment import environment
from shards.inspection.index import index_folder

RESULTS = Path(__file__).resolve().parent / "results"
GROUPS = [(2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14))]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH = 64


class PillowBlur:
    """The published Gaussian blur: half of the views, radius uniform in [0.1, 2]."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur or leave."""
        if random.random() >= 0.5:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def classic_views() -> list[Callable[[Image.Image], torch.Tensor]]:
    """The published chain of transforms, one for each view."""
    return [
        transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                PillowBlur(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        for num, size, scale in GROUPS
        for _ in range(num)
    ]


def v2_views() -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The same chain of torchvision's transforms v2, on uint8 tensors."""
    return [
        v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        for num, size, scale in GROUPS
        for _ in range(num)
    ]


class Pipelines:
    """All that is compared; each takes the next `BATCH` images when called."""

    def __init__(self, photographs: Path, shards: Path) -> None:
        self._files = [path.read_bytes() for path in sorted(photographs.iterdir())]
        self._next = 0
        self._classic, self._v2 = classic_views(), v2_views()
        self._tars = [str(path) for path in sorted(shards.glob("*.tar"))]
        self._webdataset = self._web_samples()
        config = Config(name="bench", data=DataConfig(shards=str(shards)), train=TrainConfig(global_batch=BATCH))
        corpora = open_corpora(config.data)
        self._reader = ShardReader(corpora)
        order = Mixture(
            [corpora[0].shard_sizes()],
            [1.0],
            seed=0,
            global_batch=BATCH,
            streams=config.data.streams,
            shuffle_window=config.data.shuffle_window,
        )
        self._maker = BatchMaker(self._reader, order, config, rank=0, world_size=1)
        memory = torch.empty(Buffers.num_bytes(config.data, BATCH), dtype=torch.uint8)
        self._buffers = Buffers.carve(memory, config.data, BATCH)
        self._augment = Augment(config.data.augment, MEAN, STD, torch.float32)
        self._step = 0

    def classic(self) -> None:
        """Pillow and torchvision's transforms."""
        for payload in self._bytes():
            with Image.open(io.BytesIO(payload)) as image:
                pixels = image.convert("RGB")
            for view in self._classic:
                view(pixels)

    def webdataset(self) -> None:
        """webdataset's reader and transforms v2."""
        for _ in range(BATCH):
            encoded = torch.frombuffer(bytearray(next(self._webdataset)["jpg"]), dtype=torch.uint8)
            pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
            for view in self._v2:
                view(pixels)

    def ours(self) -> None:
        """Read by index, verify, decode, cut all views to uint8."""
        part = self._maker.make(self._step, slice(None), self._buffers, None)
        assert not part.error, part.error
        self._step += 1

    def photometrics(self) -> None:
        """The changes that follow on the device, on this core."""
        for views, draws in zip(self._buffers.views, self._buffers.draws, strict=True):
            self._augment(views.flatten(0, 1), draws.flatten(0, 1))

    def decode(self) -> None:
        """Decode and nothing else."""
        for payload in self._bytes():
            simplejpeg.decode_jpeg(payload)

    def read_ours(self) -> None:
        """Random access to verified bytes, no decoding."""
        for sample_id in self._maker.samples(self._step, slice(None))[0].tolist():
            self._reader.read(sample_id)
        self._step += 1

    def read_webdataset(self) -> None:
        """webdataset's reader, no decoding."""
        for _ in range(BATCH):
            next(self._webdataset)

    def _bytes(self) -> list[bytes]:
        chosen = [self._files[(self._next + i) % len(self._files)] for i in range(BATCH)]
        self._next += BATCH
        return chosen

    def _web_samples(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from webdataset.WebDataset(self._tars, shardshuffle=False, empty_check=False)


def write_shards(photographs: Path, shards: Path) -> None:
    """Shards as others write them: webdataset's writer, an image and a small JSON per sample; then our index."""
    shards.mkdir()
    with webdataset.ShardWriter(f"{shards}/bench-%06d.tar", maxcount=64, verbose=0) as writer:
        for path in sorted(photographs.iterdir()):
            facts = {"key": path.stem, "caption": "generated", "status": "success"}
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "json": facts})
    index_folder(shards, workers=1)


NAMES = ("classic", "webdataset", "ours", "photometrics", "decode", "read_ours", "read_webdataset")


def measure(pipelines: Pipelines, rounds: int) -> dict[str, list[float]]:
    """Images a second of CPU time: a list of `rounds` for each pipeline, in turns; one more round warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        for name in NAMES:
            run = getattr(pipelines, name)
            repeats = 20 if name.startswith("read") else 1
            started = time.process_time()
            for _ in range(repeats):
                run()
            if number > 0:
                speeds[name].append(repeats * BATCH / (time.process_time() - started))
    return speeds


def table(speeds: dict[str, list[float]]) -> str:
    """The results as Markdown; ratios are medians of the rounds' ratios."""
    labels = {
        "classic": "classic: Pillow + torchvision transforms, float views",
        "webdataset": "webdataset + transforms v2",
        "ours": "ours: uint8 views, checksums verified",
        "photometrics": "(photometrics alone, if on this core)",
        "decode": "decode alone: the limit",
        "read_ours": "ours, reading alone",
        "read_webdataset": "webdataset, reading alone",
    }
    lines = ["| pipeline | images/s/core | times classic | share of the limit |", "|---|---|---|---|"]
    for name in NAMES:
        times, share = ratio(speeds, name, "classic"), ratio(speeds, name, "decode")
        lines.append(f"| {labels[name]} | {statistics.median(speeds[name]):,.0f} | {times:.1f} | {share:.0%} |")
    return "\n".join(lines)


def ratio(speeds: dict[str, list[float]], one: str, other: str) -> float:
    """How many times faster one is than the other."""
    return statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        photographs, shards = Path(folder) / "photographs", Path(folder) / "shards"
        size = write_photographs(photographs, arguments.images) / arguments.images
        write_shards(photographs, shards)
        speeds = measure(Pipelines(photographs, shards), arguments.rounds)
        cameras = measure_cameras(Path(folder), arguments.rounds)
    machine = environment()
    machine.pop("command")
    ratios = {
        "ours / classic": ratio(speeds, "ours", "classic"),
        "ours / decode": ratio(speeds, "ours", "decode"),
        "ours / webdataset": ratio(speeds, "ours", "webdataset"),
        "reading, ours / webdataset": ratio(speeds, "read_ours", "read_webdataset"),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {
        "images_per_s_per_core": speeds,
        "camera_ms_per_image": cameras,
        "ratios": ratios,
        "mean_bytes": size,
        "environment": machine,
    }
    (RESULTS / "stream.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "stream.md").write_text(
        "# The stream, images a second and core\n\n"
        f"`python benchmarks/stream.py` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, one core, torch "
        f"{machine['torch']}; {arguments.images} generated JPEGs of {size / 1000:.0f} KB on average, 2 x 224 + 6 x 96 "
        f"views, medians of {arguments.rounds} paired rounds, CPU time.\n\n" + table(speeds) + "\n\n"
        f"Reading alone is {ratios['reading, ours / webdataset']:.0f} times as fast as webdataset's reader, with every "
        "sample's checksum verified.\n\n" + camera_table(cameras) + "\n"
    )


if __name__ == "__main__":
    main()
