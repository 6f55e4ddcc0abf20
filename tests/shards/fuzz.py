"""Damages images, tars, zip archives and lists at random, and does with them what a user would.

    python -m tests.shards.fuzz --count 20000 [--seed 0] [--seconds S] [--out benchmarks/results/fuzz.json]

Every other round mutates images of the zoo (tests/shards/zoo.py): convert by one of several options, verify, read as
training does. The others mutate a few tars of images (convert each, index it, verify, read), a zip archive, or a list
of each kind (.csv, .jsonl, .parquet). It counts inputs: images, tars, zips and lists. A round fails by a traceback, by
hanging, by losing an image without a row, or by a disagreement on what can be read. A seed and the number of a round
give the same bytes again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from largescale.config import DataConfig
from largescale.data.corpora import open_corpora
from largescale.data.decode import EncodedImage
from largescale.data.reader import SampleError, ShardReader
from shards.cleaning.rules import Cleaning
from shards.conversion.convert import Options, convert
from shards.format.ledger import SKIPPED_NAME, read_ledger
from shards.format.manifest import Manifest
from shards.ground.errors import InputError
from shards.inspection.index import index_folder
from shards.inspection.verify import verify
from tests.helpers.commands import IN_MEMORY
from tests.shards.specimens import Specimen
from tests.shards.zoo import zoo

IMAGES_A_ROUND, TARS_A_ROUND = 40, 3
ROUND_S = 120
"""Seconds after which a round hangs."""

RULES = (
    Cleaning(),
    Cleaning(plain=True),
    Cleaning(max_side=24),
    Cleaning(srgb=True, blank=True),
    Cleaning(animated=True),
    Cleaning(decode=False),
    Cleaning(plain=True, srgb=True, max_side=36, min_side=8, max_aspect=20),
)
WORDS = (
    b"\xff",
    b"\0",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x80",
    b"Exif\0\0",
    b"II*\0",
    b"\xff\xd8",
    b"\xff\xda",
    b"IDAT",
    b"IEND",
    b"acTL",
    b"ftyp",
    b"\0\0\0\0\0\0\0\0",
)


def mutated(payload: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Bytes with one to four changes; most of them near the beginning, where headers are."""
    data = bytearray(payload)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        place = int(len(data) * rng.random() ** rng.choice([1, 3]))
        kind = rng.integers(0, 8)
        if kind == 0:
            data[place] ^= 1 << rng.integers(0, 8)
        elif kind == 1:
            data[place] = rng.integers(0, 256)
        elif kind == 2:
            del data[place : place + rng.integers(1, 64)]
        elif kind == 3:
            data[place:place] = rng.bytes(rng.integers(1, 32))
        elif kind == 4:
            word = WORDS[rng.integers(0, len(WORDS))]
            data[place : place + len(word)] = word
        elif kind == 5:
            del data[place:]
        elif kind == 6:
            other = others[rng.integers(0, len(others))]
            start = rng.integers(0, max(1, len(other)))
            data[place : place + 64] = other[start : start + 64]
        else:
            data[place:place] = data[place : place + rng.integers(1, 64)]
    return bytes(data)


def images(seed: int, number: int) -> dict[str, bytes]:
    """Those of a round, by file name."""
    rng, specimens = np.random.default_rng([seed, number]), zoo()
    payloads = [specimen.payload for specimen in specimens if len(specimen.payload) < 10**5]
    chosen = rng.integers(0, len(specimens), IMAGES_A_ROUND)
    found = {}
    for place, which in enumerate(chosen):
        payload = specimens[which].payload
        changed = mutated(payload, rng, payloads) if rng.random() < 0.9 else payload
        found[f"{place:03d}-{specimens[which].name}"] = changed
    return found


def fuzz_images(seed: int, number: int, work: Path) -> int:
    """A round of damaged images; returns how many."""
    files, source = images(seed, number), work / "pile"
    source.mkdir()
    for name, payload in files.items():
        (source / name).write_bytes(payload)
    rules = RULES[number % len(RULES)]
    duplicates = ("keep", "near", "exact")[number % 3]
    try:
        manifest = convert(source, work / "out", Options("fuzz", cleaning=rules, duplicates=duplicates))
    except InputError as error:
        assert "none of" in str(error), error
        return len(files)
    _check(work / "out", manifest.num_samples, set(files), decoded=rules.decode)
    return len(files)


def fuzz_tars(seed: int, number: int, work: Path) -> int:
    """A round of damaged tars, each by itself; returns how many."""
    rng = np.random.default_rng([seed, number])
    for place in range(TARS_A_ROUND):
        payload, folder = _mutated_tar(rng), work / str(place)
        for name in ("tars", "indexed"):
            (folder / name).mkdir(parents=True)
            (folder / name / "a.tar").write_bytes(payload)
        _try(partial(convert, folder / "tars", folder / "out", Options("fuzz", cleaning=RULES[number % len(RULES)])))
        _try(partial(index_folder, folder / "indexed", workers=1))
    return TARS_A_ROUND


def _mutated_tar(rng: np.random.Generator) -> bytes:
    stored, specimens = io.BytesIO(), _small()
    with tarfile.open(fileobj=stored, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for place in range(rng.integers(1, 8)):
            specimen = specimens[rng.integers(0, len(specimens))]
            folder = "x" * int(rng.integers(1, 120))
            members = {specimen.name.rpartition(".")[2]: specimen.payload, "cls": b"3", "json": b"{}"}
            for suffix, payload in members.items():
                member = tarfile.TarInfo(f"{folder}/{place:04d}.{suffix}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    return mutated(stored.getvalue(), rng, [specimen.payload for specimen in specimens])


def fuzz_zip(seed: int, number: int, work: Path) -> int:
    """A round of one damaged zip archive; returns 1."""
    rng, stored, specimens = np.random.default_rng([seed, number]), io.BytesIO(), _small()
    how = int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    with zipfile.ZipFile(stored, "w", how) as archive:
        for place in range(rng.integers(1, 12)):
            specimen = specimens[rng.integers(0, len(specimens))]
            archive.writestr(f"{'x' * int(rng.integers(1, 9))}/{place:03d}-{specimen.name}", specimen.payload)
    (work / "pile.zip").write_bytes(mutated(stored.getvalue(), rng, [specimen.payload for specimen in specimens]))
    _try(partial(convert, work / "pile.zip", work / "out", Options("fuzz", cleaning=RULES[number % len(RULES)])))
    return 1


def fuzz_lists(seed: int, number: int, work: Path) -> int:
    """A round of damaged lists of whole images, one of each kind; returns how many."""
    rng, specimens = np.random.default_rng([seed, number]), _small()
    rows = []
    for place, which in enumerate(rng.integers(0, len(specimens), 8)):
        rows.append({"path": f"{place}-{specimens[which].name}", "kind": place, "score": place / 3})
        (work / rows[-1]["path"]).write_bytes(specimens[which].payload)
    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), table, compression=str(rng.choice(["none", "zstd"])))
    lists = {
        "csv": "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]).encode(),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "parquet": table.getvalue(),
    }
    for suffix, payload in lists.items():
        (work / f"list.{suffix}").write_bytes(mutated(payload, rng, [b'"\r\n{},[]\\u00e9', b"PAR1\x15\x04"]))
        _try(partial(convert, work / f"list.{suffix}", work / suffix, Options("fuzz")))
    return len(lists)


ROUNDS = (
    ("images", fuzz_images),
    ("tars", fuzz_tars),
    ("images", fuzz_images),
    ("zips", fuzz_zip),
    ("images", fuzz_images),
    ("tars", fuzz_tars),
    ("images", fuzz_images),
    ("lists", fuzz_lists),
)


@cache
def _small() -> list[Specimen]:
    return [specimen for specimen in zoo() if len(specimen.payload) < 10**4]


def _try(make: Callable[[], Manifest]) -> None:
    """Make shards, and check them; or be refused in a line."""
    try:
        manifest = make()
    except InputError as error:
        assert "\n" not in str(error), error
        return
    _check(manifest.root, manifest.num_samples, set(), decoded=False)


def _check(folder: Path, num_samples: int, files: set[str], *, decoded: bool) -> None:
    """Nothing is lost without a row, and verify and training agree on what can be read."""
    rows = list(read_ledger(folder / SKIPPED_NAME))
    assert all(row["reason"] for row in rows)
    if files:
        assert len(rows) + num_samples == len(files), f"{len(rows)} rows, {num_samples} samples, {len(files)} files"
    told = {problem.key for problem in verify(folder, workers=1, decode=True)[1]}
    reader, unreadable = ShardReader(open_corpora(DataConfig(shards=str(folder)))), set()
    for number in range(len(reader)):
        try:
            EncodedImage(reader.read(number), max_pixels=1 << 28).decode()
        except SampleError:
            unreadable.add(reader.key(number))
    assert told == unreadable, f"verify names {told - unreadable}, training {unreadable - told}"
    assert not (decoded and told), f"decoded, and not readable: {told}"


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise in what takes longer: a hang in a library's C code is ended by nothing, and seen as no progress."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(count: int, seed: int = 0, *, seconds: float = float("inf"), out: Path | None = None) -> dict[str, Any]:
    """Rounds until `count` inputs, or `seconds`, are through.

    Args:
        out: file for the result, written again every minute.

    Returns:
        How many inputs of each kind were tried, and what failed: the round, and the end of the traceback.
    """
    started = saved = time.monotonic()
    tried: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    number = 0
    while sum(tried.values()) < count and time.monotonic() - started < seconds:
        kind, fuzz = ROUNDS[number % len(ROUNDS)]
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            try:
                with limit(ROUND_S), redirect_stderr(io.StringIO()):
                    tried[kind] += fuzz(seed, number, Path(folder))
            except Exception:
                tried[kind] += 1
                failures.append({"round": number, "kind": kind, "error": traceback.format_exc()[-1500:]})
        number += 1
        result = {
            "seed": seed,
            "rounds": number,
            "tried": dict(tried),
            "seconds": round(time.monotonic() - started, 1),
            "asked": count,
            "failures": failures,
        }
        if out and (time.monotonic() - saved > 60 or sum(tried.values()) >= count):
            saved = time.monotonic()
            save(result, out)
    if out:
        save(result, out)
    return result


def save(result: dict[str, Any], out: Path) -> None:
    """Write a result whole or not at all."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, out)


def main() -> int:
    """Fuzz, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="inputs to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long, whatever is left")
    parser.add_argument("--out", type=Path, help="file for the result")
    arguments = parser.parse_args()
    result = run(arguments.count, arguments.seed, seconds=arguments.seconds, out=arguments.out)
    for failure in result["failures"]:
        print(f"round {failure['round']} ({failure['kind']}):\n{failure['error']}", file=sys.stderr)
    print(f"{result['tried']} in {result['seconds']} s, {len(result['failures'])} rounds failed")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
