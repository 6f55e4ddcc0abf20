"""Exported graphs compute what the network does, for batches of any size, and say what they are."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from largescale.checkpoint import graphs
from largescale.checkpoint.export import export
from largescale.checkpoint.folder import open_checkpoint
from largescale.evaluate.extract import load_method
from shards.ground.errors import InputError
from tests.helpers.checkpoints import OWN, config_of, save_checkpoint

ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, images, and their embeddings."""
    folder = tmp_path_factory.mktemp("graphs") / "run"
    config = config_of(OWN, "evaluate.size=28")
    path = save_checkpoint(folder, config, 3)
    images = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    method = load_method(config, open_checkpoint(path))
    with torch.no_grad():
        return folder, images, method.projection(method.backbone(images))


def test_onnx(run, tmp_path):
    folder, images, embeddings = run
    if not ONNX:
        with pytest.raises(InputError, match="is not installed; run pip install 'largescale"):
            export(folder, tmp_path / "out.onnx", format_name="onnx")
        return
    done = export(folder, tmp_path / "out.onnx", format_name="onnx", head=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    for num in (1, 5):
        torch.testing.assert_close(graphs.run_onnx(done.path, images[:num]), embeddings[:num], rtol=0, atol=1e-5)
    import onnx

    model = onnx.load(done.path)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", graphs.OPSET)]
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["input_size"]) == [3, 28, 28] and json.loads(told["mean"]) == [0.485, 0.456, 0.406]


def test_torch_export(run, tmp_path):
    folder, images, embeddings = run
    done = export(folder, tmp_path / "out.pt2", format_name="torch_export", head=True)
    for num in (1, 5):
        torch.testing.assert_close(graphs.run_program(done.path, images[:num]), embeddings[:num], rtol=0, atol=1e-5)
    files = {graphs.ABOUT: ""}
    torch.export.load(done.path, extra_files=files)
    assert json.loads(files[graphs.ABOUT])["step"] == "3"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_a_line_and_leaves_nothing(run, tmp_path, monkeypatch, package):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(InputError, match=f"needs {package}, which is not installed; run pip install"):
        export(run[0], tmp_path / "out.onnx", format_name="onnx")
    assert not list(tmp_path.iterdir())
