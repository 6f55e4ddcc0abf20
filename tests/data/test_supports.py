"""Labelled images beside the stream: which they are, whatever the ranks, loaders and stops.

Covers: largescale/config/support_settings.py, largescale/data/few_labels.py, largescale/data/loaded.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.config import MethodConfig, SupportConfig
from largescale.data.corpora import Corpus
from largescale.data.few_labels import LOW_SHOT, by_hash, stratified_rows
from largescale.data.loaded import Batch
from largescale.data.supports import LabelledImages, SupportOrder
from largescale.methods.method import Output
from largescale.run.logs import Logs
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from tests.helpers.streams import make_stream, overwrite

BATCH = 16


@pytest.fixture
def ask(monkeypatch):
    """Let the method ask for supports."""

    def asking(**wanted: object) -> None:
        support = SupportConfig(**{"classes": 8, "images": 4, "views": 2} | wanted)
        monkeypatch.setattr(MethodConfig, "supports", lambda self: support)

    return asking


def labels_of(folder: Path) -> np.ndarray:
    manifest = read_manifest(folder)
    return np.concatenate([read_index(manifest.index_path(number)).label for number in range(len(manifest.shards))])


def ids_and_labels(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    return [(batch.supports.ids.tolist(), batch.supports.labels.tolist()) for batch in batches]


def joined(parts: list[Batch], accumulate: int) -> tuple[list[int], torch.Tensor]:
    """Ids and views of the ranks' parts in the order of places."""
    ids = torch.stack([part.supports.ids.view(accumulate, -1) for part in parts], dim=1)
    views = torch.stack([part.supports.images.unflatten(0, (2, accumulate, -1)) for part in parts], dim=2)
    return ids.flatten().tolist(), views.flatten(1, 3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_ranks_and_loaders_sees_the_same_supports_from_any_step_on(shard_folder, ask, accumulate):
    ask()
    cut = f"train.accumulate={accumulate}"
    whole = list(make_stream(shard_folder)(range(6)))
    for ranks, workers, first in [(1, 1, 3), (2, 0, 2), (4, 1, 3)]:
        streams = [make_stream(shard_folder, cut, f"data.workers={workers}", rank=r, ranks=ranks) for r in range(ranks)]
        for step, *parts in zip(range(first, 6), *(stream(range(first, 6)) for stream in streams), strict=True):
            ids, views = joined(parts, accumulate)
            expected = whole[step].supports
            assert ids == expected.ids.tolist()
            assert torch.equal(views, expected.images.unflatten(0, (2, -1)))
            keys = [key for part in parts for key in part.support_keys]
            assert sorted(keys) == sorted(whole[step].support_keys) and len(keys) == len(ids)


def test_each_step_has_as_many_images_of_each_of_its_classes_and_says_their_place(shard_folder, ask):
    ask()
    labels, seen = labels_of(shard_folder), set()
    for batch in make_stream(shard_folder)(range(12)):
        own = labels[batch.supports.ids]
        classes = np.unique(own)
        assert len(classes) == 8 and (classes[batch.supports.labels] == own).all()
        assert (np.bincount(own, minlength=10)[classes] == 4).all()
        assert len(set(batch.supports.ids.tolist())) == 32
        seen |= {tuple(classes)}
    assert len(seen) > 6


def test_micro_batches_see_every_class(shard_folder, ask):
    ask()
    supports = next(iter(make_stream(shard_folder)(range(1)))).supports
    parts = supports.cut(2)
    for number, part in enumerate(parts):
        assert sorted(part.labels.tolist()) == sorted([*range(8)] * 2)
        rows = slice(16 * number, 16 * number + 16)
        assert part.ids.tolist() == supports.ids[rows].tolist()
        assert torch.equal(part.images.unflatten(0, (2, 16)), supports.images.unflatten(0, (2, 32))[:, rows])


def test_the_order_is_the_naive_loop_and_every_image_comes():
    labels = np.array([0, 1, 2, 1, 0, 2, 2, 1, 3, 0, 1, 1])
    order = SupportOrder(LabelledImages(np.arange(12) + 100, labels), seed=3, classes=3, images=2)
    ids, draws = order.samples(np.arange(50)[:, None])
    alone = [order.samples(step, np.array([place]))[0][0] for step in range(50) for place in range(6)]
    assert ids.flatten().tolist() == alone
    assert set(ids.flatten()) == set(range(100, 112))
    for step, row in enumerate(ids):
        classes = labels[row - 100].reshape(2, 3)
        assert (classes[0] == classes[1]).all() and (np.diff(classes[0]) > 0).all()
        assert all((row[slot] == row[slot + 3]) == (classes[0, slot] == 3) for slot in range(3))  # of 3 there is one
        assert set(draws[step]) == {2 * step, 2 * step + 1}


def test_an_image_that_comes_again_is_augmented_again(shard_folder, ask, tmp_path):
    """Within a step, where a class has fewer images than it takes, and beside the stream's own views."""
    labels = labels_of(shard_folder)
    one_each = np.array([int(np.flatnonzero(labels == label)[0]) for label in range(10)])
    np.save(tmp_path / "one.npy", one_each)
    ask(subset=str(tmp_path / "one.npy"), classes=10, images=2)
    first, second = list(make_stream(shard_folder)(range(2)))
    assert set(first.supports.ids.tolist()) == set(one_each.tolist()) == set(second.supports.ids.tolist())
    shown = torch.cat(
        [batch.supports.images.unflatten(0, (2, 2, 10)).transpose(0, 2).flatten(1, 2) for batch in (first, second)], 1
    )
    for views in shown:
        assert len(views) == 8 and all(not torch.equal(a, b) for n, a in enumerate(views) for b in views[n + 1 :])


def test_a_share_is_balanced_nested_and_that_of_low_shot(shard_folder, ask):
    labels = labels_of(shard_folder)
    found = []
    for share in (0.1, 0.2):
        ask(share=share, classes=10)
        stream = make_stream(shard_folder)
        assert (stream.supports.labelled.sizes == round(20 * share)).all()
        found.append(set(stream.supports.labelled.ids.tolist()))
        assert found[-1] == set(stratified_rows(np.arange(200), labels, share, 0).tolist())
    assert found[0] < found[1]
    assert stream.supports.summary() == "4 of each of 10 classes join every step, of 40 in 10 classes"
    ask(share=0.2, seed=1, classes=10)
    assert set(make_stream(shard_folder).supports.labelled.ids.tolist()) != found[1]


def test_the_labels_in_use_are_part_of_what_a_run_is_trained_on(shard_folder, ask):
    plain = make_stream(shard_folder).fingerprint
    prints = [plain]
    for share in (0.1, 0.2, 1.0):
        ask(share=share)
        prints.append(make_stream(shard_folder).fingerprint)
    assert len(set(prints)) == 4
    assert all(plain in other for other in prints[1:])


def test_other_images_stay_as_they_are(shard_folder, ask):
    before = next(iter(make_stream(shard_folder)(range(1))))
    ask()
    after = next(iter(make_stream(shard_folder)(range(1))))
    assert before.supports is None and before.inputs().supports is None and before.inputs().pixels() == before.views
    assert before.keys == after.keys and all(map(torch.equal, before.views, after.views))
    assert after.inputs().supports is after.supports and len(after.inputs().pixels()) == len(after.views) + 1


def test_an_unreadable_support_is_replaced_by_one_of_its_class(shard_folder, ask, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(shard_folder, folder)
    bad = overwrite(folder, 1, 7)
    labels = labels_of(folder)
    ask(classes=10, images=16, views=1)
    met = 0
    for step, batch in enumerate(make_stream(folder)(range(4))):
        wanted, _ = make_stream(folder).supports.batches.order.samples(step)
        ids = batch.supports.ids.numpy()
        assert 47 not in ids and (labels[ids] == batch.supports.labels.numpy()).all()
        assert ((ids != wanted) == (wanted == 47)).all()
        met += (wanted == 47).sum()
        assert all(row["key"] == bad for row in [*batch.skipped, *batch.unread_supports.values()])
        assert [*batch.unread_supports] == [f"train-000001.tar/{bad}"] * bool((wanted == 47).any())
    assert met


def test_supports_of_a_shard_that_is_lost_with_its_index_are_replaced_by_others_of_their_class(
    shard_folder, ask, tmp_path
):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "shards"))
    labels = labels_of(folder)
    ask(shards=str(folder), classes=10, images=16)
    stream = make_stream(shard_folder, "data.max_skipped_in_row=2")
    wanted = [stream.supports.batches.order.samples(step)[0] for step in range(4)]
    reader = stream.supports.batches.reader
    lost = slice(*reader.first_ids[1:3].tolist())
    for path in folder.glob("train-000001*"):
        path.unlink()
    for ids, batch in zip(wanted, stream(range(4)), strict=True):
        own = batch.supports.ids.numpy()
        is_lost = (ids >= lost.start) & (ids < lost.stop)
        assert ((own != ids) == is_lost).all() and is_lost.any()
        assert (labels[own] == labels[ids]).all()


def test_an_unreadable_support_is_no_image_of_the_batch(shard_folder, ask, tmp_path):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "shards"))
    bad = overwrite(folder, 1, 7)
    ask(shards=str(folder), classes=10, images=20)
    [batch] = make_stream(shard_folder)(range(1))
    assert batch.substituted == [] and not batch.skipped
    assert [row["key"] for row in batch.unread_supports.values()] == [bad]


@pytest.mark.parametrize("audit", [True, False])
def test_a_bad_step_names_its_supports(shard_folder, ask, tmp_path, audit):
    ask()
    [batch] = make_stream(shard_folder, f"data.audit={str(audit).lower()}")(range(1))
    Logs(tmp_path).trouble(0, batch, Output(torch.zeros(()), {}, {}), "not finite")
    [path] = tmp_path.glob("trouble/step-00000000/*.json")
    named = batch.support_keys if audit else [str(sample_id) for sample_id in batch.supports.ids.tolist()]
    assert json.loads(path.read_text())["support_keys"] == named and len(named) == 32


def test_the_supports_files_are_checked(shard_folder, ask, tmp_path):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "shards"))
    ask(shards=str(folder))
    stream = make_stream(shard_folder)
    assert [corpus.manifest.root for corpus in stream.folders] == [shard_folder, folder]
    stream.check_files()
    (folder / "train-000003.tar").unlink()
    with pytest.raises(InputError, match=rf"{folder}/train-000003.tar"):
        stream.check_files()
    ask()
    assert len(make_stream(shard_folder).folders) == 1


def test_supports_may_come_from_another_folder(shard_folder, held_out_shards, ask):
    ask(shards=str(held_out_shards))
    batch = next(iter(make_stream(shard_folder)(range(1))))
    assert batch.supports.ids.max() < Corpus(read_manifest(held_out_shards)).manifest.num_samples


@pytest.mark.parametrize(
    "wanted, ranks, line",
    [
        (
            {"classes": 11},
            1,
            r"method.support.classes=11: expected at most 10, the classes of which .* labelled images",
        ),
        ({"classes": 9, "images": 3}, 2, r"9 classes x 3 images = 27 are not divisible by 2 ranks"),
        ({"shards": "s3://a/b"}, 1, r"method.support.shards=s3://a/b: .*; name a folder on this machine"),
        ({"images": 3}, 1, None),
    ],
)
def test_what_does_not_fit_is_refused(shard_folder, ask, wanted, ranks, line):
    ask(**wanted)
    if line is None:
        with pytest.raises(InputError, match=r"method.support.images=3: expected a multiple of train.accumulate=2"):
            make_stream(shard_folder, "train.accumulate=2")
        return
    with pytest.raises(InputError, match=line):
        make_stream(shard_folder, ranks=ranks)


def test_several_folders_to_train_on_need_one_that_has_the_labels(shard_folder, held_out_shards, ask):
    ask()
    with pytest.raises(InputError, match=r"method.support.shards='': expected a folder, since data.shards is a list"):
        make_stream(shard_folder, f"data.shards=[{shard_folder},{held_out_shards}]")
    assert make_stream(shard_folder, f"data.shards=[{shard_folder}]").supports.corpus.manifest.root == shard_folder


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.5, 0.77, 1.0])
def test_a_share_is_that_of_a_loop_over_classes(share):
    random = np.random.default_rng(0)
    ids, labels = random.permutation(900), random.integers(0, 40, 900) ** 2 // 9
    order, chosen = by_hash(ids, 5, LOW_SHOT), []
    for label in np.unique(labels):
        own = order[labels[order] == label]
        chosen.append(own[: max(1, round(share * len(own)))])
    assert stratified_rows(ids, labels, share, 5).tolist() == sorted(np.concatenate(chosen).tolist())


def test_a_folder_without_labels_is_named(shard_folder, ask, tmp_path, monkeypatch):
    ask()
    real = read_index

    def without(path: Path):
        index = real(path)
        index.label[:] = -1
        return index

    monkeypatch.setattr("largescale.data.supports.read_index", without)
    with pytest.raises(InputError, match="no image has a label; supports need some"):
        make_stream(shard_folder)
