from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch

from largescale.models.spectrogram import log_spectrogram, spectrogram_shape
from tests.helpers.videos import tone


def test_it_is_the_naive_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    sounds, rate = torch.rand(2, 95, generator=generator, dtype=torch.float64) - 0.5, 1000
    window, hop, points = 10, 5, 16
    found = log_spectrogram(sounds, rate, torch.float64)
    assert found.shape == (2, 9, 19) == (2, *spectrogram_shape(95, rate))
    for row, sound in enumerate(sounds.tolist()):
        for number in range(19):
            for frequency in range(9):
                total = 0j
                for place in range(window):
                    sample = (sound + [0.0] * hop)[hop * number + place]
                    hann = 0.5 - 0.5 * math.cos(2 * math.pi * place / window)
                    total += sample * hann * cmath.exp(-2j * math.pi * frequency * place / points)
                assert float(found[row, frequency, number]) == pytest.approx(math.log(abs(total) + 1e-4), rel=1e-9)


def test_a_second_is_257_by_200_and_a_sine_of_1_khz_peaks_in_bin_11():
    second = torch.from_numpy(tone(1.0))[None]
    found = log_spectrogram(second, 48_000)
    assert found.shape == (1, 257, 200) == (1, *spectrogram_shape(48_000, 48_000))
    assert (found.argmax(1) == round(1000 * 512 / 48_000)).all() and round(1000 * 512 / 48_000) == 11
    assert found.amax() == pytest.approx(math.log(20_000 / 2**15 * 480 / 4), abs=0.1)
    torch.testing.assert_close(log_spectrogram(second / 2**15, 48_000), found, rtol=1e-5, atol=1e-5)


def test_silence_is_the_floor_and_rounding_stays_near_it():
    silence = torch.zeros(1, 4800, dtype=torch.int16)
    assert (log_spectrogram(silence, 48_000) == math.log(1e-4)).all()
    rounding = np.random.default_rng(0).integers(0, 2, (1, 4800)).astype(np.int16)
    loud = log_spectrogram(torch.from_numpy(rounding), 48_000)[:, 3:]
    assert float(loud.mean()) < math.log(1e-4) + 2


def test_it_is_computed_as_precisely_under_autocast():
    second = torch.from_numpy(tone(0.1))[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_spectrogram(second, 48_000)
    assert found.dtype == torch.float32 and torch.equal(found, log_spectrogram(second, 48_000))
