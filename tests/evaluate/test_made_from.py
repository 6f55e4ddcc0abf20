"""Results and features are of what they say: other weights, images or settings never pass for them.

Covers: largescale/evaluate/doubts.py, largescale/evaluate/features.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.checkpoint.folder import Checkpoint
from largescale.cli import main
from largescale.config import DataConfig, flatten, load_config
from largescale.data.corpora import Corpus, open_corpus
from largescale.evaluate import doubts as doubts_module
from largescale.evaluate.classifier_files import about_network
from largescale.evaluate.doubts import doubts, in_shared_shards, num_shared, shared_samples
from largescale.evaluate.extract import can_be_read, extract, pixels
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.image_training import labels_of
from largescale.evaluate.made_from import difference, identity, network_stamp, result_stamp, shards_stamp, weights_stamp
from largescale.evaluate.protocols import PROTOCOLS
from largescale.evaluate.results import read_results
from largescale.evaluate.weights import Published
from largescale.report import evaluation, images
from largescale.report.reported_run import read_runs
from shards.format.manifest import read_manifest, write_manifest
from shards.format.shard_index import read_index, write_index
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT, run_python
from tests.helpers.servers import web_server


def checkpoint(step: int, digest: str) -> Checkpoint:
    return Checkpoint(Path("unused"), {"step": step, "files": {"a.safetensors": {"size": 3, "sha256": digest}}})


def test_weights_of_the_same_step_are_told_apart_by_their_content():
    one, same, other = (weights_stamp(checkpoint(14, digest)) for digest in ("aa", "aa", "ab"))
    assert one == same and one["step"] == 14
    assert "hash was sha256:" in difference({"weights": one}, {"weights": other})
    assert identity({"weights": one}) != identity({"weights": other})


def test_results_of_a_file_say_by_which_head_it_was_measured():
    config, shards = load_config(ROOT / "tests/mini.yaml"), {"fingerprint": "f"}
    found = SimpleNamespace(path=Path("file.ckpt"), sha256="aa")
    heads = [None, *(torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU()) for width in (4, 6))]
    stamps = [
        result_stamp(config, Published(SimpleNamespace(**vars(found), projection=head)), shards, shards)  # type: ignore[arg-type]
        for head in heads
    ]
    assert len({identity(stamp) for stamp in stamps}) == 3
    assert stamps[1]["network"]["head"] == ["linear 8 4 bias", "relu"] and "head" not in stamps[0]["network"]


def test_what_was_measured_before_a_setting_came_still_counts():
    config, weights = load_config(ROOT / "tests/mini.yaml"), checkpoint(1, "aa")
    assert "model.pool" not in network_stamp(config, weights)
    assert "model.pool" not in json.loads(about_network(config, weights, 16, [])["config"])
    config.model.pool = 2
    assert network_stamp(config, weights)["model.pool"] == 2
    assert json.loads(about_network(config, weights, 64, [])["config"])["model.pool"] == 2


def test_protocols_that_draw_views_say_of_which():
    shards, weights = {"fingerprint": "f"}, checkpoint(1, "aa")
    configs = [load_config(ROOT / "tests/mini.yaml", [f"data.augment.flip={value}"]) for value in (0.25, 0.75)]
    for protocol, told in {"own-task": 2, "spectrum": 2, "knn": 1}.items():
        also = PROTOCOLS[protocol].depends_on
        stamps = [result_stamp(config, weights, shards, shards, depends_on=also) for config in configs]
        assert len({identity(stamp) for stamp in stamps}) == told, protocol
        assert ("method.hidden" in stamps[0].get("settings", {})) == (protocol == "own-task")


def test_the_stamp_of_shards_is_of_their_images_and_labels_not_of_their_place(held_out_shards, tmp_path):
    stamp = shards_stamp(Corpus(read_manifest(held_out_shards)), str(held_out_shards))
    assert (stamp["samples"], stamp["classes"], stamp["name"]) == (100, 10, "test")
    moved = shutil.copytree(held_out_shards, tmp_path / "moved")
    assert difference(stamp, shards_stamp(Corpus(read_manifest(moved)), str(moved))) == ""
    # The same tars with other labels: an index that was made again.
    manifest = read_manifest(moved)
    path = manifest.index_path(0)
    index = read_index(path)
    write_index(replace(index, label=np.roll(index.label, 1)), path)
    write_manifest(replace(manifest, shards=tuple(replace(shard, index_checksum="") for shard in manifest.shards)))
    other = shards_stamp(Corpus(read_manifest(moved)), str(moved))
    assert other["fingerprint"] == stamp["fingerprint"] and "labels" in difference(stamp, other)


def test_shared_images_are_counted_however_the_shards_are_cut(sample_images, shard_folder, held_out_shards, tmp_path):
    cut = tmp_path / "cut"
    run_python(
        "-m",
        "shards",
        "convert",
        sample_images / "test",
        cut,
        "--labels",
        "folder",
        "--shuffle",
        "3",
        "--samples-per-shard",
        "33",
        "--workers",
        "1",
    )
    train, test, again = (Corpus(read_manifest(folder)) for folder in (shard_folder, held_out_shards, cut))
    assert num_shared(test, test) == num_shared(test, again) == 100
    assert num_shared(train, test) == 0
    assert in_shared_shards(test.manifest, again.manifest).sum() == 0  # what tars alone would say
    assert in_shared_shards(test.manifest, test.manifest).sum() == 100
    for pretraining, expected in (
        (cut, "100 of the test images are among those the network was pretrained on"),
        (shard_folder, None),
        (tmp_path / "gone", None),
    ):
        config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={pretraining}"])
        assert [line.split(" (")[0] for line in doubts(config, (train, test))] == [expected] * bool(expected)


def test_shards_of_the_pretraining_are_those_that_the_checkpoint_names(shard_folder, held_out_shards, tmp_path):
    train, test = (Corpus(read_manifest(folder)) for folder in (shard_folder, held_out_shards))
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={shard_folder}"])
    for place, num in ((held_out_shards, 1), (shard_folder, 0)):
        trained = flatten(load_config(ROOT / "tests/tiny.yaml", [f"data.shards={place}"]))
        weights = Checkpoint(Path("unused"), {"step": 3, "config": trained})
        assert len(doubts(config, (train, test), weights)) == num
    moved = flatten(load_config(ROOT / "tests/tiny.yaml", [f"data.shards={tmp_path / 'gone'}"]))
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={held_out_shards}"])
    assert len(doubts(config, (train, test), Checkpoint(Path("unused"), {"step": 3, "config": moved}))) == 1


def test_images_that_the_pretraining_left_out_are_not_shared_and_none_is_counted_twice(
    shard_folder, held_out_shards, tmp_path
):
    rows = [np.arange(30), np.arange(20, 50)]
    for number, chosen in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", chosen)
    train, test = (Corpus(read_manifest(folder)) for folder in (shard_folder, held_out_shards))
    assert shared_samples(replace(test, subset=rows[1]), test).nonzero()[0].tolist() == [*range(20, 50)]
    places = held_out_shards, shutil.copytree(held_out_shards, tmp_path / "again")
    listed = [f"{{path: {place}, subset: {tmp_path}/{number}.npy}}" for number, place in enumerate(places)]
    for some, num in ((listed[:1], 30), (listed, 50)):
        config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards=[{', '.join(some)}]"])
        [line] = doubts(config, (train, test))
        assert line.startswith(f"{num} of the test images are among those the network was pretrained on")


def test_a_subset_of_very_many_images_is_neither_read_nor_compared_by_whole_tars(
    shard_folder, held_out_shards, tmp_path, monkeypatch
):
    train, test = (Corpus(read_manifest(folder)) for folder in (shard_folder, held_out_shards))
    np.save(tmp_path / "rows.npy", np.arange(30))
    listed = f"data.shards=[{{path: {held_out_shards}, subset: {tmp_path}/rows.npy}}]"
    config = load_config(ROOT / "tests/tiny.yaml", [listed])
    monkeypatch.setattr(doubts_module, "_MOST_COMPARED", 10)
    monkeypatch.setattr(doubts_module, "read_subset", lambda *_: pytest.fail("read for nothing"))
    assert doubts(config, (train, test)) == []
    whole = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={held_out_shards}"])
    assert len(doubts(whole, (train, test))) == 1


def test_indexes_in_a_store_are_fetched_to_read_labels(held_out_shards, tmp_path):
    with web_server(held_out_shards) as web:
        far = open_corpus(web.url, DataConfig(shards=web.url, cache=str(tmp_path)))
        expected = labels_of(open_corpus(str(held_out_shards), DataConfig(shards="unused")))
        assert torch.equal(labels_of(far), expected) and len(expected) == 100


def test_features_that_are_not_numbers_are_refused(held_out_shards):
    config = load_config(ROOT / "tests/tiny.yaml", ["data.shards=unused"])
    corpus = Corpus(read_manifest(held_out_shards))
    broken = {"pretrained": lambda images: images.flatten(1) / 0 * 0}
    with pytest.raises(InputError, match="features of the pretrained network are not finite on 100 of 100 images"):
        extract(corpus, config, broken, torch.device("cpu"))


def test_features_without_an_image_that_can_be_read_again_are_stale(held_out_shards, tmp_path):
    folder = shutil.copytree(held_out_shards, tmp_path / "damaged")
    config = load_config(ROOT / "tests/tiny.yaml", ["data.shards=unused"])
    corpus = Corpus(read_manifest(folder))
    tar = corpus.manifest.tar_path(0)
    good = tar.read_bytes()
    bad = bytearray(good)
    bad[bad.index(b"IDAT") + 9] ^= 1
    tar.write_bytes(bad)
    ids = extract(corpus, config, {"pixels": pixels}, torch.device("cpu"))["pixels"].ids
    assert len(ids) == 99 and not can_be_read(corpus, config, ids)
    tar.write_bytes(good)
    assert can_be_read(Corpus(read_manifest(folder)), config, ids)
    assert not can_be_read(corpus, config, torch.arange(100))


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, held_out_shards) -> SimpleNamespace:
    """A run that was evaluated on its shards; `train` and `evaluate` do it again with other settings."""
    folder = tmp_path_factory.mktemp("stamped") / "run"
    recipe = [
        str(ROOT / "tests/tiny.yaml"),
        f"data.shards={shard_folder}",
        f"data.eval_shards={held_out_shards}",
        f"run.dir={folder}",
        "train.precision=fp32",
        "train.steps=4",
        "data.audit=false",
    ]

    def train(*overrides: str) -> None:
        assert main(["pretrain", *recipe, *overrides]) == 0

    def evaluate(*overrides: str) -> dict:
        assert main(["evaluate", "knn", str(folder), "evaluate.baselines=false", *overrides]) == 0
        return json.loads((folder / "eval/knn.json").read_text())

    train()
    evaluate()
    return SimpleNamespace(path=folder, train=train, evaluate=evaluate, features=folder / "eval/features")


def notes(run_dir: Path) -> str:
    return "\n".join(evaluation.notes(read_runs([run_dir])[0]))


@pytest.mark.slow
def test_test_images_that_are_the_training_images_are_named_in_the_result_and_the_report(run, shard_folder, caplog):
    record = run.evaluate(f"data.eval_shards={shard_folder}")
    assert record["warnings"][0].startswith("all 200 test images are among the labelled training images too")
    assert record["warnings"][0] in caplog.text
    assert record["test_shards"] == record["train_shards"] == str(shard_folder.resolve())
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    assert record["warnings"][0] in page and "200 test images of train" in page
    assert len(read_results(run.path).all) == 2  # the result on the test shards is kept beside it
    again = run.evaluate()
    assert again["warnings"] == [] and again["made_from"]["test_shards"]["name"] == "test"
    assert len(read_results(run.path).all) == 2


@pytest.mark.slow
def test_the_report_shows_no_images_of_shards_that_are_gone_or_others_now(run, held_out_shards, tmp_path):
    away = shutil.copytree(held_out_shards, tmp_path / "away")
    manifest = read_manifest(away)  # other images: without the first shard
    write_manifest(replace(manifest, shards=manifest.shards[1:]))
    run.evaluate(f"data.eval_shards={away}")
    (reported,) = read_runs([run.path])
    assert "of away, network of step 4" in images.sections_of(reported)
    shutil.rmtree(away)
    for there in (None, held_out_shards):
        if there:
            shutil.copytree(there, away)
        page = images.sections_of(reported)
        assert f"The images that were evaluated cannot be shown: those of {away}" in page
        assert 'class="query"' not in page and "What prototypes stand for" in page
    assert "other shards are there now" in page


@pytest.mark.slow
def test_a_result_without_a_stamp_is_refused_and_features_without_one_are_made_again(run, caplog):
    right = run.evaluate("train.steps=3")["results"]
    assert "train.steps=3 has no effect on an evaluation" in caplog.text
    path = run.features / "pretrained-test.safetensors"
    good, features = path.read_bytes(), FeatureSet.load(path)
    path.write_bytes(path.read_bytes()[:-8])  # what a version without atomic writes, or a disk, may leave
    (run.path / "eval/linear.json").write_text(json.dumps({"protocol": "linear", "results": {}}))
    caplog.clear()
    assert run.evaluate()["results"] == right
    assert "recomputing the features of pretrained-test in" in caplog.text
    assert path.read_bytes() == good
    replace(features, features=torch.zeros_like(features.features)).save(path, {})  # no stamp
    assert run.evaluate()["results"] == right and path.read_bytes() == good
    assert "Not shown: eval/linear.json, changed or damaged since" in notes(run.path)
    (run.path / "eval/linear.json").unlink()


@pytest.mark.slow
def test_normalisation_is_part_of_the_stamp_and_an_edited_config_is_not_believed(run):
    before = run.evaluate()
    path = run.features / "pretrained-test.safetensors"
    features = path.read_bytes()
    other = run.evaluate("data.mean=[0.9,0.9,0.9]", "data.std=[0.01,0.01,0.01]")
    assert path.read_bytes() != features and other["made_from"]["images"]["mean"] == [0.9] * 3
    config = run.path / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("width: 8", "width: 32"))
    try:
        edited = run.evaluate()
    finally:
        config.write_text(text)
    assert "has model.width=32, but the checkpoint was trained with 8, which is used" in edited["warnings"][0]
    assert edited["results"] == before["results"] and path.read_bytes() == features


@pytest.mark.slow
def test_a_run_begun_again_in_its_folder_is_measured_anew(run):
    before = run.evaluate()
    path = run.features / "pretrained-test.safetensors"
    old = path.read_bytes()
    shutil.copytree(run.path / "eval", run.path.parent / "eval")
    shutil.rmtree(run.path / "checkpoints")
    run.train("run.seed=5", "optim.lr=0.05")
    assert not path.exists()  # set aside with the former run
    shutil.copytree(run.path.parent / "eval", run.path / "eval", dirs_exist_ok=True)  # and brought back by somebody
    assert "measured on other weights than these" in notes(run.path)
    after = run.evaluate()
    new = path.read_bytes()
    assert new != old and after["made_from"]["weights"]["hash"] != before["made_from"]["weights"]["hash"]
    path.unlink()
    run.evaluate()
    assert path.read_bytes() == new
    assert "measured on other weights" not in notes(run.path)
