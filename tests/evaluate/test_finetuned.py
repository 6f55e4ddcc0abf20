"""`largescale finetune` writes the network that `largescale evaluate` measures, whole or not at all.

Covers: largescale/evaluate/own_classifier.py, largescale/evaluate/classifier_files.py, largescale/run/teacher.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from largescale.cli import main
from largescale.config import load_config, to_yaml
from largescale.data.corpora import open_corpus
from largescale.evaluate import finetuned, own_classifier
from largescale.evaluate.classifier_files import write_own_classifier
from largescale.evaluate.extract import extract
from largescale.evaluate.finetuned import finetune
from largescale.evaluate.image_training import accuracies
from largescale.evaluate.targets import target_at
from largescale.evaluate.weights import method_of
from largescale.methods import Method
from largescale.models.image_classifier import checksum, read_classifier
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT, run_python

pytestmark = pytest.mark.slow
KEYS = ("backbone", "stem", "depths", "width", "block")
SHARE = ["evaluate.low_shot_finetune_share=0.2", "evaluate.low_shot_finetune_epochs=2"]
SETTINGS = [*SHARE, "evaluate.low_shot_finetune_head_layers=1", "evaluate.low_shot_finetune_batch=20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, held_out_shards) -> Path:
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    shards = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", f"run.dir={folder}"]
    settings = ["train.precision=fp32", "train.steps=4", "evaluate.resize=16", "evaluate.size=16"]
    assert main(["pretrain", str(ROOT / "tests/tiny.yaml"), *shards, *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def written(run) -> Path:
    path = run.parent / "teacher.safetensors"
    assert main(["finetune", str(run), str(path), *SETTINGS]) == 0
    return path


def test_what_is_written_is_what_is_measured(run, written, held_out_shards, capsys):
    found = read_classifier(written)
    with torch.no_grad():
        network = found.load()
        config = target_at(run).read([], lambda checkpoint, config, lines: config)
        scores = extract(open_corpus(str(held_out_shards), config.data), config, {"it": network}, torch.device("cpu"))
    assert found.head_layers == ["linear 16 16", "batchnorm 16 scale", "relu", "linear 16 10 bias"]
    assert main(["evaluate", "low-shot-finetune", str(run), *SETTINGS, "evaluate.baselines=false"]) == 0
    record = json.loads((run / "eval/low-shot-finetune.json").read_text())
    expected = record["results"]["pretrained"]
    assert accuracies(scores["it"])["top1"] == expected["top1"] and expected["num_train"] == 40
    done = finetuned.finetune(run, run.parent / "again.safetensors", overrides=SETTINGS)
    assert (float(done.about["top1"]), done.about["num_train"]) == (expected["top1"], "40")
    assert checksum(done.path) == checksum(written)
    assert "fine-tuned on 40 images; top-1 " in str(done)
    assert not (run / "eval/unfinished").exists()


def test_all_labels_and_no_layer_of_the_head(run):
    path = run.parent / "all.safetensors"
    epochs = ["evaluate.finetune_epochs=1", "evaluate.finetune_batch=40"]
    assert main(["finetune", str(run), str(path), "--protocol", "finetune", *epochs]) == 0
    assert read_classifier(path).head_layers == ["linear 16 10 bias"]


def test_images_of_one_class_are_refused_before_a_training(run, sample_images, tmp_path, capsys):
    source = sorted((sample_images / "test").iterdir())[0]
    shutil.copytree(source, tmp_path / "images" / source.name)
    run_python("-m", "shards", "convert", tmp_path / "images", tmp_path / "one", "--labels", "folder")
    words = [f"evaluate.train_shards={tmp_path / 'one'}", f"data.eval_shards={tmp_path / 'one'}", *SETTINGS]
    assert main(["finetune", str(run), str(tmp_path / "teacher.safetensors"), *words]) == 2
    assert "one: has 1 class; a classifier tells at least 2 apart" in capsys.readouterr().err
    assert not (tmp_path / "teacher.safetensors").exists()


def test_it_is_a_teacher_and_a_file_of_weights(run, written, shard_folder, held_out_shards, capsys):
    """Its student is measured by its own classifier; a run without one is refused."""
    student, eval_shards = run.parent / "student", f"data.eval_shards={held_out_shards}"
    shards = [f"run.dir={student}", f"data.shards={shard_folder}", eval_shards]
    alike = [f"model.{key}={value}" for key, value in vars(read_classifier(written).model).items() if key in KEYS]
    small = ["train.steps=1", "train.global_batch=8", "method.hidden=[16]", "evaluate.resize=16", "evaluate.size=16"]
    recipe = str(ROOT / "configs/small/distillation.yaml")
    labels = ["method.label_weight=0.5", "method.support={classes: 10, images: 1, share: 0.2}"]
    assert main(["distill", str(written), recipe, *shards, *alike, *small, *labels]) == 0
    labelled = [f"evaluate.train_shards={shard_folder}", eval_shards]
    assert main(["evaluate", "knn", str(written), *labelled, "data.workers=0"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "own-classifier", str(student)]) == 0
    assert "top-1, its own classifier" in capsys.readouterr().out
    record = json.loads((student / "eval/own-classifier.json").read_text())
    assert (record["num_train"], record["num_test"], record["warnings"]) == (0, 100, [])
    assert set(record["results"]) == {"pretrained", "untrained"}
    assert main(["evaluate", "own-classifier", str(run)]) == 2
    assert "own-classifier: a SwAV run classifies nothing by itself" in capsys.readouterr().err

    again = [*alike, *small, shards[1], eval_shards, f"run.dir={run.parent / 'grandchild'}"]
    assert main(["distill", str(student), recipe, *again]) == 0  # a student teaches another
    [file], config = student.glob("classifier-step-00000001-*"), load_config(run.parent / "grandchild/config.yaml")
    assert (config.method.teacher, config.method.teacher_sha256) == (str(file), checksum(file))
    method, images = method_at(student), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(read_classifier(file).load()(images), method.classify(images))
    before = file.read_bytes()
    file.unlink()
    assert main(["distill", str(student), recipe, *again]) == 0 and file.read_bytes() == before
    as_larger = load_config(student / "config.yaml", ["evaluate.size=20", "evaluate.resize=20"])
    (student / "config.yaml").write_text(to_yaml(as_larger))  # as a run that goes on with these
    assert write_own_classifier(student) != file and file.read_bytes() == before
    assert len(list(student.glob("classifier-*"))) == 2
    (student / "status.json").write_text(json.dumps({"state": "stopped", "step": 0, "steps": 1}))
    for place, says in (
        (run, "a SwAV run classifies nothing by itself; `largescale finetune"),
        (student, "stopped, 0"),
    ):
        capsys.readouterr()
        assert main(["distill", str(place), recipe, *again]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said


def method_at(run: Path) -> Method:
    return target_at(run).read([], lambda checkpoint, config, lines: method_of(config, checkpoint))


def test_the_accuracy_of_a_classifier_is_that_of_its_scores(run, written, held_out_shards, monkeypatch):
    config = target_at(run).read([], lambda checkpoint, config, lines: config)
    network = read_classifier(written).load()
    corpus = open_corpus(str(held_out_shards), config.data)

    class Student(torch.nn.Module):
        class_names = tuple(corpus.manifest.classes)
        classify = network.forward

    monkeypatch.setattr(own_classifier, "method_of", lambda *_, **__: Student())
    config.evaluate.baselines = False
    found = own_classifier.by_own_classifier(
        own_classifier.measure, SimpleNamespace(config=config, shards=(corpus, corpus), weights=None)
    )
    again = finetuned.finetune(run, run.parent / "again.safetensors", overrides=SETTINGS)
    assert found.results["pretrained"]["top1"] == float(again.about["top1"]) and found.num_test == 100
    Student.class_names = Student.class_names[::-1]
    with pytest.raises(InputError, match="its 10 classes are not the 10 that this run tells apart"):
        own_classifier.by_own_classifier(
            own_classifier.measure, SimpleNamespace(config=config, shards=(corpus, corpus), weights=None)
        )


@pytest.mark.parametrize(
    "words, expected",
    [
        (["OUT", "--protocol", "linear"], "--protocol linear: expected one of low-shot-finetune, finetune"),
        (["teacher.pt"], "teacher.pt: expected an output file ending in .safetensors"),
        (["OUT", "evaluate.finetune_epochs=1"], "used by `largescale evaluate finetune` alone"),
        (["OUT", "evaluate.low_shot_finetune_head_layers=3"], "its head has 2 linear layers"),
        (["OUT", "data.eval_shards=nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_said_in_a_line_and_leave_no_file(run, tmp_path, words, expected, capsys):
    out = tmp_path / "out.safetensors"
    capsys.readouterr()
    assert main(["finetune", str(run), *(str(out) if word == "OUT" else word for word in words)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert expected in said[-1] and said[-1].startswith("error: ") and not any(tmp_path.iterdir())


def test_what_changes_nothing_and_what_makes_numbers_look_better_is_said(run, tmp_path, shard_folder, caplog):
    out = tmp_path / "other.safetensors"
    overrides = [*SETTINGS, "optim.lr=1", f"data.eval_shards={shard_folder}"]
    with caplog.at_level("WARNING"):
        finetune(run, out, overrides=overrides)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("optim.lr=1 has no effect") for line in said)
    assert any("the accuracy is inflated" in line for line in said)
