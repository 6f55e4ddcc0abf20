"""Members beside images, read in any order by threads."""

from __future__ import annotations

import io
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards
from largescale.data.corpora import Corpus
from largescale.evaluate import members
from largescale.evaluate.members import MemberReader
from shards.ground.errors import InputError

TARS, SAMPLES = 12, 5


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Samples of which every fifth has no member `txt`, and some have it before their image."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "PNG")
    for number in range(TARS):
        with tarfile.open(tmp_path / f"a-{number:06}.tar", "w") as tar:
            for row in range(SAMPLES):
                found = [("png", file.getvalue()), ("txt", text_of(number * SAMPLES + row))]
                for suffix, payload in found[:: -1 if row % 2 else 1]:
                    if payload is not None:
                        info = tarfile.TarInfo(f"{number}-{row}.{suffix}")
                        info.size = len(payload)
                        tar.addfile(info, io.BytesIO(payload))
    return Corpus(shards.index(tmp_path, workers=1))


def text_of(sample_id: int) -> bytes | None:
    return None if sample_id % 5 == 2 else b"text of %d" % sample_id


def test_each_tar_is_walked_once_in_whatever_order_members_are_read(corpus, monkeypatch):
    walked: Counter[Path] = Counter()
    walk = members.walk

    def counted(file, path):
        walked[path] += 1
        return walk(file, path)

    monkeypatch.setattr(members, "walk", counted)
    reader = MemberReader(corpus, "txt")
    order = np.random.default_rng(0).permutation(np.tile(np.arange(TARS * SAMPLES), 3)).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(reader.read, order)) == [text_of(number) for number in order]
    assert sorted(walked.values()) == [1] * TARS


def test_tars_are_walked_at_the_same_time(corpus, monkeypatch):
    together = threading.Barrier(4, timeout=600)
    walk = members.walk

    def waits(file, path):
        together.wait()
        return walk(file, path)

    monkeypatch.setattr(members, "walk", waits)
    reader = MemberReader(corpus, "txt")
    with ThreadPoolExecutor(4) as threads:
        ids = [SAMPLES * number for number in range(4)]
        assert list(threads.map(reader.read, ids)) == [text_of(number) for number in ids]


def test_an_image_that_is_not_where_the_index_says_is_named(corpus, monkeypatch):
    reader = MemberReader(corpus, "txt")
    path, image = reader.reader.place(3)
    for wrong in (0, image + 1, 10**9):
        monkeypatch.setattr(reader.reader, "place", lambda number, wrong=wrong: (path, wrong))
        with pytest.raises(InputError, match=f"has no sample whose image begins at byte {wrong}; run `shards verify`"):
            reader.read(3)


def test_an_image_that_cannot_be_read_is_named_once(corpus, caplog):
    reader = MemberReader(corpus, "txt")
    assert reader.image(7, max_pixels=64).shape == (3, 8, 8) and not caplog.records
    assert [reader.image(7, max_pixels=63) for _ in range(3)] == [None] * 3
    [line] = caplog.messages
    assert "a-000001.tar, key 1-2: nothing is learned or measured of it: 8 x 8 pixels" in line
