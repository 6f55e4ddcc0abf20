"""Log-magnitude spectrograms of sound, made on the device.

The variant (arXiv 1712.06651, section 3.2, says windows, hop and size; the rest is chosen here): Hann windows of 0.01
s, which half overlap; the first one begins with the first sample, and half a window of zeros is appended, so that there
is one window per hop; a transform of the next power of two; the natural logarithm of magnitude plus 1e-4, for samples
in [-1, 1]. What is less than that is the rounding of 16 bits. A second at 48,000 samples is 257 x 200: windows of 480,
hop 240, 512 points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_WINDOW_S = 0.01
_FLOOR = 1e-4
_FULL_SCALE = 2**15


def window_and_points(rate: int) -> tuple[int, int]:
    """Samples of a window, an even number, and points of its transform."""
    window = 2 * round(_WINDOW_S * rate / 2)
    return window, 1 << (window - 1).bit_length()


def spectrogram_shape(num_samples: int, rate: int) -> tuple[int, int]:
    """Frequencies and windows of a spectrogram."""
    window, points = window_and_points(rate)
    return points // 2 + 1, num_samples // (window // 2)


def log_spectrogram(sounds: Tensor, rate: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Spectrograms [B, F, N] of sounds [B, T].

    Args:
        sounds: int16, or floating-point numbers in [-1, 1].
        rate: samples per second.
        dtype: to compute in, whatever autocast says: float32 or float64.
    """
    window, points = window_and_points(rate)
    hop = window // 2
    with torch.autocast(sounds.device.type, enabled=False):
        samples = sounds.to(dtype) if sounds.is_floating_point() else sounds.to(dtype) / _FULL_SCALE
        samples = samples[:, : samples.shape[1] // hop * hop]
        frames = pad(samples, (0, window - hop)).unfold(1, window, hop)
        frames = frames * torch.hann_window(window, dtype=dtype, device=sounds.device)
        return (torch.fft.rfft(frames, n=points).abs() + _FLOOR).log().transpose(1, 2)
