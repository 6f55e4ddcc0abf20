from __future__ import annotations

import wave
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shards.clips.library import read_with_ffmpeg
from shards.clips.sound import Sound, from_flac, to_flac
from shards.images.reading import ImageError
from tests.helpers.videos import moving_square, tone, write_sound, write_video


def test_flac_keeps_every_sample_and_its_bytes_depend_on_nothing_else():
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 30_001).astype(np.int16)
    for rate in (8000, 44_100, 48_000):
        stored = to_flac(samples, rate)
        found, found_rate = from_flac(stored)
        assert found_rate == rate and (found == samples).all()
        assert stored == to_flac(samples, rate)


def test_damaged_flac_is_told():
    stored = to_flac(tone(1.0), 48_000)
    without_frames = stored[: 4 + 4 + 34].replace(b"fLaC\0", b"fLaC\x80", 1)  # a header alone, marked as the last one
    for content in (b"", b"fLaC", stored[: len(stored) // 3], without_frames):
        with pytest.raises(ImageError, match="damaged sound"):
            from_flac(content)


def stretches(path: Path, rate: int, bounds: list[Fraction], origin: Fraction | None = Fraction(0)) -> list[tuple]:
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


def wav(path: Path, channels: int, rate: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * channels * 4000))
    return path


@pytest.mark.parametrize(("channels", "rate"), [(9, 48_000), (1, 1), (1, 999)])
def test_sound_that_no_resampler_takes_ends_and_is_noted(tmp_path, channels, rate):
    with wav(tmp_path / "a.wav", channels, rate).open("rb") as file, read_with_ffmpeg(file) as container:
        sound = Sound(container, 48_000, Fraction(0))
        assert not sound.take(Fraction(0), Fraction(10)).num_samples and sound.is_damaged
    with wav(tmp_path / "a.wav", 2, 1000).open("rb") as file, read_with_ffmpeg(file) as container:
        sound = Sound(container, 48_000, Fraction(0))
        assert sound.take(Fraction(0), Fraction(1)).num_samples == 48_000 and not sound.is_damaged


def test_without_an_origin_the_first_sound_is_at_0(tmp_path):
    path = tmp_path / "a.mkv"
    write_video(path, [moving_square(0)] * 50, sound=tone(1.0), sound_start=0.5)
    for origin, start in ((Fraction(0), 0.5), (None, 0.0)):
        [(found, heard, _), _] = stretches(path, 16_000, [Fraction(0), Fraction(1), Fraction(2)], origin)
        assert found == start and len(heard) == 16_000 * (1 - start)


def test_a_stretch_of_no_length_has_no_sound(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(1.0), "pcm_s16le")
    [(_, heard, _)] = stretches(path, 48_000, [Fraction(1, 2), Fraction(1, 2)])
    assert not len(heard)
