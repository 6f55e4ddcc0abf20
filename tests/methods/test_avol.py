from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.cli import main
from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.data.views import Views
from largescale.evaluate import task_pictures
from largescale.evaluate.extract import extract
from largescale.methods.avol import AVOL
from largescale.methods.sound_pairs import strangers
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks
from tests.helpers.sounding import sounding_clips
from tests.methods.hearing import BATCH, hearing_method, sounding_views

MINI = ROOT / "tests/methods/mini/avol.yaml"


def build() -> AVOL:
    return hearing_method(AVOL, MINI).double().eval()


def naive_loss(method: AVOL, batch: Views, others: list[int]) -> Tensor:
    """The loop of the docstring."""
    scale, shift = method.match.weight[0, 0], method.match.bias[0]

    def best(maps: Tensor, s: Tensor) -> Tensor:
        places = [maps[:, y, x] for y in range(maps.shape[1]) for x in range(maps.shape[2])]
        return torch.stack([scale * (z @ s) + shift for z in places]).max()

    total, count = torch.zeros((), dtype=torch.float64), 0
    for group in batch.images:
        for i, j in enumerate(others):
            seen = method.projection(method.backbone.stages(method.backbone.stem(group[i : i + 1])))[0]
            own, other = (method.sound_projection(method.hearing(batch.sounds[n : n + 1]))[0] for n in (i, j))
            total -= torch.log(torch.sigmoid(best(seen, own))) / 2 + torch.log(torch.sigmoid(-best(seen, other))) / 2
            count += 1
    return total / count


def test_loss_and_gradients_equal_the_naive_loop():
    method, batch = build(), sounding_views()
    draws = method.task_views(batch, 2).facts["strangers"][0]
    others = strangers(batch.ids, torch.arange(BATCH), draws).tolist()
    expected, found = naive_loss(method, batch, others), method(batch, 2)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), gradients, rtol=1e-8, atol=1e-10)
    assert set(found.signs) == set(method.signs) == {"task_accuracy"}


@torch.no_grad()
def test_maps_and_pictures_show_the_place_whose_logit_counts():
    method, batch = build(), sounding_views()
    maps = method.sound_maps(batch.images[0], batch.sounds)
    assert maps.shape[0] == BATCH and maps.shape[1] == maps.shape[2] > 1
    own = method(batch, 2).evidence["logits"][0, :, 0]
    torch.testing.assert_close(maps.amax((1, 2)), own[:, 1] - own[:, 0])
    heat, image = method.draw(batch._replace(images=batch.images[:1]))
    assert image.shape == heat.shape and 0 <= float(heat.min()) <= float(heat.max()) <= 1
    red = (heat[:, 0] - image[:, 0] / 2).flatten(1).argmax(1)  # near the best place
    best = maps.flatten(1).argmax(1)
    side, cell = maps.shape[1], image.shape[-1] // maps.shape[1]
    for row in range(BATCH):
        y, x = divmod(int(red[row]), image.shape[-1])
        assert abs(y // cell - int(best[row]) // side) <= 1 and abs(x // cell - int(best[row]) % side) <= 1


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return sounding_clips(tmp_path_factory.mktemp("sounding"), {"train": 300, "test": 50})


def trained(clips, out, name: str, steps: int):
    """A run on clips in which one of two shapes sounds, each with the pitch of its colour."""
    sound = ["method.sound_widths=[16,32,64]", "method.sound.rate=8000", "method.sound.seconds=0.25"]
    words = [f"data.shards={clips}/train", f"data.eval_shards={clips}/test", f"run.dir={out}", "evaluate.resize=48"]
    other = [f"train.steps={steps}", "checkpoint.every_steps=0", "model.depths=[1,1]", "run.log_every=10", *sound]
    assert main(["pretrain", str(ROOT / f"configs/small/{name}.yaml"), *words, *other]) == 0
    return out


def test_the_place_that_fits_is_the_shape_that_sounds(clips, tmp_path, capsys):
    run = trained(clips, tmp_path / "run", "avol", 120)
    assert main(["evaluate", "sound-localisation", str(run)]) == 0
    record = json.loads((run / "eval/sound-localisation.json").read_text())
    found = record["results"]
    assert found["pretrained"]["near_rate"] > 0.75
    assert found["pretrained"]["hit_rate"] > found["untrained"]["hit_rate"] + 0.2
    assert found["untrained"]["hit_rate"] > found["centre"]["hit_rate"]  # shapes stand out
    capsys.readouterr()
    assert main(["evaluate", "cross-modal", str(run)]) == 2
    assert "a AVOL-Net run embeds no sounds" in capsys.readouterr().err
    drawn = task_pictures.load(task_pictures.path_of(run))
    assert drawn is not None and len(drawn.columns) == 2 and len(drawn.columns[1]) == task_pictures.IMAGES
    assert main(["report", str(run)]) == 0
    assert "Where it sounds" in (run / "report.html").read_text()


def test_images_and_sounds_of_a_class_find_each_other(clips, tmp_path, capsys):
    run = trained(clips, tmp_path / "run", "avc", 30)
    assert main(["evaluate", "cross-modal", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["pretrained", "network", "same", "network,", "untrained", "chance"]
    record = json.loads((run / "eval/cross-modal.json").read_text())
    found, chance = (record["results"][name]["ndcg_at_30_by_direction"] for name in ("pretrained", "chance"))
    assert record["num_test"] == 50 and record["results"]["chance"]["recall_at_1"] == pytest.approx(1 / 50)
    assert all(found[direction] > chance[direction] + 0.1 for direction in found)


def rows(clips: str) -> torch.Tensor | None:
    config = load_config(MINI, [f"data.shards={clips}", "evaluate.batch=7", "evaluate.resize=48", "evaluate.size=48"])
    wanted = load_config(MINI, ["method.sound.rate=8000"]).method.sounds()

    def network(images: Tensor, sounds: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)), sounds.float().square().mean(1).sqrt()], dim=1)

    corpus = open_corpus(clips, config.data)
    found = extract(
        corpus, config, {"both": network}, torch.device("cpu"), ids=np.arange(25), labelled=False, sound=wanted
    )
    return found["both"].features if found else None


@pytest.mark.distributed
def test_ranks_share_images_and_sounds_and_change_nothing(clips):
    alone = rows(f"{clips}/test")
    first, second = run_ranks(rows, 2, f"{clips}/test")
    assert torch.equal(first, alone) and second is None
