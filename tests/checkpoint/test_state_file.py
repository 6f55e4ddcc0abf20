"""Files of weights are read whole or refused in a line, and nothing that they hold is run."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from largescale.checkpoint.state_file import read_state
from shards.ground.errors import InputError

TENSORS = {"a.weight": torch.arange(2000.0).view(40, 50), "b": torch.tensor(3)}


@pytest.mark.parametrize("new", [True, False])
def test_nested_dictionaries_and_arguments_are_read(tmp_path, new):
    content = {"state_dict": TENSORS, "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace()), "epoch": 3}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=new)
    found = read_state(tmp_path / "file.pth")
    assert list(found.tensors) == ["state_dict.a.weight", "state_dict.b"]
    assert torch.equal(found.tensors["state_dict.a.weight"], TENSORS["a.weight"])


def test_a_folder_of_hugging_face_is_read_with_what_it_says_of_the_input(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    found = read_state(tmp_path)
    assert found.path == tmp_path / "model.safetensors" and found.tensors.keys() == TENSORS.keys()
    assert found.metadata["format"] == "pt" and json.loads(found.metadata["pretrained_cfg"]) == {"mean": [0.5] * 3}


class Runs:
    """What a hostile pickle holds: a call of any function."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, new):
    torch.save({"x": Runs(tmp_path / "ran"), **TENSORS}, tmp_path / "file.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match=re.escape("holds a posix.mkdir besides tensors, which is not loaded")):
        read_state(tmp_path / "file.pth")
    assert not (tmp_path / "ran").exists()


def test_a_torn_file_is_a_line_wherever_it_is_torn(tmp_path):
    torch.save(TENSORS, tmp_path / "new")
    torch.save(TENSORS, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file(TENSORS, tmp_path / "safe")
    for name in ("new", "old", "safe"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 1, 9, 40, 200, len(content) // 2, len(content) - 1):
            (tmp_path / "torn").write_bytes(content[:size])
            with pytest.raises(InputError) as told:
                read_state(tmp_path / "torn")
            assert str(told.value).startswith(f"{tmp_path}/torn: ") and "\n" not in str(told.value), (name, size)


def test_dictionaries_without_end_are_a_line(tmp_path):
    inside: dict[str, object] = {"weight": torch.zeros(2)}
    inside["again"] = inside
    torch.save({"model": inside}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"file\.pth: holds dictionaries more than 32 deep, or one that holds itself"):
        read_state(tmp_path / "file.pth")


def test_what_is_not_json_beside_a_file_says_nothing_of_the_input(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for text in ("{", "[]", 9999 * "[", '{"pretrained_cfg": ' + 9999 * "["):
        (tmp_path / "config.json").write_text(text)
        assert read_state(tmp_path).metadata == {}


def test_what_is_no_file_of_weights_is_a_line(tmp_path):
    (tmp_path / "text").write_text("import torch")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("absent", "no such file"),
        ("text", "neither safetensors nor a file of torch.save"),
        ("empty.pth", "holds no tensors"),
        ("run", "start from it with init_from="),
        ("folder", "a folder without model.safetensors or pytorch_model.bin"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            read_state(tmp_path / name)
