"""`largescale evaluate` and `report` on a real small run.

Covers: largescale/evaluate/feature_set.py, largescale/evaluate/measure.py, largescale/evaluate/protocols.py,
largescale/evaluate/table_of_runs.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import largescale
from largescale.cli import main
from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.data.decode import decode
from largescale.data.reader import ShardReader
from largescale.evaluate import measure, table_of_runs
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.headline import headlines
from largescale.evaluate.measure import evaluate
from largescale.report.evaluated import both_parts
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, held_out_shards) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    overrides = [
        f"data.shards={shard_folder}",
        f"data.eval_shards={held_out_shards}",
        f"run.dir={folder}",
        "train.precision=fp32",
        "data.mean=[0.3, 0.3, 0.3]",
        "data.std=[0.3, 0.3, 0.3]",
    ]
    assert main(["pretrain", str(ROOT / "tests/tiny.yaml"), *overrides]) == 0
    assert main(["evaluate", "knn", str(folder)]) == 0
    assert main(["evaluate", "linear", str(folder)]) == 0
    return folder


def test_results_name_every_network_and_setting(run):
    for protocol in ("knn", "linear"):
        record = json.loads((run / "eval" / f"{protocol}.json").read_text())
        assert (record["num_train"], record["num_test"], record["checkpoint_step"]) == (200, 100, 14)
        assert set(record["results"]) == {"pretrained", "untrained", "pixels"}
        assert all(0.1 < result["top1"] < 1 for result in record["results"].values())
    knn = json.loads((run / "eval/knn.json").read_text())["results"]["pixels"]
    assert set(knn["top1_by_k"]) == {"5", "20"} and knn["top1"] == knn["top1_by_k"]["20"]
    assert json.loads((run / "eval/knn.json").read_text())["settings"]["knn_temperature"] == 0.07


def test_features_are_those_of_the_labelled_images_in_order(run):
    features = FeatureSet.load(run / "eval/features/pixels-test.safetensors")
    assert features.features.shape == (100, 28 * 28)  # grey images: one channel
    assert torch.equal(features.ids, torch.arange(100))
    assert torch.bincount(features.labels).tolist() == [10] * 10
    trained = FeatureSet.load(run / "eval/features/pretrained-test.safetensors").features
    untrained = FeatureSet.load(run / "eval/features/untrained-test.safetensors").features
    assert trained.shape == (100, 16) and not torch.allclose(trained, untrained)


def test_the_table_names_what_was_measured(run, capsys):
    before = (run / "eval/features/pretrained-test.safetensors").stat().st_mtime_ns
    assert main(["evaluate", "knn", str(run), "evaluate.knn_neighbours=[3]"]) == 0
    text = capsys.readouterr().out
    for line, name in zip(
        text.splitlines(), ("pretrained network", "same network, untrained", "raw pixels"), strict=True
    ):
        assert name in line and "top-1" in line
    assert (run / "eval/features/pretrained-test.safetensors").stat().st_mtime_ns == before  # made once


def test_what_the_method_assigns_images_to_is_measured_beside_k_means(run, capsys):
    assert main(["evaluate", "clusters", str(run), "evaluate.clusters_starts=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("NMI")[0].split(" nmi ")[0].split(maxsplit=1)[1].strip() for line in lines] == [
        "pretrained network",
        "same network, untrained",
        "raw pixels",
        "pretrained network, prototypes",
        "same network, untrained, prototypes",
    ]
    results = json.loads((run / "eval/clusters.json").read_text())["results"]
    assert 0 <= results["pretrained"]["by_prototype"]["nmi"] < 1 and "by_prototype" not in results["pixels"]


def test_baselines_are_compared_on_the_same_images(run):
    for protocol in ("knn", "linear"):
        results = json.loads((run / "eval" / f"{protocol}.json").read_text())["results"]
        for network in ("untrained", "pixels"):
            found = results[network]["against_pretrained"]
            by = (found["only_pretrained"] - found["only_this"]) / 100
            assert by == pytest.approx(results["pretrained"]["top1"] - results[network]["top1"])
            assert 0 < found["p"] <= 1 and "hits" not in results[network]
        assert "hits" not in results["pretrained"]


def test_another_image_size_makes_new_features(run):
    before = (run / "eval/features/pixels-test.safetensors").read_bytes()
    assert main(["evaluate", "knn", str(run), "evaluate.resize=20", "evaluate.size=16"]) == 0
    assert FeatureSet.load(run / "eval/features/pixels-test.safetensors").features.shape == (100, 16 * 16)
    assert main(["evaluate", "knn", str(run)]) == 0
    assert (run / "eval/features/pixels-test.safetensors").read_bytes() == before


def test_a_loaded_network_gives_the_features_of_the_evaluation(run, held_out_shards):
    assert main(["evaluate", "knn", str(run)]) == 0
    network = largescale.load(run)
    reader = ShardReader([open_corpus(str(held_out_shards), network.config.data)])
    images = torch.stack([network.prepare(decode(reader.read(number), max_pixels=2**20)) for number in range(100)])
    expected = FeatureSet.load(run / "eval/features/pretrained-test.safetensors").features
    assert torch.allclose(network.encode(images), expected, rtol=1e-5, atol=1e-6)


def test_several_runs_and_checkpoints_give_one_table_and_an_older_one_is_not_the_run_s_result(run, capsys):
    older = run / "checkpoints/step-00000010"
    assert main(["evaluate", "knn", str(run), str(older), "evaluate.baselines=false"]) == 0
    title, head, newest, old = capsys.readouterr().out.splitlines()
    assert title == "knn, top-1, 100 test images of test" and head.split() == ["run", "step", "pretrained", "network"]
    assert newest.split()[:2] == [str(run), "14"] and old.split()[:2] == [str(older), "10"]
    shares = [float(line.split()[2].rstrip("%")) for line in (newest, old)]
    assert json.loads((run / "eval/knn.json").read_text())["checkpoint_step"] == 14
    records = largescale.evaluate("knn", run, older, overrides=["evaluate.baselines=false"])
    assert [round(100 * one["results"]["pretrained"]["top1"], 2) for one in records] == shares
    low, high = records[0]["results"]["pretrained"]["interval"]
    assert 0 < low < records[0]["results"]["pretrained"]["top1"] < high < 1


def test_an_evaluation_does_not_round_to_tf32_as_torch_would_on_a_gpu(run):
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn

    def allowed() -> tuple[bool, bool]:
        return products.allow_tf32, convolutions.allow_tf32

    before, seen = allowed(), set()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.add(allowed()))
    products.allow_tf32 = convolutions.allow_tf32 = True
    try:
        words = ["evaluate.baselines=false", "evaluate.size=20"]  # of which no features are kept yet
        largescale.evaluate("knn", run / "checkpoints/step-00000010", overrides=words)
        assert seen == {(False, False)} and allowed() == (True, True)
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
        hook.remove()


@pytest.mark.parametrize(
    "words, line",
    [
        (["knn", "RUN/checkpoints/step-00000011"], "no whole checkpoint here; RUN has step-00000014, step-00000010"),
        (["knn", "RUN/checkpoints"], "RUN/checkpoints: no run here"),
        (["knn", "RUN", "RUN/eval"], "RUN/eval: no run here"),
        (["linear", "RUN", "evaluate.knn_temperature=1"], "used by `largescale evaluate knn` alone"),
        (["knn", "RUN", "evaluate.knn_temperatur=1"], "did you mean evaluate.knn_temperature"),
        (["knn", "RUN", "model.width=16"], "RUN/checkpoints/step-00000014"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(run, capsys, words, line):
    assert main(["evaluate", *(word.replace("RUN", str(run)) for word in words)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and line.replace("RUN", str(run)) in last


def test_several_protocols_get_the_settings_that_are_theirs(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(measure, "evaluate", lambda protocol, run, overrides: called.append((protocol, overrides)))
    monkeypatch.setattr(table_of_runs, "table", lambda places, records: "")
    given = ["evaluate.knn_temperature=1", "evaluate.linear_epochs=3", "data.workers=0"]
    assert main(["evaluate", "knn,linear", "runs/a", *given]) == 0
    assert called == [("knn", [given[0], given[2]]), ("linear", given[1:])]
    called.clear()
    of_training = ["data.augment.blur=0", "evaluate.batch=8", "optim.lr=1"]  # a task of its own uses the first
    assert main(["evaluate", "knn,own-task", "runs/a", *of_training]) == 0
    assert called == [("knn", of_training[1:]), ("own-task", of_training)]
    called.clear()
    assert main(["evaluate", "knn,linear", "runs/a", "evaluate.svm_labels=cls"]) == 2
    said = capsys.readouterr().err
    assert "used by `largescale evaluate svm` alone; the settings of knn itself are evaluate.knn_" in said
    assert "; the settings of linear itself are evaluate.linear_" in said
    assert main(["evaluate", "knn,", "runs/a"]) == 2 and not called
    assert "evaluate knn,: a name is missing before or after a comma" in capsys.readouterr().err


def test_an_accuracy_of_earlier_weights_is_not_that_of_the_run(run, tmp_path, shard_folder):
    later = shutil.copytree(run, tmp_path / "later")
    now = headlines(run)
    assert headlines(later) == now and {"knn", "linear"} <= set(now)
    newest = sorted((later / "checkpoints").iterdir())[-1]
    progress = json.loads((newest / "progress.json").read_text())
    other = shutil.copytree(newest, newest.with_name("step-00000099"))
    (other / "progress.json").write_text(json.dumps({**progress, "step": 99}))
    assert headlines(later) == {}
    shutil.rmtree(later / "checkpoints")  # then there is nothing newer
    assert headlines(later) == now


def test_settings_of_training_have_no_effect_on_an_evaluation_and_that_is_said(run, caplog):
    unused = ["data.augment.flip=0", "data.subset=nowhere.txt", "data.shuffle_window=4", "optim.lr=1"]
    with caplog.at_level("WARNING"):
        evaluate("knn", run, overrides=["evaluate.baselines=false", "data.workers=0", *unused])
    said = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert [line.split(" has")[0] for line in said] == unused
    assert "unless it trains on images in a store" in said[2]


def test_features_of_other_classes_are_not_compared(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    path = other / "eval/features/pretrained-test.safetensors"
    features = FeatureSet.load(path)
    replace(features, classes=features.classes[:-1]).save(path, features.made_from)
    config = load_config(other / "config.yaml")
    with pytest.raises(InputError, match="have other classes than training images"):
        both_parts(other, config)
    assert both_parts(other, config, same_classes=False)
