"""Weights that others published, in place of a run.

Covers: largescale/evaluate/subject.py, largescale/evaluate/weights.py
"""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import largescale
from largescale.cli import main
from largescale.data.centre_crops import centre_crop
from largescale.data.corpora import open_corpus
from largescale.data.decode import decode
from largescale.data.reader import ShardReader
from largescale.evaluate import finetuned
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.protocols import PROTOCOLS
from largescale.evaluate.published import any_target_at, check_names
from shards.ground.errors import InputError
from tests.helpers.networks import narrow_resnet

SIZES = ["evaluate.resize=32", "evaluate.size=32", "data.workers=0"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "narrow.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in narrow_resnet().state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def places(file, shard_folder, held_out_shards) -> list[str]:
    return [f"evaluate.train_shards={shard_folder}", f"data.eval_shards={held_out_shards}", *SIZES]


def test_a_file_is_measured_with_its_baselines(file, places, held_out_shards, capsys):
    assert main(["evaluate", "knn", str(file), *places]) == 0
    assert capsys.readouterr().out.count("top-1") == 3
    folder = file.with_name("narrow.pth.evaluated")
    record = json.loads((folder / "eval/knn.json").read_text())
    assert set(record["results"]) == {"pretrained", "untrained", "pixels"}
    assert record["made_from"]["weights"]["file"] == "narrow.pth" and record["checkpoint_step"] is None
    assert "method.name" not in record["made_from"]["network"] and not record["warnings"]

    found = FeatureSet.load(folder / "eval/features/pretrained-test.safetensors").features
    config = any_target_at(file, places).agreed(places)[1]
    reader = ShardReader([open_corpus(str(held_out_shards), config.data)])
    images = torch.stack([centre_crop(decode(reader.read(n), max_pixels=2**20), 32, 32) for n in range(100)])
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = narrow_resnet()
    theirs.fc = nn.Identity()
    with torch.no_grad():
        assert torch.allclose(theirs((images / 255 - mean) / std), found, rtol=1e-4, atol=1e-5)


def test_files_stand_in_one_table_and_results_go_where_run_dir_says(file, places, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    sizes = {"input_size": "[3, 28, 28]", "resize": "30"}
    save_file({name: value + 0.01 for name, value in narrow_resnet().state_dict().items() if value.ndim}, other, sizes)
    words = [
        places[1],
        "data.workers=0",
        "evaluate.baselines=false",
        f"run.dir={tmp_path / 'out'}",
    ]  # no training images
    assert main(["evaluate", "retrieval", str(file), str(other), *SIZES, *words]) == 0
    _, head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "step"] and first.split()[:2] == [str(file), "-"] and str(other) in second
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["narrow.pth", "other.safetensors"]
    record = json.loads((tmp_path / "out/narrow.pth/eval/retrieval.json").read_text())
    assert (record["num_train"], record["num_test"], record["warnings"]) == (0, 100, [])
    config = any_target_at(other, words).agreed(words)[1]
    assert (config.evaluate.resize, config.evaluate.size) == (30, 28)


@pytest.mark.parametrize("protocol", ["own-task", "own-classifier"])
def test_a_file_is_said_to_be_one_where_a_run_is_needed(file, places, tmp_path, capsys, protocol):
    words = [places[1], "data.workers=0", f"run.dir={tmp_path}"]
    assert main(["evaluate", protocol, str(file), *SIZES, *words]) == 2
    assert f"error: {protocol}: narrow.pth, a file of weights, " in capsys.readouterr().err


def test_files_of_one_name_do_not_share_a_folder(places, tmp_path, capsys, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(b"not read")
    monkeypatch.chdir(tmp_path)
    words = [*places, f"run.dir={tmp_path / 'out'}"]
    assert main(["evaluate", "knn", "a/model.safetensors", "b/model.safetensors", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a/model.safetensors and b/model.safetensors: both results would go into the folder")
    assert not (tmp_path / "out").exists()
    check_names(["a/model.safetensors", "b/model.safetensors"], places)  # results are beside each
    check_names(["a/model.safetensors", "a/../a/model.safetensors", "b"], words)  # the same file; a folder, named b
    with pytest.raises(InputError, match=r"^b and b/\.\./c/b: both results would go into the folder b below run.dir"):
        (tmp_path / "c/b").mkdir(parents=True)
        (tmp_path / "c/b/model.safetensors").touch()
        check_names(["b", "b/../c/b"], words)


def test_features_of_a_file_are_written_like_those_of_a_run(file, held_out_shards, tmp_path, capsys):
    words = ["features", str(file), str(held_out_shards), str(tmp_path / "out"), *SIZES]
    assert main([*words, "--assign"]) == 2
    assert "read without its heads; leave it out" in capsys.readouterr().err
    assert main(words) == 0
    assert "64 numbers per image, " in capsys.readouterr().out


def test_a_network_is_trained_on_from_a_file_and_one_that_is_done_is_not_trained_again(
    file, places, monkeypatch, capsys
):
    words = [*places, "evaluate.finetune_epochs=1"]
    done, measure = [], PROTOCOLS["finetune"].measure

    def killed(trial, config):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(measure(trial, config))
        return done[-1]

    monkeypatch.setitem(PROTOCOLS, "finetune", replace(PROTOCOLS["finetune"], measure=killed))
    with pytest.raises(KeyboardInterrupt):
        largescale.evaluate("finetune", file, overrides=words)
    folder = file.with_name("narrow.pth.evaluated") / "eval/unfinished"
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    monkeypatch.setitem(PROTOCOLS, "finetune", replace(PROTOCOLS["finetune"], measure=lambda *_: {"top1": 0.25}))
    (record,) = largescale.evaluate("finetune", file, overrides=words)
    assert record["results"]["pretrained"]["top1"] == done[0]["top1"]
    assert record["results"]["untrained"]["top1"] == 0.25 and not folder.exists()


def test_stages_stand_in_a_table(file, places, capsys):
    words = [*places, "evaluate.layers_epochs=1", "evaluate.baselines=false"]
    assert main(["evaluate", "layers", str(file), *words]) == 0
    headline, _, *stages = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in stages[:4]] == [["stage", str(number)] for number in (1, 2, 3, 4)]
    assert stages[4].split()[0] == "features" and stages[4].split()[1] in headline


def torn(path: Path, file: Path) -> None:
    path.write_bytes(file.read_bytes()[:-3000])


def words_of_a_pickle(path: Path, file: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": Path("x")}, protocol=2))


@pytest.mark.parametrize(
    "make, overrides, line",
    [
        (torn, [], "not a whole file of torch.save"),
        (words_of_a_pickle, [], "besides tensors, which is not loaded, since it could run code"),
        (lambda path, _: path.write_bytes(b""), [], "an empty file"),
        (lambda path, _: path.write_text("name: run"), [], "neither safetensors nor a file of torch.save"),
        (lambda path, _: torch.save({"a": torch.ones(2)}, path), [], "no ResNet, RegNet or VGG in a known layout"),
        (lambda path, _: path.mkdir(), [], "no run here (config.yaml is missing)"),
        (lambda path, _: None, [], "no run here (config.yaml is missing)"),
        (lambda path, file: path.hardlink_to(file), ["model.backbone=resnet18"], "not a resnet18: "),
        (lambda path, file: path.hardlink_to(file), ["evaluate.knn_neighbours=[0]"], "evaluate.knn_neighbours"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(file, places, tmp_path, capsys, make, overrides, line):
    path = tmp_path / "x.pth"
    make(path, file)
    assert main(["evaluate", "knn", str(path), *places, *overrides]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and line in last, last


def test_a_stem_that_tensors_do_not_tell_is_that_of_the_user(places, tmp_path, caplog, capsys):
    file, state = tmp_path / "cifar.pth", narrow_resnet().state_dict()
    torch.save(state | {"conv1.weight": torch.randn(len(state["conv1.weight"]), 3, 3, 3)}, file)
    guessed = any_target_at(file, places)
    assert "its 3x3 stem is taken to have stride 2" in caplog.text and "pass model.stem=3x3" in caplog.text
    caplog.clear()
    told = any_target_at(file, [*places, "model.stem=3x3"])
    assert "stride" not in caplog.text
    images = torch.randn(2, 3, 32, 32)
    maps = [target.weights.found.backbone.stem(images) for target in (guessed, told)]
    assert [one.shape[-1] for one in maps] == [16, 32]
    assert guessed.weights.content_hash != told.weights.content_hash  # features of one are not those of the other
    words = ["evaluate", "knn", str(file), *places, "model.stem=3x3"]
    assert main(words) == 0
    assert main([*words, "model.width=64"]) == 2
    with pytest.raises(InputError):
        any_target_at(file, [*places, "model.stem=imagenet"])


def test_a_stem_that_is_known_is_not_replaced_by_one_of_the_same_shapes(places, tmp_path):
    file = tmp_path / "regnet.pth"
    torch.save(torchvision.models.regnet_y_400mf().state_dict(), file)
    assert any_target_at(file, places).weights.found.model.stem == "imagenet"
    with pytest.raises(InputError, match=r"model.stem or another setting of model is not that of the file"):
        any_target_at(file, [*places, "model.stem=3x3"])


def test_run_dir_has_an_effect_on_what_is_finetuned_from_a_file(file, places, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(finetuned, "_trained", lambda *_: None)
    words = [*places, f"run.dir={tmp_path / 'there'}", "optim.lr=1"]
    finetuned.finetune(file, tmp_path / "out.safetensors", overrides=words)
    assert (tmp_path / "there" / "narrow.pth").is_dir()
    assert "optim.lr=1 has no effect" in caplog.text and "run.dir" not in caplog.text


def test_shards_must_be_named(file, places, capsys):
    for left, line in ((places[1:], "evaluate.train_shards is not set"), (places[:1], "data.eval_shards is not set")):
        assert main(["evaluate", "knn", str(file), *left]) == 2
        assert line in capsys.readouterr().err
