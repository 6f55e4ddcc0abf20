from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from largescale.checkpoint import writer
from largescale.checkpoint.folder import FileStamp
from largescale.checkpoint.writer import write_tensors

DTYPES = list(writer._DTYPES)


def pieces() -> dict[str, tuple[torch.Tensor, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    found = {str(dtype): ((torch.randn(3, 5, generator=generator) * 9).to(dtype), [6, 0]) for dtype in DTYPES}
    return found | {
        "scalar": (torch.tensor(7), []),
        "empty": (torch.zeros(0, 4), [12, 0]),
        "transposed": (torch.arange(6.0).view(2, 3).T, [0, 0]),
    }


@pytest.mark.parametrize("chunk", [1, 7, 2**24])
def test_safetensors_reads_what_is_written(tmp_path: Path, monkeypatch, chunk):
    monkeypatch.setattr(writer, "_CHUNK_BYTES", chunk)
    path = tmp_path / "file.safetensors"
    stamp = write_tensors(path, pieces())
    assert stamp == FileStamp(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    loaded = load_file(path)
    assert loaded.keys() == pieces().keys()
    for name, (tensor, _) in pieces().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_every_piece_begins_at_a_multiple_of_its_types_size(tmp_path: Path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, pieces())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for name, (tensor, offsets) in pieces().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
        assert json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])[name] == {"saved_offsets": offsets}
