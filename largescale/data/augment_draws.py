"""The uniform numbers that each view is augmented by, and what each of them decides."""

from __future__ import annotations

DRAWS = 32
"""Uniform numbers per view (a few are spare, so that a new transform does not move the others)."""

# Which draw decides what. Only append: if a number moved, all views would change, and no run could be resumed.
(
    FLIP,
    ANGLE,
    JITTER,
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    HUE,
    ORDER,
    GAMMA,
    GRAY,
    BLUR,
    SIGMA,
    NOISE_STD,
    NOISE_KEY,
    ERASE,
    ERASE_H,
    ERASE_W,
    ERASE_TOP,
    ERASE_LEFT,
    ERASE_GREY,
    GAIN,
    SOLARISE,
) = (0, 1, 2, 3, 4, 5, 6, slice(7, 11), 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24)
