"""Features of one shard as a file that other programs read: Parquet, or .npy with a Parquet of keys beside it.

    NAME-000000.parquet    key, shard, row[, label, class][, embedding][, NAME, NAME_score, ...][, image]
    NAME-000000.npy        with form `npy`: the embeddings [N, D], row i of which is row i of the Parquet

Rows stand in the order of the shard; `row` is an image's position in it, so that a file can be joined with the shard's
index. The Parquet's metadata has an entry `largescale`, JSON, that says what the features were made from. It is written
last, whole, so a shard is done when it is there.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from largescale.evaluate.made_from import Stamp, difference
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

FORMS = ("parquet", "npy")
DTYPES: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32}

VERSION = 1
"""Of the files. To be raised when columns or metadata change their meaning."""

_ENTRY = b"largescale"
_COUNTS = ("num_images", "num_features", "num_unreadable", "num_exemplars", "num_shards")
"""Entries that say what came of it, and not what it was made from."""
_ROW_GROUP = 8192


@dataclass(frozen=True)
class ShardFeatures:
    """What is known of the images of one shard that could be read.

    Attributes:
        shard: name of the tar.
        keys: WebDataset keys [N].
        rows: positions in the shard, int64 [N].
        embeddings: [N, D], in the type to be written; None without.
        labels: class numbers, -1 for none, int64 [N]; None if the shards have no classes.
        classes: their names.
        assigned: columns about what an image is assigned to, by name.
        images: JPEGs; None without.
    """

    shard: str
    keys: list[str]
    rows: np.ndarray
    embeddings: np.ndarray | None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    assigned: dict[str, pa.Array] = field(default_factory=dict)
    images: list[bytes] | None = None

    def columns(self) -> dict[str, pa.Array]:
        """All columns but the embedding."""
        num = len(self.keys)
        columns = {
            "key": pa.array(self.keys, pa.string()),
            "shard": pa.array([self.shard], pa.string()).take(pa.array(np.zeros(num, np.int32))),
            "row": pa.array(self.rows, pa.int32()),
        }
        if self.labels is not None:
            unknown = self.labels < 0
            columns["label"] = pa.array(self.labels, pa.int32(), mask=unknown)
            names = pa.array(self.classes, pa.string())
            columns["class"] = names.take(pa.array(self.labels, pa.int32(), mask=unknown))
        columns |= self.assigned
        if self.images is not None:
            columns["image"] = pa.array(
                [{"bytes": image} for image in self.images], pa.struct([pa.field("bytes", pa.binary())])
            )
        return columns


def path_of(out: Path, shard: str) -> Path:
    """The Parquet of a shard."""
    return out / f"{shard.removesuffix('.tar')}.parquet"


def write(out: Path, form: str, found: ShardFeatures, about: Stamp) -> None:
    """Write the features of a shard, atomically.

    Args:
        out: folder.
        form: one of FORMS.
        found: what is written.
        about: what they were made from; `fits` compares it.
    """
    path, columns = path_of(out, found.shard), found.columns()
    if form == "npy":
        assert found.embeddings is not None
        path.unlink(missing_ok=True)  # what it says is not of the new array
        with atomic_write(path.with_suffix(".npy")) as file:
            np.save(file, found.embeddings, allow_pickle=False)
    else:
        path.with_suffix(".npy").unlink(missing_ok=True)  # of another form, and of nobody knows which weights
        if found.embeddings is not None:
            width, flat = found.embeddings.shape[1], pa.array(np.ascontiguousarray(found.embeddings).ravel())
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, width)
    num_features = 0 if found.embeddings is None else found.embeddings.shape[1]
    about = {**about, "num_images": len(found.keys), "num_features": num_features}
    table = pa.table(columns).replace_schema_metadata({_ENTRY: json.dumps(about).encode()})
    with atomic_write(path) as file:
        pq.write_table(
            table,
            file,
            compression={name: "none" if name in ("embedding", "image") else "zstd" for name in _leaves(table.schema)},
            use_dictionary=[name for name in ("shard", "class") if name in columns],
            row_group_size=_ROW_GROUP,
            write_page_checksum=True,  # so that any reader can tell a damaged page
        )


def _leaves(schema: pa.Schema) -> list[str]:
    """Names by which Parquet knows the columns."""
    nested = {"embedding": "embedding.list.element", "image": "image.bytes"}
    return [nested.get(name, name) for name in schema.names]


def about(path: Path) -> dict[str, Any]:
    """What the metadata of a shard's features says.

    Raises:
        InputError: missing, damaged, or of another program.
    """
    try:
        entry = (pq.read_schema(path).metadata or {}).get(_ENTRY)
        if entry is None:
            raise ValueError(f"its metadata has no entry {_ENTRY.decode()}")
        return cast(dict[str, Any], json.loads(entry))
    except (OSError, pa.ArrowException, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: not features that largescale wrote ({why}); pass a folder of `largescale features`, or move this "
            f"file out of it"
        ) from error


def difference_to(path: Path, form: str, wanted: Stamp) -> str:
    """Why the features of a shard are not those that are wanted; empty if they are. Pages are not read."""
    try:
        found = about(path)
        rows = pq.read_metadata(path).num_rows
    except (InputError, OSError, pa.ArrowException):
        return "its file is damaged, or of another program"
    written = {key: value for key, value in found.items() if key not in _COUNTS}
    if why := difference(written, wanted):
        return why
    shape = (int(found["num_images"]), int(found["num_features"]))
    if rows != shape[0] or (form == "npy" and not _is_array(path.with_suffix(".npy"), shape, wanted["dtype"])):
        return "its file is damaged"
    return ""


def rows_of(path: Path) -> np.ndarray:
    """Positions in the shard of the images whose features a file has."""
    return cast(np.ndarray, pq.read_table(path, columns=["row"])["row"].to_numpy())


def _is_array(path: Path, shape: tuple[int, int], dtype: str) -> bool:
    """Whether a .npy is of this form and as long as it must be, by its header and its size."""
    expected = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        expected, {"descr": np.dtype(DTYPES[dtype]).str, "fortran_order": False, "shape": shape}
    )
    header = expected.getvalue()
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return file.read(len(header)) == header and size == len(header) + np.dtype(DTYPES[dtype]).itemsize * (
                shape[0] * shape[1]
            )
    except OSError:
        return False
