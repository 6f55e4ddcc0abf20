"""Images for the page: thumbnails from the features, or images from the shards where these are at hand."""

from __future__ import annotations

import io
from bisect import bisect_right
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from largescale.curate.embeddings import Embeddings, FeatureFile
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from largescale.report.gallery import data_url, no_picture, picture
from shards.format.manifest import read_manifest


class Pictures:
    """Pictures of images by their sample numbers."""

    def __init__(self, embeddings: Embeddings, shards: Path | None) -> None:
        self._files = embeddings.files
        self._reader = ShardReader([Corpus(read_manifest(shards))]) if shards else None

    @property
    def are_there(self) -> bool:
        """Whether there are any."""
        return self._reader is not None or any(map(_has_thumbnails, self._files))

    def url(self, sample: int) -> str:
        """A `data:` URL of an image; grey where it cannot be read, or its file has no thumbnails."""
        if self._reader is not None:
            return data_url(picture(self._reader, sample))
        file = self._files[bisect_right([one.first_sample for one in self._files], sample) - 1]
        if not _has_thumbnails(file):
            return data_url(no_picture())
        place = int((file.samples() == sample).argmax())
        with pq.ParquetFile(file.path) as opened:
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if place < rows:
                    column = opened.read_row_group(group, columns=["image"])["image"]
                    return data_url(Image.open(io.BytesIO(column[place].as_py()["bytes"])))
                place -= rows
        raise AssertionError("an image of the file has a row")


def _has_thumbnails(file: FeatureFile) -> bool:
    return bool(file.about.get("thumbnails"))
