from __future__ import annotations

from dataclasses import replace

import pytest

from largescale.config import Config, load_config
from largescale.data.supports import require_shared_evenly
from largescale.methods import METHODS, build_method
from largescale.methods.choice import Choice
from largescale.propose.command import _alone
from largescale.propose.hours import MOST_EPOCHS, TRAINING, affordable, epochs_in, phases_of
from largescale.propose.proposal import as_config
from largescale.propose.rate import Rate
from shards.ground.errors import InputError
from tests.helpers.proposals import EIGHT, PHOTOS, proposed


def test_epochs_follow_from_hours_and_speed():
    epochs = epochs_in(proposed(), Rate(100.0, "measured here"), 1.0)
    assert epochs.value == pytest.approx(TRAINING * 3600 * 100 / 6000) and "90% of 1 h at 100 images/s" in epochs.reason
    capped = epochs_in(proposed(), Rate(1e5, "measured here"), 12.0)
    assert capped.value == MOST_EPOCHS and "12 h would allow" in capped.reason
    # An epoch is 93 steps of 64 images; 20 steps, the least, take 0.2 of an epoch.
    with pytest.raises(InputError, match=r"at 100 images/s, .* these are 5 steps .* at least --hours 0.004"):
        epochs_in(proposed(), Rate(100.0, "measured here"), 0.001)
    assert epochs_in(proposed(), Rate(100.0, "measured here"), 0.004).value == pytest.approx(0.216, abs=0.001)


def seconds(method: str, epochs: float, rate: Rate) -> float:
    """Of steps and phases of a run, one phase after the other."""
    proposal = proposed(method=method)
    phases, embedding = phases_of(as_config(proposal.choices(Choice(epochs, ""))), proposal.length(epochs))
    steps = epochs * PHOTOS.num_samples / rate.images_per_s
    return steps + phases * rate.solving_s + embedding * rate.embedding_s


@pytest.mark.parametrize("method", ["deepcluster", "pcl", "sela", "deepclusterv2", "colorization", "swav"])
def test_phases_are_part_of_the_hours(method):
    rate = Rate(100.0, "measured here", embedding_s=40.0, solving_s=20.0)  # an epoch of steps takes 60 s
    found = epochs_in(proposed(method=method), rate, 1.0)
    assert seconds(method, found.value, rate) == pytest.approx(TRAINING * 3600, rel=0.05)
    assert ("for offline phases" in found.reason) == (method != "swav")


def test_hours_that_are_less_than_a_phase_are_refused_with_enough_of_them():
    rate = Rate(100.0, "measured here", embedding_s=7000.0)
    assert affordable(proposed(method="colorization"), rate, 1.0) == 0
    with pytest.raises(InputError, match=r"these are 0 steps .* at least --hours 2\.2$"):
        epochs_in(proposed(method="colorization"), rate, 1.0)
    assert epochs_in(proposed(method="colorization"), rate, 2.2).value > 0.2


def test_phases_that_are_fewer_in_a_shorter_run_do_not_forbid_it():
    """Ten solves in a long run, four in an epoch, one in twenty steps."""
    rate, sela = Rate(100.0, "measured here", embedding_s=40.0, solving_s=20.0), proposed(method="sela")
    for hours in (0.03, 0.1, 0.2, 0.5):
        found = epochs_in(sela, rate, hours).value
        assert seconds("sela", found, rate) <= TRAINING * 3600 * hours < seconds("sela", 1.5 * found, rate) + 60
    assert epochs_in(sela, rate, 0.1).value >= 1
    with pytest.raises(InputError, match=r"at least --hours 0\.023$"):
        epochs_in(sela, rate, 0.02)
    assert epochs_in(sela, rate, 0.023).value > 0.2


def trial_of(method: str, tmp_path) -> Config:
    path = tmp_path / "recipe.yaml"
    path.write_text(_alone(replace(proposed(method=method), shards="unset")))
    return load_config(path)


def test_a_single_gpu_is_measured_with_its_part_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("largescale.data.loader_counts.usable_cpus", lambda: 64)
    path = tmp_path / "recipe.yaml"
    path.write_text(_alone(replace(proposed(machine=EIGHT), shards="unset")))
    data = load_config(path).data
    assert (data.workers, data.threads, data.prefetch) == (2, 3, 1)  # 7 of 8 cores, and few batches made before


def test_a_single_gpu_is_measured_with_its_part_of_the_supports(tmp_path):
    eight = proposed(replace(PHOTOS, num_classes=365), EIGHT, "paws")
    whole = as_config(eight.choices(Choice(100.0, ""))).method.supports()
    path = tmp_path / "recipe.yaml"
    path.write_text(_alone(replace(eight, shards="unset")))
    config = load_config(path)
    assert config.train.global_batch == eight.batch // 8
    assert whole.size / 8 <= config.method.supports().size <= whole.size / 8 + whole.classes
    require_shared_evenly(config, 1)


def test_what_a_run_only_begins_with_is_not_measured(tmp_path):
    length = proposed().length(0.2)
    method = build_method(trial_of("artifacts", tmp_path))
    method.of_run(length)
    assert [method.objectives_of(step) == METHODS["artifacts"].objectives[1:] for step in range(3)] == [
        False,
        True,
        True,
    ]
    method = build_method(trial_of("pcl", tmp_path))
    method.of_run(length)
    assert method.phase_due(0)
    method = build_method(trial_of("sela", tmp_path))
    method.of_run(length)
    assert sum(method.phase_due(step) for step in range(length.num_steps)) == 1
