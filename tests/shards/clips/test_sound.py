from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shards.clips.library import read_with_ffmpeg
from shards.clips.sound import Sound, from_flac, to_flac
from shards.images.reading import ImageError
from tests.helpers.videos import tone, write_sound


def test_flac_keeps_every_sample_and_its_bytes_depend_on_nothing_else():
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 30_001).astype(np.int16)
    for rate in (8000, 44_100, 48_000):
        stored = to_flac(samples, rate)
        found, found_rate = from_flac(stored)
        assert found_rate == rate and (found == samples).all()
        assert stored == to_flac(samples, rate)


def test_damaged_flac_is_told():
    stored = to_flac(tone(1.0), 48_000)
    for content in (b"", b"fLaC", stored[: len(stored) // 3]):
        with pytest.raises(ImageError, match="damaged sound"):
            from_flac(content)


def stretches(path: Path, rate: int, bounds: list[Fraction], origin: Fraction = Fraction(0)) -> list[tuple]:
    with path.open("rb") as file, read_with_ffmpeg(file) as container:
        sound = Sound(container, rate, origin)
        found = [sound.take(start, stop) for start, stop in pairwise(bounds)]
    return [(one.start, *from_flac(one.flac)) if one.num_samples else (0.0, np.zeros(0, np.int16), 0) for one in found]


def test_stretches_put_together_are_the_whole_sound(tmp_path):
    samples = np.random.default_rng(0).integers(-3000, 3000, 96_000).astype(np.int16)
    path = write_sound(tmp_path / "a.wav", samples, "pcm_s16le")
    bounds = [Fraction(number, 7) for number in range(15)]
    found = stretches(path, 48_000, bounds)
    assert (np.concatenate([one[1] for one in found]) == samples).all()
    assert [len(one[1]) for one in found] == np.diff([round(48_000 * bound) for bound in bounds]).tolist()


def test_what_is_skipped_between_stretches_is_not_heard_in_the_next(tmp_path):
    ramp = np.arange(30_000).astype(np.int16)
    path = write_sound(tmp_path / "a.wav", ramp, "pcm_s16le", rate=10_000)
    with path.open("rb") as file, read_with_ffmpeg(file) as container:
        sound = Sound(container, 10_000, Fraction(0))
        assert from_flac(sound.take(Fraction(1, 2), Fraction(3, 4)).flac)[0].tolist() == list(range(5000, 7500))
        assert from_flac(sound.take(Fraction(2), Fraction(9, 4)).flac)[0].tolist() == list(range(20_000, 22_500))
        assert sound.take(Fraction(5), Fraction(6)).num_samples == 0 and sound.end == 3


def test_a_clock_that_begins_elsewhere_shifts_the_sound(tmp_path):
    ramp = np.arange(10_000).astype(np.int16)
    path = write_sound(tmp_path / "a.wav", ramp, "pcm_s16le", rate=10_000)
    [(start, heard, _)] = stretches(path, 10_000, [Fraction(0), Fraction(1)], origin=Fraction(1, 4))
    assert start == 0 and heard.tolist() == list(range(2500, 10_000))
    [(start, heard, _)] = stretches(path, 10_000, [Fraction(0), Fraction(1)], origin=Fraction(-1, 4))
    assert start == 0.25 and heard.tolist() == list(range(7500))


def test_another_rate_keeps_pitch_and_length(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(1.0, 44_100, 1000), "pcm_s16le", rate=44_100)
    [(_, heard, rate)] = stretches(path, 48_000, [Fraction(0), Fraction(1)])
    assert rate == 48_000 and abs(len(heard) - 48_000) <= 16
    window = heard[1000 : 1000 + 512] * np.hanning(512)
    assert np.abs(np.fft.rfft(window)).argmax() == 11  # round(1000 * 512 / 48000)
