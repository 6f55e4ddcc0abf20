"""Writes a shard: a tar as webdataset's TarWriter(mtime=0) writes it, byte for byte, and its index on the way."""

from __future__ import annotations

import tarfile
from typing import BinaryIO

import xxhash

from shards.format.shard_index import ShardIndex
from shards.format.tar import IndexRow, index_of_rows
from shards.ground.files import begin_write_out
from shards.images.reading import ImageFacts

_BLOCK = tarfile.BLOCKSIZE
_WRITE_OUT_BYTES = 2**23


class ShardWriter:
    """Writes samples to an open file one after the other; everything is hashed and indexed as it passes.

    Attributes:
        num_bytes: written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.num_bytes, self._sent = 0, 0
        self._file, self._digest = file, xxhash.xxh3_128()
        self._rows: list[IndexRow] = []
        self._labels: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, key: str, members: dict[str, bytes], image: str, facts: ImageFacts, label: int
    ) -> dict[str, tuple[int, int]]:
        """Write a sample.

        Args:
            key: its WebDataset key.
            members: bytes by suffix.
            image: suffix of its image.
            facts: of the image.
            label: class number, which becomes a member `cls`; -1 for none.

        Returns:
            Where in the tar the bytes of each member are, (offset, size) by suffix.
        """
        members = {**members, **({"cls": str(label).encode()} if label >= 0 else {})}
        parts: list[bytes] = []
        spans: dict[str, tuple[int, int]] = {}
        start = self.num_bytes
        for suffix in sorted(members):
            payload = members[suffix]
            parts.append(header(f"{key}.{suffix}", len(payload)))
            start += len(parts[-1])
            spans[suffix] = start, len(payload)
            if suffix == image:
                self._rows.append(
                    IndexRow(
                        key,
                        start,
                        len(payload),
                        facts.width,
                        facts.height,
                        facts.format,
                        xxhash.xxh3_64_intdigest(payload),
                    )
                )
                self._labels.append(label)
            parts += (payload, bytes(-len(payload) % _BLOCK))
            start += len(payload) + len(parts[-1])
        self._write(b"".join(parts))
        return spans

    def finish(self) -> tuple[ShardIndex, str]:
        """Write the end of the tar.

        Returns:
            The index, and `xxh3-128:<hex>` of the tar.
        """
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        index = index_of_rows(self._rows)
        index.label[:] = self._labels
        return index, f"xxh3-128:{self._digest.hexdigest()}"

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
        if self.num_bytes - self._sent >= _WRITE_OUT_BYTES:
            begin_write_out(self._file, self._sent, self.num_bytes - self._sent)
            self._sent = self.num_bytes


def _tarfile_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, 0, 0o444
    member.uname = member.gname = "bigdata"
    return member.tobuf()


_SIZE, _CHECKSUM = slice(124, 135), slice(148, 154)
_EMPTY = _tarfile_header("", 0)
_EMPTY_SUM = int(_EMPTY[_CHECKSUM], 8) - 11 * ord("0")
"""The checksum without the digits of the size."""


def header(name: str, size: int) -> bytes:
    """The header of a member, as tarfile writes it; ten times as fast for what fits the fields of one block."""
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        return _tarfile_header(name, size)
    block, text, digits = bytearray(_EMPTY), name.encode(), b"%011o" % size
    block[: len(text)] = text
    block[_SIZE] = digits
    block[_CHECKSUM] = b"%06o" % (_EMPTY_SUM + sum(text) + sum(digits))
    return bytes(block)
