"""Writes a rank's pieces of a checkpoint as one safetensors file, straight from the tensors' memory.

torch's own writer copies everything twice while holding the interpreter lock, so that training stalls meanwhile. Here
pieces go to the file and into its checksum in small parts, by calls that let other threads run. The result is what
torch's `HuggingFaceStorageReader` reads: https://huggingface.co/docs/safetensors, with the place of each piece in its
whole under the key DCP_SHARDING_INFO.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from largescale.checkpoint.folder import FileStamp

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 2**24


class PieceWriter(HuggingFaceStorageWriter):
    """The storage writer of one rank for `torch.distributed.checkpoint.save`.

    Attributes:
        stamps: size and checksum of the file that this rank wrote, by name; none for a rank without pieces.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.stamps: dict[str, FileStamp] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces. Called by torch."""
        pieces: dict[str, tuple[Tensor, list[int]]] = {}
        for item in plan.items:
            piece = planner.resolve_data(item)
            assert isinstance(piece, Tensor) and item.tensor_data is not None, "the saver is given tensors alone"
            pieces[item.index.fqn] = (piece, list(item.tensor_data.chunk.offsets))
        if pieces:
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            self.stamps[name] = write_tensors(self.folder / name, pieces)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def write_tensors(path: Path, pieces: Mapping[str, tuple[Tensor, list[int]]]) -> FileStamp:
    """Write pieces of tensors, each with its offsets in the whole, to a durable safetensors file.

    Raises:
        OSError: the file cannot be written; what was written stays.
    """
    # Wide types first, so that every piece starts at a multiple of its type's size.
    names = sorted(pieces, key=lambda name: (-pieces[name][0].element_size(), name))
    checksum, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for view in [memoryview(_header(names, pieces)), *(_bytes_of(pieces[name][0]) for name in names)]:
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                checksum.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return FileStamp(size, checksum.hexdigest())


def _header(names: list[str], pieces: Mapping[str, tuple[Tensor, list[int]]]) -> bytes:
    places = {name: {"saved_offsets": pieces[name][1]} for name in names}
    header: dict[str, object] = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"}}
    end = 0
    for name in names:
        tensor = pieces[name][0]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
