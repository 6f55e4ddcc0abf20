"""Cross-modal retrieval: each direction is that of its name, chance is what embeddings that say nothing get.

Covers: largescale/evaluate/hearing.py
"""

from __future__ import annotations

from dataclasses import replace
from math import log2
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.cli import main
from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.evaluate.cross_modal import DIRECTIONS, Settings, measure
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.hearing import heard_by
from shards.ground.errors import InputError
from tests.helpers.networks import narrow_resnet
from tests.helpers.sounding import RATE, half_silent_clips
from tests.methods.harness import RECIPES


def pairs(images: torch.Tensor, sounds: torch.Tensor, labels: list[int], num_classes: int) -> FeatureSet:
    num = len(images)
    rows = torch.cat([images, sounds], dim=1)
    return FeatureSet(rows, torch.tensor(labels), torch.arange(num), tuple("abcdef"[:num_classes]))


def test_each_direction_asks_and_ranks_what_it_says():
    """Sounds lie on a line where images do, but for the last one, which is nearest to the first image."""
    images, sounds = (torch.tensor(one)[:, None] for one in ([0.0, 1.0, 2.0, 3.0], [0.1, 1.1, 2.1, -0.05]))
    found = measure(pairs(images, sounds, [-1] * 4, 0), Settings(cross_modal_ranks=[1, 2]))
    assert found["recall_at_1_by_direction"] == {"image to sound": 0.5, "sound to image": 0.75}
    assert found["recall_at_2_by_direction"] == {"image to sound": 0.75, "sound to image": 0.75}
    assert found["recall"] == found["recall_at_1"] == 0.625
    assert not any(name.startswith("ndcg") for name in found)  # no classes


def test_classes_count_in_all_four_directions_among_other_clips_alone():
    images = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    sounds = torch.tensor([[0.0], [5.0], [0.1], [5.1]])  # by other classes than the images
    found = measure(pairs(images, sounds, [0, 0, 1, 1], 2), Settings(cross_modal_places=1))
    assert found["ndcg_at_1_by_direction"]["image to image"] == 1.0
    assert found["ndcg_at_1_by_direction"]["sound to sound"] == 0.0
    assert list(found["ndcg_at_1_by_direction"]) == list(DIRECTIONS)
    some = measure(pairs(images, sounds, [0, 0, 1, -1], 2), Settings(cross_modal_places=1))
    assert some["ndcg_at_1_by_direction"]["image to image"] == 1.0  # the third one has no other of its class


def test_in_a_tree_relevance_is_20_less_the_edges_between_classes():
    """A crow between a pigeon and a dog, and a drum: of the crow's query by hand."""
    found = pairs(torch.tensor([[0.0], [0.1], [0.3], [0.7]]), torch.zeros(4, 1), [0, 1, 2, 3], 4)
    classes = ("animals/birds/crow", "animals/dog", "animals/birds/pigeon", "drum")
    found = replace(found, classes=classes)
    value = measure(found, Settings(cross_modal_tree="names"))["ndcg_at_30_by_direction"]["image to image"]
    # To each query, from near to far: crow and pigeon are 2 edges apart, 3 from the dog, 4 from the drum, which is 3
    # from the dog.
    orders = {"crow": (3, 2, 4), "dog": (3, 3, 3), "pigeon": (3, 2, 4), "drum": (4, 3, 4)}
    shares = []
    for edges in orders.values():
        gains = [20 - number for number in edges]
        gain, best = (
            sum(one / log2(2 + place) for place, one in enumerate(order)) for order in (gains, sorted(gains)[::-1])
        )
        shares.append(gain / best)
    assert value == pytest.approx(fmean(shares)) and value < 1


def test_embeddings_that_say_nothing_get_what_chance_gives():
    found = measure(pairs(torch.zeros(20, 1), torch.zeros(20, 1), [0, 1] * 10, 2), Settings())
    assert found["recall_at_1"] == pytest.approx(1 / 20) and found["recall_at_10"] == pytest.approx(1 / 2)
    assert found["ndcg_at_30_by_direction"] == pytest.approx(dict.fromkeys(DIRECTIONS, found["ndcg_at_30"]))


def test_weights_that_do_not_hear_are_refused_in_a_line(shard_folder, tmp_path, capsys):
    torch.save(narrow_resnet().state_dict(), tmp_path / "narrow.pth")
    assert main(["evaluate", "cross-modal", str(tmp_path / "narrow.pth"), f"data.eval_shards={shard_folder}"]) == 2
    [*_, last] = capsys.readouterr().err.splitlines()
    assert last == "error: cross-modal: a file of weights embeds no sounds; use a run of a method that does"


def test_that_no_clip_with_a_box_has_sound_is_said_in_a_line(tmp_path):
    config = load_config(RECIPES / "avol.yaml", [f"method.sound.rate={RATE}"])
    corpus = open_corpus(str(half_silent_clips(tmp_path, 4)), config.data)
    subject = SimpleNamespace(config=config, shards=(corpus, corpus), weights=None, task="sound-localisation-0")
    with pytest.raises(
        InputError, match=r"^sound-localisation: none of the 2 clips that can be asked about in .* has sound"
    ):
        heard_by(subject, "sound_maps", "says nothing", lambda method: None, ids=np.array([0, 2]))
