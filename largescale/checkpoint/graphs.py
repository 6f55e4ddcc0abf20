"""Networks as graphs that other runtimes execute: ONNX, and torch.export's .pt2 (for AOTInductor, ExecuTorch, ...).

The batch size stays free; height and width are fixed to what evaluation uses.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largescale.checkpoint.exported import Network
from shards.ground.errors import InputError

OPSET = 18
"""The lowest that torch's exporter writes without converting: the most runtimes read it."""

ABOUT = "about.json"
"""File in a .pt2 with what is told of the network."""

_MOST_BYTES = 2**31 - 2**24  # of a protobuf file, with room for the graph
_INPUT, _OUTPUT = "images", "features"


def write_onnx(network: Network, path: Path) -> None:
    """Write an ONNX file; beyond 2 GB its weights lie beside it in NAME.onnx.data.

    Raises:
        InputError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.whole.state_dict().values())
    with _quietly():
        program = torch.onnx.export(
            network.whole,
            (network.images(2),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(network.about())
        program.save(str(path), external_data=size > _MOST_BYTES)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """What onnxruntime makes of images."""
    runtime: Any = _need("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [features] = session.run([_OUTPUT], {_INPUT: images.numpy()})
    return torch.from_numpy(features)


def write_program(network: Network, path: Path) -> None:
    """Write a .pt2 file of torch.export."""
    with _quietly():
        program = torch.export.export(
            network.whole, (network.images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, path, extra_files={ABOUT: json.dumps(network.about())})


def run_program(path: Path, images: Tensor) -> Tensor:
    """What the loaded program makes of images."""
    with _quietly():
        module: nn.Module = torch.export.load(path).module()
        return module(images)


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"--format onnx needs {package}, which is not installed; run pip install 'largescale[onnx]'"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporters say of their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
