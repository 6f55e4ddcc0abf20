"""Images that are there twice: the same bytes, or nearly the same picture.

Every piece is scanned for two numbers an image: xxh3-128 of its bytes, and a difference hash of 64 bits (is each cell
of an 8 x 9 grey thumbnail darker than its right neighbour?) that survives resizing, recompression and small edits. The
first file of the listing is kept. What is found is written to the plan, so that any task can leave it out.

Source: the difference hash is N. Krawetz's "dHash" (2013); search within a Hamming radius by bands as in M. Norouzi et
al., "Fast Exact Search in Hamming Space with Multi-Index Hashing" (arXiv 1307.2982, section 2).

Memory: the numbers of all images are cut into files by their leading bits and looked at file by file, about 200 MB
whatever their number. Disk: 32 bytes an image for exact ones, and 16 a band for near ones; 10^8 images take 3.2 GB and
6.4 GB (radius 3).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save

from shards.clean import Cleaning
from shards.files import atomic_write
from shards.images import ImageError, has_deep_mode, opened, scaled, to_rgb

_ROWS_A_FILE = 2**21
_BLOCK = 2048
"""Rows of a group that are compared with each other at a time."""

_RECORD = np.dtype([("low", np.uint64), ("high", np.uint64), ("row", np.uint64)])


@dataclass(frozen=True)
class Fingerprints:
    """Of some files: rows of the listing, xxh3-128 in two halves, difference hashes; uint64 [N] each."""

    row: np.ndarray
    low: np.ndarray
    high: np.ndarray
    look: np.ndarray

    def save(self, path: Path) -> None:
        """Write them."""
        with atomic_write(path) as file:
            file.write(save(vars(self)))

    @staticmethod
    def load(path: Path) -> Fingerprints:
        """Read them."""
        return Fingerprints(**load_file(path))


def fingerprint(payload: bytes, cleaning: Cleaning, *, look: bool) -> tuple[int, int, int] | None:
    """Numbers of one image.

    Args:
        payload: its bytes.
        cleaning: what is left out by its rules is nobody's original, so it gets no numbers.
        look: with the difference hash. Without, files are compared whole, and what the rules say of one they say of its
            copies too: then nothing is decoded.

    Returns:
        xxh3-128 in two halves, and the difference hash or 0; None for what is left out, or does not decode.
    """
    digest = xxhash.xxh3_128_intdigest(payload)
    try:
        seen = difference_hash(payload, cleaning) if look else 0
    except ImageError:
        return None
    return digest & (2**64 - 1), digest >> 64, seen


def difference_hash(payload: bytes, cleaning: Cleaning) -> int:
    """64 bits that say where an image, as it is seen, gets brighter from left to right.

    Raises:
        ImageError: it does not decode, or is left out by the rules, which look at it first.
    """
    with opened(payload, max_pixels=cleaning.max_pixels) as image:
        cleaning.check(payload, image)
        image.draft("L", (72, 64))  # JPEGs are decoded small
        small = np.rint(np.asarray(_grey(image).resize((9, 8), Image.Resampling.BOX))).astype(np.int32)
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _grey(image: Image.Image) -> Image.Image:
    if has_deep_mode(image):
        # Not by way of 8 bits, which leave little of a 12-bit picture that is stored in 16.
        return Image.fromarray(scaled(ImageOps.exif_transpose(image), 65535))
    return to_rgb(image).convert("L")


def find_duplicates(scans: list[Path], work: Path, radius: int | None) -> np.ndarray:
    """Rows to leave out.

    Args:
        scans: files of Fingerprints.
        work: folder for what does not fit into memory; it is removed.
        radius: Hamming distance of difference hashes within which pictures count as the same; None finds equal bytes
            alone.

    Returns:
        uint64 [N, 3]: row, the row it repeats, and 0 for equal bytes or 1 for near ones; by row. A near one repeats an
        earlier row within the radius, which may itself repeat another.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        found = [(row, first, 0) for row, first in _exact(scans, work / "exact")]
        if radius is not None:
            known = {row for row, _, _ in found}
            near: dict[int, int] = {}
            bits = 64 // (radius + 1)
            for band in range(radius + 1):
                for row, first in _near(scans, work / f"band-{band}", band * bits, bits, radius):
                    if row not in known:
                        near[row] = min(first, near.get(row, first))
            found += [(row, first, 1) for row, first in near.items()]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return np.array(sorted(found), np.uint64).reshape(-1, 3)


def _exact(scans: list[Path], folder: Path) -> Iterator[tuple[int, int]]:
    for records in _by_leading_bits(scans, folder, lambda scan: (scan.low, scan.high), lambda scan: scan.low):
        records = records[np.lexsort([records["row"], records["low"], records["high"]])]
        same = (records["low"][1:] == records["low"][:-1]) & (records["high"][1:] == records["high"][:-1])
        starts = np.concatenate([[True], ~same])
        first = records["row"][np.maximum.accumulate(np.where(starts, np.arange(len(records)), 0))]
        yield from zip(records["row"][~starts].tolist(), first[~starts].tolist(), strict=True)


def _near(scans: list[Path], folder: Path, shift: int, bits: int, radius: int) -> Iterator[tuple[int, int]]:
    """Pairs within the radius that agree in these bits; every pair within it agrees in those of some band."""
    mask = np.uint64((1 << bits) - 1)

    def band(scan: Fingerprints) -> np.ndarray:
        return (scan.look >> np.uint64(shift)) & mask

    def spread(scan: Fingerprints) -> np.ndarray:
        return band(scan) * np.uint64(0x9E3779B97F4A7C15)

    for records in _by_leading_bits(scans, folder, lambda scan: (band(scan), scan.look), spread):
        records = records[np.lexsort([records["row"], records["low"]])]
        ends = np.flatnonzero(np.append(records["low"][1:] != records["low"][:-1], True)) + 1
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            if end - start > 1:
                yield from _near_in_group(records[start:end], radius)


def _near_in_group(group: np.ndarray, radius: int) -> Iterator[tuple[int, int]]:
    """Each row that has an earlier one within the radius, with the first such; rows ascend."""
    looks, rows = group["high"], group["row"]
    for start in range(0, len(group), _BLOCK):
        own = looks[start : start + _BLOCK]
        first = np.full(len(own), -1)
        for other in range(0, start + 1, _BLOCK):
            close = np.bitwise_count(own[:, None] ^ looks[None, other : other + _BLOCK]) <= radius
            earlier = np.arange(other, other + close.shape[1])[None] < np.arange(start, start + len(own))[:, None]
            close &= earlier
            new = (first < 0) & close.any(axis=1)
            first[new] = other + close[new].argmax(axis=1)
        for place in np.flatnonzero(first >= 0).tolist():
            yield int(rows[start + place]), int(rows[first[place]])


def _by_leading_bits(scans: list[Path], folder: Path, numbers, leading) -> Iterator[np.ndarray]:
    """Records (low, high, row) of all scans, those with equal leading bits together, in pieces that fit into memory."""
    folder.mkdir()
    total = sum(len(Fingerprints.load(scan).row) for scan in scans)
    bits = max(0, int(np.ceil(np.log2(max(1, total / _ROWS_A_FILE)))))
    for scan in scans:
        found = Fingerprints.load(scan)
        records = np.empty(len(found.row), _RECORD)
        records["low"], records["high"] = numbers(found)
        records["row"] = found.row
        bucket = (leading(found) >> np.uint64(64 - bits)).astype(int) if bits else np.zeros(len(records), int)
        for number in np.unique(bucket).tolist():
            with (folder / f"{number:06d}").open("ab") as file:
                records[bucket == number].tofile(file)
    for path in sorted(folder.iterdir()):
        yield np.fromfile(path, _RECORD)
        path.unlink()
