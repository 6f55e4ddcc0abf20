"""The bytes of a safetensors file: equal ones for equal tensors and metadata, whoever writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor


def safetensors_content(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> list[bytes | memoryview]:
    """Parts of a file, to be written one after the other.

    The library writes metadata in random order; here they are sorted.

    Args:
        tensors: by name, contiguous, on the host.
        about: metadata.
    """
    content = safetensors.torch.save(dict(tensors), metadata=dict(about))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return [len(text).to_bytes(8, "little"), text, memoryview(content)[end:]]
