"""Actions: frames of a clip are averaged as a loop does it, on any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from largescale.cli import main
from largescale.data.centre_crops import centre_crop
from largescale.data.corpora import open_corpus
from largescale.data.decode import decode
from largescale.data.reader import ShardReader
from largescale.evaluate import action
from largescale.evaluate.extract import can_be_read, extract
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.published import any_target_at
from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert
from tests.helpers.features import features
from tests.helpers.networks import narrow_resnet
from tests.helpers.ranks import run_ranks
from tests.helpers.videos import write_video

FRAMES = 4
CPU = torch.device("cpu")


def action_video(path: Path, action: str, number: int) -> None:
    """Frames of grey noise, of which the first two are darker, or the last ones brighter; that in the middle tells
    nothing.
    """
    frames = np.random.default_rng(number).integers(90, 130, (6, 40, 40, 1), np.uint8).repeat(3, -1)
    if action == "rise":
        frames[5] += 100
    else:
        frames[:2] -= 60
    write_video(path, frames, rate=6)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of six frames, 24 to train on and 12 to test, of two classes; a network beside them."""
    source = tmp_path_factory.mktemp("actions")
    for part, count in (("train", 24), ("test", 12)):
        for number in range(count):
            name = ("fall", "rise")[number % 2]
            action_video(source / part / name / f"{number:02d}.mkv", name, number + 100 * (part == "test"))
        options = Options("clips", labels="folder", samples_per_shard=8, clips=ClipSettings(frame_rate=6.0))
        convert(source / part, source / "out" / part, options)
    torch.save(narrow_resnet().state_dict(), source / "narrow.pth")
    return source


def words(places: Path, part: str = "train") -> list[str]:
    return [
        f"evaluate.train_shards={places}/out/{part}",
        f"data.eval_shards={places}/out/test",
        "evaluate.resize=32",
        "evaluate.size=32",
        "data.workers=0",
        f"evaluate.action_frames={FRAMES}",
    ]


def by_loop(places: Path, network: nn.Module) -> torch.Tensor:
    """Features of the test clips in float64, frame by frame."""
    config = any_target_at(places / "narrow.pth", words(places)).agreed(words(places))[1]
    reader = ShardReader([open_corpus(f"{places}/out/test", config.data)])
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (config.data.mean, config.data.std))
    rows = []
    for sample_id in range(len(reader)):
        total = torch.zeros(64, dtype=torch.float64)
        for frame in (0, 2, 3, 5):  # in the middle of quarters of six frames
            image = decode(reader.read(sample_id, lambda num, frame=frame: frame), max_pixels=10**6)
            total += network(((centre_crop(image, 32, 32).double() / 255 - mean) / std)[None])[0]
        rows.append(total / FRAMES)
    return torch.stack(rows)


@torch.no_grad()
def test_clips_are_told_apart_by_the_mean_of_their_frames(places, capsys):
    assert main(["evaluate", "action", str(places / "narrow.pth"), *words(places)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["linear", "20"]
    record = json.loads((places / "narrow.pth.evaluated/eval/action.json").read_text())
    assert (record["num_train"], record["num_test"]) == (24, 12)
    assert record["results"]["pixels"]["top1"] == 1 and record["results"]["pretrained"]["top1"] > 0.8
    assert record["results"]["pretrained"]["top1_by_classifier"].keys() == {"linear", "20 nearest neighbours"}
    found = FeatureSet.load(places / "narrow.pth.evaluated/eval/features/pretrained-test-clips.safetensors")
    network = narrow_resnet().double()
    network.fc = nn.Identity()
    assert torch.allclose(found.features.double(), by_loop(places, network), rtol=1e-4, atol=1e-5)
    assert found.made_from["frames"] == FRAMES

    assert main(["evaluate", "linear-cached", str(places / "narrow.pth"), *words(places)[:-1]]) == 0
    record = json.loads((places / "narrow.pth.evaluated/eval/linear-cached.json").read_text())
    assert record["results"]["pixels"]["top1"] < 0.9  # the frame in the middle is the same in both classes


def test_images_are_refused_in_a_line(places, shard_folder, capsys):
    wrong = [*words(places), f"evaluate.train_shards={shard_folder}", f"data.eval_shards={shard_folder}"]
    assert main(["evaluate", "action", str(places / "narrow.pth"), *wrong]) == 2
    assert "images, not clips; make clips with" in capsys.readouterr().err.splitlines()[-1]


def of_test_clips(places: str, batch: int) -> FeatureSet | None:
    config = any_target_at(Path(places) / "narrow.pth", words(Path(places))).agreed(words(Path(places)))[1]
    config = replace(config, evaluate=replace(config.evaluate, batch=batch))
    corpus = open_corpus(f"{places}/out/test", config.data)
    return extract(corpus, config, {"mean": lambda x: x.mean((2, 3))}, CPU, frames=FRAMES).get("mean")


def test_a_clip_with_a_damaged_frame_is_left_out_and_comes_back(places, caplog):
    tar = sorted((places / "out/test").glob("*.tar"))[0]
    config = any_target_at(places / "narrow.pth", words(places)).agreed(words(places))[1]
    corpus = open_corpus(f"{places}/out/test", config.data)
    reader = ShardReader([corpus])
    whole, clips = tar.read_bytes(), reader._shard(0)[1].clips
    before = of_test_clips(str(places), 9)
    place = int(clips.offset[clips.frames(1)[5]]) + 40
    tar.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    try:
        found = of_test_clips(str(places), 9)
        assert found.ids.tolist() == [number for number in range(12) if number != 1]
        assert torch.equal(found.features, before.features[found.ids]) and torch.equal(
            found.labels, before.labels[found.ids]
        )
        assert "checksum differs" in caplog.text and "1 of 12 samples are left out" in caplog.text
        assert not can_be_read(corpus, config, found.ids, frames=FRAMES)
        assert can_be_read(corpus, config, found.ids)  # of one frame
    finally:
        tar.write_bytes(whole)
    assert can_be_read(corpus, config, found.ids, frames=FRAMES)


def figures(places: str) -> dict[str, object]:
    found = of_test_clips(places, 7)
    measured = action.measure(features(60, 0), features(31, 1), action.Settings())
    return {"rows": None if found is None else found.features, "measured": measured}


@pytest.mark.distributed
def test_ranks_change_nothing(places):
    alone = figures(str(places))
    for ranks in (2, 4):
        found = run_ranks(figures, ranks, str(places))
        assert torch.equal(found[0]["rows"], alone["rows"])
        assert all(one["measured"] == alone["measured"] for one in found)
