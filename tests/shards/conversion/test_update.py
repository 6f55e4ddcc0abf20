"""What is new in the source is added, what is held out stays held out, and no shard that is there changes."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.conversion import listing
from shards.conversion.conversion_plan import open_plan
from shards.conversion.convert import PLAN_ALONE, Options, convert, merge
from shards.format.manifest import Manifest, read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from shards.inspection.verify import verify
from tests.helpers.conversions import contents, refusal, stored_images
from tests.helpers.images import image_bytes


def write(source: Path, names: list[str]) -> None:
    for name in names:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(40, 30, "JPEG", seed=zlib.crc32(name.encode())))


def names(first: int, last: int) -> list[str]:
    return [f"{'cat' if number % 3 else 'dog'}/{number:03d}.jpg" for number in range(first, last)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "pile", names(0, 50))
    return tmp_path / "pile"


def options(**changes: object) -> Options:
    return Options("pile", **{"labels": "folder", "samples_per_shard": 8, "shuffle": 3, **changes})


def by_class(manifest: Manifest) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in manifest.classes}
    for number in range(len(manifest.shards)):
        index = read_index(manifest.index_path(number))
        for row in range(len(index)):
            found[manifest.classes[index.label[row]]].add(index.key(row))
    return found


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_new_files_come_in_new_shards_and_the_old_ones_stay(source, tmp_path, holdout, capsys):
    out = tmp_path / "out"
    before = convert(source, out, options(holdout=holdout))
    kept = {name: data for name, data in contents(out).items() if "-0" in name}
    # One sorts before all others, one is of a new class, one would have the key of another.
    write(source, [*names(50, 61), "ape/x.jpg", "aaa.d/y.jpg", "cat/001.jpeg", "cat/.001.jpg"])
    with pytest.raises(InputError, match="add what is new with --update"):
        shutil.copytree(out, tmp_path / "again")
        (tmp_path / "again" / "manifest.json").unlink()
        convert(source, tmp_path / "again", options(holdout=holdout))
    after = convert(source, out, options(holdout=holdout, update=True))
    assert "15 new files; 0 of the 50 listed before are gone" in capsys.readouterr().err
    assert {name: data for name, data in contents(out).items() if name in kept} == kept
    assert after.shards[: len(before.shards)] == before.shards
    assert after.classes == (*before.classes, "aaa.d", "ape")
    stored = stored_images(out) | (stored_images(out / "holdout") if holdout else {})
    assert set(stored.values()) == {path.read_bytes() for path in source.rglob("*.jp*g")} and len(stored) == 65
    assert "cat/001~u1" in stored or "cat/001~u2" in stored
    classes = by_class(after)
    if not holdout:
        assert classes["ape"] == {"ape/x"} and all(key.startswith("cat/") for key in classes["cat"])
        assert len(classes["cat"]) == 2 + sum(name.startswith("cat") for name in names(0, 61))
    assert not verify(out, workers=1, decode=True)[1]
    # Nothing is new: nothing happens.
    same = contents(out)
    convert(source, out, options(holdout=holdout, update=True, workers=2))
    assert contents(out) == same
    # What went stays.
    (source / "cat" / "001.jpg").unlink()
    convert(source, out, options(holdout=holdout, update=True))
    assert contents(out) == same


def test_tasks_update_and_later_repair(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, options(duplicates="exact"))
    write(source, names(50, 70))
    (source / "cat" / "twice.jpg").write_bytes((source / "cat" / "001.jpg").read_bytes())
    convert(source, out, options(duplicates="exact", task=PLAN_ALONE, update=True))
    write(source, ["cat/later.jpg"])  # no task adds it to the plan that the others read
    for _ in range(2):
        for task in range(3):
            convert(source, out, options(duplicates="exact", task=(task, 3), update=True))
        manifest = merge(out)
    assert manifest.num_samples == 70 and manifest.skipped == {"a duplicate": 1}
    expected = contents(out)
    for name in ("pile-000001.tar", "pile-000008.tar"):
        (out / name).write_bytes(b"damaged")
    assert main(["verify", str(out), "--repair"]) == 0
    assert contents(out) == expected


def test_an_update_that_was_cut_off_is_done_again(source, tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out, other):
        convert(source, folder, options())
    write(source, names(50, 70))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(listing, "_append_order", fail)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, options(update=True))
    assert read_manifest(out).num_samples == 50
    for folder in (out, other):
        convert(source, folder, options(update=True))
    assert contents(out) == contents(other)
    assert (out / "plan" / "keys.bin").read_bytes() == (other / "plan" / "keys.bin").read_bytes()


def test_a_file_that_changed_and_a_lost_plan_are_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    convert(source, out, options())
    (source / "cat" / "001.jpg").write_bytes(b"longer" + (source / "cat" / "001.jpg").read_bytes())
    with pytest.raises(InputError, match=r"cat/001.jpg was .* bytes and is .* now; --update only adds files"):
        convert(source, out, options(update=True))
    with pytest.raises(InputError, match=r"was made with --holdout=0\.0, now it is 0\.1"):
        convert(source, out, options(update=True, holdout=0.1))
    shutil.rmtree(out / "plan")
    with pytest.raises(InputError, match="has no plan/ for --update to add to"):
        convert(source, out, options(update=True))
    assert read_manifest(out).num_samples == 50
    assert main(["convert", str(source), str(out), "--update", "--force"]) == 2
    assert main(["convert", str(source), str(tmp_path / "new"), "--holdout", "1"]) == 2
    assert "expected a fraction from 0 to less than 1" in capsys.readouterr().err


def test_names_that_do_not_fit_leave_a_conversion_as_it_is(source, tmp_path, capsys):
    out = tmp_path / "shards"
    given_names = tmp_path / "names.txt"
    given_names.write_text("a\nb\n")
    convert_it = ["convert", str(source), str(out), "--labels", "folder"]
    names_too = [*convert_it, "--class-names", str(given_names)]
    assert main(names_too) == 2 and "only for classes that are numbers" in capsys.readouterr().err
    assert main(convert_it) == 0 and read_manifest(out).classes == ("cat", "dog")
    plan = (out / "plan" / "plan.json").read_bytes()
    assert main([*names_too, "--update"]) == 2 and "only for classes that are numbers" in capsys.readouterr().err
    assert (out / "plan" / "plan.json").read_bytes() == plan
    write(source, names(50, 60))
    assert main([*convert_it, "--update"]) == 0 and read_manifest(out).num_samples == 60


@pytest.mark.parametrize("update", [False, True])
def test_the_tables_of_a_plan_are_on_the_disk_before_plan_json(source, tmp_path, monkeypatch, update):
    if update:
        convert(source, tmp_path / "out", options())
        write(source, names(50, 53))
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    convert(source, tmp_path / "out", options(update=update, task=PLAN_ALONE))
    plan = tmp_path / "out" / "plan"
    order = [number for number, _ in synced]
    before = synced[: order.index((plan / "plan.json").stat().st_ino)]
    tables = {(path.stat().st_ino, path.stat().st_size) for path in plan.glob("*.bin")}
    assert len(tables) == 7 and tables <= set(before)


@pytest.mark.parametrize("table", ["places", "place_ends", "keys", "key_ends", "labels", "sizes", "order"])
@pytest.mark.parametrize("cut", [0, -1, None])
def test_a_plan_whose_table_was_cut_is_refused(source, tmp_path, capsys, table, cut):
    out = tmp_path / "out"
    convert(source, out, options(task=PLAN_ALONE))
    path = out / "plan" / f"{table}.bin"
    path.unlink() if cut is None else path.write_bytes(path.read_bytes()[:cut])
    text = refusal(capsys, "convert", source, out, "--labels", "folder", "--samples-per-shard", "8", "--shuffle", "3")
    assert f"{path}: has " in text and text.endswith(
        " it was cut, by a crash or a copy; restore it, or start over with --force"
    )
    assert not (out / "manifest.json").exists()
    assert convert(source, out, options(force=True)).num_samples == 50


def test_held_out_images_are_a_folder_of_their_own(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, options(holdout=0.3))
    train, held = stored_images(out), stored_images(out / "holdout")
    assert len(train) + len(held) == 50 and 5 < len(held) < 25
    assert set(held) == {key for key in {**train, **held} if listing.is_held_out(key.encode(), 0.3)}
    assert read_manifest(out / "holdout").name == "pile-holdout"
    assert read_manifest(out / "holdout").classes == read_manifest(out).classes
    # The same ones in a corpus that has grown, and more of them for a larger share.
    write(source, names(50, 90))
    convert(source, tmp_path / "grown", options(holdout=0.3))
    assert set(held) == set(stored_images(tmp_path / "grown" / "holdout")) & (set(train) | set(held))
    convert(source, tmp_path / "more", options(holdout=0.5))
    assert set(held) < set(stored_images(tmp_path / "more" / "holdout"))
    # Workers and tasks do not change a byte there, a repair fixes it, and starting over leaves nothing behind.
    for task in (0, 1, 2):
        convert(source, tmp_path / "tasks", options(holdout=0.5, task=(task, 3)))
    merge(tmp_path / "tasks")
    for folder in ("", "holdout"):
        assert contents(tmp_path / "tasks" / folder) == contents(tmp_path / "more" / folder)
    name = read_manifest(out / "holdout").shards[0].name
    before = (out / "holdout" / name).read_bytes()
    (out / "holdout" / name).write_bytes(before[:-700])
    shutil.rmtree(source)
    write(source, names(0, 50))
    assert main(["verify", str(out / "holdout"), "--repair"]) == 0
    assert (out / "holdout" / name).read_bytes() == before
    convert(source, out, options(force=True))
    assert not (out / "holdout").exists() and read_manifest(out).num_samples == 50


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 0.99), seed=st.integers(0, 10))
def test_the_share_that_is_held_out_is_the_one_asked_for(share, seed):
    count = sum(listing.is_held_out(b"%d/%d" % (seed, number), share) for number in range(2000))
    assert abs(count / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5 + 1e-9


@settings(max_examples=15, deadline=None)
@given(
    rounds=st.lists(st.sets(st.integers(0, 40), max_size=12), min_size=1, max_size=4),
    shuffle=st.sampled_from([None, 1]),
    holdout=st.sampled_from([0.0, 0.4]),
)
def test_any_number_of_updates_has_every_file_once(tmp_path_factory, rounds, shuffle, holdout):
    folder = tmp_path_factory.mktemp("updates")
    source, out = folder / "pile", folder / "out"
    write(source, ["z/first.jpg"])
    for added in rounds:
        write(source, [f"{'ab'[number % 2]}/{number}.{'jpg' if number % 3 else 'jpeg'}" for number in added])
        try:
            convert(source, out, options(shuffle=shuffle, holdout=holdout, samples_per_shard=4, update=out.exists()))
        except InputError as error:
            assert "all were held out" in str(error)
            return
    plan = open_plan(out)
    rows = [row for piece in range(plan.num_pieces) for row in plan.rows(piece)]
    assert sorted(row.place for row in rows) == sorted(
        os.path.relpath(path, source) for path in source.rglob("*.*") if path.is_file()
    )
    assert len({row.key for row in rows}) == len(rows)
    assert sorted(row.number for row in rows) == list(range(len(rows)))
