"""Duplicate images: the same bytes, or nearly the same picture.

Every piece is scanned for two numbers per image: xxh3-128 of its bytes, and a difference hash of 64 bits (is each cell
of an 8 x 9 grey thumbnail darker than its right neighbour?) that survives resizing, recompression and small edits. The
first file in the listing is kept. Duplicates are written to the plan, so that any task can leave them out.

Source: the difference hash is N. Krawetz's "dHash" (2013); search within a Hamming radius by bands as in M. Norouzi et
al., "Fast Exact Search in Hamming Space with Multi-Index Hashing" (arXiv 1307.2982, section 2).

Equal hashes (blank or scanned pages have thousands of them) count as one in the search for pairs.

Memory: the numbers of all images are split into files by their leading bits and processed file by file, about 200 MB
however many there are, plus 24 bytes per copy of the most copied file. Disk: 32 bytes per image in the scans, and
during the search 24 (exact) or 48 (near) per image and 24 per duplicate; for 10^8 images 3.2 GB, plus up to 5.6 GB
or 7.2 GB during the search.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image
from safetensors.numpy import load_file, save

from shards.cleaning.rules import Cleaning
from shards.ground.files import atomic_write
from shards.images.reading import ImageError, has_deep_mode, opened, orientation_of, scaled, to_rgb, upright

_ROWS_A_FILE = 2**21
_BLOCK = 2048
"""Rows of a group that are compared with each other at a time."""


@dataclass(frozen=True)
class Fingerprints:
    """Of N files: rows in the listing, xxh3-128 in two halves, and difference hashes; uint64 [N] each."""

    row: np.ndarray
    low: np.ndarray
    high: np.ndarray
    look: np.ndarray

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        with atomic_write(path) as file:
            file.write(save(vars(self)))

    @staticmethod
    def load(path: Path) -> Fingerprints:
        """Read what `save` wrote."""
        return Fingerprints(**load_file(path))


def image_hashes(payload: bytes, cleaning: Cleaning, *, look: bool) -> tuple[int, int, int] | None:
    """The hashes of one image.

    Args:
        payload: its bytes.
        cleaning: an image that its rules leave out cannot be the original of another, so it gets no hashes.
        look: also compute the difference hash. Without it files are compared whole, and rules treat a file like its
            copies, so nothing needs decoding.

    Returns:
        xxh3-128 in two halves, and the difference hash or 0; None if left out, or if it does not decode.
    """
    digest = xxhash.xxh3_128_intdigest(payload)
    try:
        seen = difference_hash(payload, cleaning) if look else 0
    except ImageError:
        return None
    return digest & (2**64 - 1), digest >> 64, seen


def difference_hash(payload: bytes, cleaning: Cleaning) -> int:
    """64 bits that say where an image, as displayed, gets brighter from left to right.

    Raises:
        ImageError: it does not decode, or is left out by the rules, which look at it first.
    """
    with opened(payload, max_pixels=cleaning.max_pixels, foreign=cleaning.may_store_anew) as image:
        cleaning.check(payload, image)
        image.draft("L", (72, 64))  # JPEGs are decoded small
        small = np.rint(np.asarray(_grey(image).resize((9, 8), Image.Resampling.BOX))).astype(np.int32)
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _grey(image: Image.Image) -> Image.Image:
    if has_deep_mode(image):
        # Going through 8 bits would leave little of a 12-bit picture stored in 16.
        return upright(Image.fromarray(scaled(image, 65535)), orientation_of(image))
    return to_rgb(image).convert("L")


def find_duplicates(scans: list[Path], work: Path, radius: int | None) -> Iterator[np.ndarray]:
    """Find the rows to leave out.

    Args:
        scans: files of Fingerprints.
        work: folder for what does not fit into memory; it is removed.
        radius: Hamming distance of difference hashes within which pictures count as the same; None finds equal bytes
            alone.

    Yields:
        uint64 [N, 3]: row, the row it repeats, and 0 for equal bytes or 1 for near ones; by row. A near one repeats the
        earliest row within the radius, which may itself repeat another.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        total, end = _count(scans)
        per_row = np.uint64((2**64 - 1) // end)
        found = _cut(_all_found(scans, work, total, radius), total, work / "found", lambda block: block[:, 0] * per_row)
        for path in found:
            block = _read(path, 3)
            block = block[np.lexsort([block[:, 1], block[:, 2], block[:, 0]])]  # of a row, equal bytes come first
            yield block[_starts(block[:, 0])]
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _count(scans: list[Path]) -> tuple[int, int]:
    """The number of rows, and a number larger than any of them."""
    total, end = 0, 1
    for scan in scans:
        row = Fingerprints.load(scan).row
        total, end = total + len(row), max(end, int(row.max(initial=0)) + 1)
    return total, end


def _all_found(scans: list[Path], work: Path, total: int, radius: int | None) -> Iterator[np.ndarray]:
    yield from _exact(scans, work / "exact", total)
    if radius is not None:
        yield from _near(scans, work / "near", total, radius)


def _exact(scans: list[Path], folder: Path, total: int) -> Iterator[np.ndarray]:
    numbers = (np.stack([scan.low, scan.high, scan.row], axis=1) for scan in map(Fingerprints.load, scans))
    for path in _cut(numbers, total, folder, lambda block: block[:, 0]):
        block = _read(path, 3)
        block = block[np.lexsort(block.T[::-1])]
        starts = _starts(block[:, 0], block[:, 1])
        first = block[np.maximum.accumulate(np.where(starts, np.arange(len(block)), 0)), 2]
        yield _as_found(block[~starts, 2], first[~starts], 0)
        path.unlink()


def _near(scans: list[Path], folder: Path, total: int, radius: int) -> Iterator[np.ndarray]:
    """Rows whose hash is within the radius of an earlier row's, with the earliest such row."""
    numbers = (np.stack([scan.look, scan.row], axis=1) for scan in map(Fingerprints.load, scans))
    files = _cut(numbers, total, folder / "rows", _by_look)
    firsts = _cut(map(_first_of_each, files), total, folder / "firsts", _by_look)
    bits = 64 // (radius + 1)
    for band in range(radius + 1 if radius else 0):
        pairs = _near_in_band(map(_read, firsts), folder / f"band-{band}", total, band * bits, bits, radius)
        _cut(pairs, total, folder / "earlier", _by_look)
    for path in files:
        # Files of the same name have the same hashes.
        known = [_read(folder / name / path.name) for name in ("firsts", "earlier")]
        earliest = _first_of_each_in(np.concatenate(known))
        for block in _blocks(path):
            first = earliest[np.searchsorted(earliest[:, 0], block[:, 0]), 1]
            later = first < block[:, 1]
            yield _as_found(block[later, 1], first[later], 1)


def _near_in_band(
    firsts: Iterable[np.ndarray], folder: Path, total: int, shift: int, bits: int, radius: int
) -> Iterator[np.ndarray]:
    """Pairs (hash, earliest row within the radius) that agree in the bits of this band; every pair
    within the radius agrees in some band.
    """
    mask = np.uint64((1 << bits) - 1)

    def band(block: np.ndarray) -> np.ndarray:
        return (block[:, 0] >> np.uint64(shift)) & mask

    for path in _cut(firsts, total, folder, lambda block: _spread(band(block))):
        block = _read(path)
        block = block[np.lexsort([block[:, 1], band(block)])]
        starts = np.flatnonzero(_starts(band(block)))
        for start, end in zip(starts, [*starts[1:], len(block)], strict=True):
            if end - start > 1:
                yield from _near_in_group(block[start:end], radius)
        path.unlink()


def _near_in_group(group: np.ndarray, radius: int) -> Iterator[np.ndarray]:
    """The pairs within one group; rows ascend."""
    looks, rows = group[:, 0], group[:, 1]
    for start in range(0, len(group), _BLOCK):
        own = looks[start : start + _BLOCK]
        first = np.full(len(own), -1)
        for other in range(0, start + 1, _BLOCK):
            left = np.flatnonzero(first < 0)
            close = np.bitwise_count(own[left, None] ^ looks[None, other : other + _BLOCK]) <= radius
            close &= np.arange(other, other + close.shape[1])[None] < (start + left)[:, None]
            new = close.any(axis=1)
            first[left[new]] = other + close[new].argmax(axis=1)
        found = np.flatnonzero(first >= 0)
        yield np.stack([own[found], rows[first[found]]], axis=1)


def _as_found(row: np.ndarray, repeated: np.ndarray, kind: int) -> np.ndarray:
    return np.stack([row, repeated, np.full(len(row), kind, np.uint64)], axis=1)


def _first_of_each(path: Path) -> np.ndarray:
    """Each hash in a file of (hash, row) with its first row, sorted by hash."""
    found = np.empty((0, 2), np.uint64)
    for block in _blocks(path):
        found = _first_of_each_in(np.concatenate([found, block]))
    return found


def _first_of_each_in(pairs: np.ndarray) -> np.ndarray:
    pairs = pairs[np.lexsort([pairs[:, 1], pairs[:, 0]])]
    return pairs[_starts(pairs[:, 0])]


def _starts(*columns: np.ndarray) -> np.ndarray:
    """Whether a row differs from the one before it, bool [N]."""
    changes = np.zeros(max(0, len(columns[0]) - 1), bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    return np.concatenate([np.ones(min(1, len(columns[0])), bool), changes])


def _spread(numbers: np.ndarray) -> np.ndarray:
    return numbers * np.uint64(0x9E3779B97F4A7C15)


def _by_look(block: np.ndarray) -> np.ndarray:
    return _spread(block[:, 0])


def _cut(
    blocks: Iterable[np.ndarray], total: int, folder: Path, leading: Callable[[np.ndarray], np.ndarray]
) -> list[Path]:
    """Split rows of numbers into files by their leading bits, with _ROWS_A_FILE rows on average.

    Returns:
        The files, by those bits; for the same `total` and bits they have the same names in any folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bits = max(0, int(np.ceil(np.log2(max(1, total / _ROWS_A_FILE)))))
    for block in blocks:
        bucket = (leading(block) >> np.uint64(64 - bits)).astype(int) if bits else np.zeros(len(block), int)
        for number in np.unique(bucket).tolist():
            with (folder / f"{number:06d}").open("ab") as file:
                block[bucket == number].tofile(file)
    return sorted(folder.iterdir())


def _read(path: Path, columns: int = 2) -> np.ndarray:
    """The numbers of a file, uint64 [N, columns]; none if it is not there."""
    numbers = np.fromfile(path, np.uint64) if path.exists() else np.empty(0, np.uint64)
    return numbers.reshape(-1, columns)


def _blocks(path: Path) -> Iterator[np.ndarray]:
    """The pairs in a file, in blocks that fit into memory."""
    with path.open("rb") as file:
        while len(block := np.fromfile(file, np.uint64, 2 * _ROWS_A_FILE)):
            yield block.reshape(-1, 2)
