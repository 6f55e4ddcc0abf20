"""Augmentation on CPUs: the changes of `augment.py`, of the views that they apply to, in place and in the cache.

Views are sorted by the order of their colour jitter, and go through the whole chain as many at a time as fit into the
processor's cache with what is computed on the way. Their colour planes lie apart, [3, n, H, W], so that sums, products
and comparisons run over contiguous memory, where a CPU does sixteen at once; nothing is chosen pixel by pixel.

A view's bits do not depend on the views beside it, nor on the number of threads: every result is computed from one
pixel, or from few pixels of the same view, in the same order. (The last bit of gamma, noise and rotation may: torch
rounds powers and logarithms differently at the end of its vectors.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from largescale.config import AugmentConfig
from largescale.data import augment_draws as draw
from largescale.data.changes import LUMA, blur_kernel, erase, gaussian_noise, rotate, solarise
from largescale.data.jitter import orders, parts

_PIXELS = 1 << 16
"""Pixels that one thread changes at a time: their planes, 256 KiB each, fit into its share of the cache."""

_PLANES = 6
"""Planes that a change may need besides those that it changes."""

_Change = Callable[[Tensor, slice | Tensor], object]
"""Changes views [3, n, H, W] in place; told which of all the sorted views these are."""


class CpuChain:
    """Changes views as `Augment` says; arguments are its own."""

    def __init__(
        self, config: AugmentConfig, mean: list[float], std: list[float], dtype: torch.dtype, out_dtype: torch.dtype
    ) -> None:
        self.config, self.dtype, self.out_dtype = config, dtype, out_dtype
        self._parts = parts(config) if config.jitter > 0 else []
        self._mean, self._std = (torch.tensor(one, dtype=dtype)[:, None, None, None] for one in (mean, std))

    def __call__(self, views: Tensor, draws: Tensor, counters: Tensor | None) -> Tensor:
        """Augment.

        Args:
            views: uint8 [N, 3, H, W].
            draws: float64 [N, DRAWS].
            counters: of `noise_counters`, if there is noise.

        Returns:
            [N, 3, H, W], channels last in memory.
        """
        num, _, height, width = views.shape
        pixels, area = views.permute(0, 2, 3, 1), height * width
        result = torch.empty(num, height, width, 3, dtype=self.out_dtype)
        most = max(1, min(num, _PIXELS * torch.get_num_threads() // area))
        memory, scratch = (torch.empty(planes * most * area, dtype=self.dtype) for planes in (3, _PLANES))
        order = orders(draws, len(self._parts))
        order[draws[:, draw.JITTER] >= self.config.jitter] = -1
        rows = self._sorted(order, draws)
        changes = list(self._changes(draws[rows], order[rows], counters, scratch, (height, width)))
        for start in range(0, num, most):
            chunk = slice(start, min(num, start + most))
            chosen = pixels.index_select(0, rows[chunk]) if self._parts else pixels[chunk]
            x = _planes(memory, 3, (len(chosen), height, width))
            x.copy_(chosen.permute(3, 0, 1, 2)).div_(255)
            for applies, change in changes:
                _change_some(x, start, applies[chunk], change)
            x.sub_(self._mean).div_(self._std)
            changed = x.permute(1, 2, 3, 0)
            if self._parts:
                result.flatten(1).index_copy_(0, rows[chunk], changed.to(self.out_dtype).flatten(1))
            else:
                result[chunk] = changed
        return result.permute(0, 3, 1, 2)

    def _sorted(self, order: Tensor, draws: Tensor) -> Tensor:
        """Views by the order of their jitter, those to blur last where it is the same: row numbers [N]; as they come if
        there is no jitter.
        """
        if not self._parts:
            return torch.arange(len(draws))
        num_parts = len(self._parts)
        code = (order * num_parts ** torch.arange(num_parts - 1, -1, -1)).sum(1)
        return (2 * code + (draws[:, draw.BLUR] < self.config.blur)).argsort(stable=True)

    def _changes(
        self, draws: Tensor, order: Tensor, counters: Tensor | None, scratch: Tensor, shape: tuple[int, int]
    ) -> Iterator[tuple[list[bool], _Change]]:
        """The changes one after the other, each with the views that it applies to, of N with such draws."""
        config, uniforms, every = self.config, draws.to(self.dtype), [True] * len(draws)

        def where(place: int, probability: float) -> list[bool]:
            return (draws[:, place] < probability).tolist()

        if config.flip > 0:
            yield where(draw.FLIP, config.flip), lambda x, _: x.copy_(x.flip(-1))
        if config.rotate_degrees > 0:
            angles = (2 * uniforms[:, draw.ANGLE] - 1) * math.radians(config.rotate_degrees)
            yield every, lambda x, some: _images(x).copy_(rotate(_images(x), angles[some]))
        amounts = [part.amounts(uniforms)[:, None, None] for part in self._parts]
        for slot in order.T.tolist():
            for number, part in enumerate(self._parts):
                change = partial(_jitter, change=_JITTER[part.name], amounts=amounts[number], scratch=scratch)
                yield [one == number for one in slot], change
        if config.gamma > 0:
            exponents = torch.exp((2 * uniforms[:, draw.GAMMA] - 1) * config.gamma)[:, None, None]
            yield every, lambda x, some: x.clamp_min_(0).pow_(exponents[some])
        if config.gain > 0:
            gains = (1 + (2 * uniforms[:, draw.GAIN] - 1) * config.gain)[:, None, None]
            yield every, lambda x, some: x.mul_(gains[some])
        if config.grayscale > 0:
            yield where(draw.GRAY, config.grayscale), lambda x, _: x.copy_(_luma(x, *_planes(scratch, 2, x.shape[1:])))
        if config.blur > 0:
            low, high = config.blur_sigma
            sigma = (low + uniforms[:, draw.SIGMA] * (high - low)).double()
            kernels = blur_kernel(sigma, high, shape[1]).to(self.dtype)
            yield where(draw.BLUR, config.blur), lambda x, some: _blur(x, kernels[some])
        if config.solarise > 0:
            threshold = config.solarise_threshold
            yield where(draw.SOLARISE, config.solarise), lambda x, _: x.copy_(solarise(x, threshold))
        if counters is not None:
            keys, strengths = draws[:, draw.NOISE_KEY], uniforms[:, draw.NOISE_STD] * config.noise

            def add_noise(x: Tensor, some: slice | Tensor) -> None:
                noise = gaussian_noise(keys[some], counters, torch.Size(shape), self.dtype)
                x.add_(noise[:, 0].mul_(strengths[some][:, None, None]))

            yield every, add_noise
        if config.erase > 0:
            sides, erased, greys = config.erase_side, draws[:, draw.ERASE] < config.erase, uniforms[:, draw.ERASE_GREY]

            def erase_some(x: Tensor, some: slice | Tensor) -> None:
                changed = erase(_images(x), erased[some], draws[some], (sides[0], sides[1]), greys[some])
                _images(x).copy_(changed)

            yield every, erase_some


def _change_some(x: Tensor, start: int, applies: list[bool], change: _Change) -> None:
    """Change those of the views [3, n, H, W] that it applies to; the first is `start` of all."""
    places = [place for place, chosen in enumerate(applies) if chosen]
    if not places:
        return
    first, end = places[0], places[-1] + 1
    if end - first == len(places):
        change(x[:, first:end], slice(start + first, start + end))
    else:
        numbers = torch.tensor(places)
        some = x.index_select(1, numbers)
        change(some, numbers + start)
        x.index_copy_(1, numbers, some)


def _planes(memory: Tensor, number: int, shape: tuple[int, ...]) -> Tensor:
    """The beginning of a piece of memory as planes [number, *shape]."""
    return memory[: number * math.prod(shape)].view(number, *shape)


def _images(x: Tensor) -> Tensor:
    """Planes [3, n, H, W] as images [n, 3, H, W]."""
    return x.transpose(0, 1)


def _jitter(
    x: Tensor,
    some: slice | Tensor,
    *,
    change: Callable[[Tensor, Tensor, Tensor], None],
    amounts: Tensor,
    scratch: Tensor,
) -> None:
    change(x, amounts[some], _planes(scratch, _PLANES, x.shape[1:]))


def _luma(x: Tensor, grey: Tensor, other: Tensor) -> Tensor:
    """Grey values of views [3, n, H, W], written to the first of two planes [n, H, W]."""
    torch.mul(x[0], LUMA[0], out=grey)
    for channel in (1, 2):
        grey.add_(torch.mul(x[channel], LUMA[channel], out=other))
    return grey


def _brightness(x: Tensor, factor: Tensor, planes: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor, planes: Tensor) -> None:
    # Rows first, since torch splits the sum over a whole view among its threads if there is only one view.
    sums = x.sum(-1).sum(-1, keepdim=True)[..., None]
    mean = (LUMA[0] * sums[0] + LUMA[1] * sums[1] + LUMA[2] * sums[2]) / (x.shape[-2] * x.shape[-1])
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor, planes: Tensor) -> None:
    grey = _luma(x, *planes[:2]).mul_(1 - factor)
    x.mul_(factor).add_(grey).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor, planes: Tensor) -> None:
    """As `changes.hue`, without a division or a choice: the angle is counted in sixths of the circle and multiplied by
    the chroma c, so that c is 1/6 of the circle; the channels are then |angle - 3c| - c for red, 2c - |angle - 2c| for
    green and 2c - |angle - 4c| for blue, cut to [0, c], above the smallest.
    """
    red, green, blue = x
    value, smallest, chroma, angle, other, mask = planes
    torch.maximum(red, green, out=value).clamp_min_(blue)
    torch.minimum(red, green, out=smallest).clamp_max_(blue)
    torch.sub(value, smallest, out=chroma)

    # From -c to 5c: 4c + red - green where blue is largest, then the others where these are.
    torch.mul(chroma, 4, out=angle).add_(red).sub_(green)
    torch.mul(chroma, 2, out=other).add_(blue).sub_(red).sub_(angle)
    angle.add_(other.mul_(torch.eq(value, green, out=mask)))
    torch.sub(green, blue, out=other).sub_(angle)
    angle.add_(other.mul_(torch.eq(value, red, out=mask)))

    sixths = 6 * shift
    turn = sixths.remainder(6)
    turn = torch.where(turn < 1, turn + 6, turn)  # so that the angle is in [0, 12c)
    angle.add_(torch.mul(chroma, turn, out=other))
    torch.mul(chroma, 6, out=other)
    angle.sub_(other.mul_(torch.ge(angle, other, out=mask)))

    torch.mul(chroma, 3, out=other)
    torch.sub(angle, other, out=red).abs_().sub_(chroma).add_(smallest)
    torch.mul(chroma, 2, out=other)
    torch.mul(chroma, 4, out=mask)
    torch.sub(angle, other, out=green).abs_()
    torch.sub(angle, mask, out=blue).abs_()
    other.add_(smallest)
    torch.sub(other, green, out=green)
    torch.sub(other, blue, out=blue)
    x.clamp_min_(smallest).clamp_max_(value)


_JITTER: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}


def _blur(x: Tensor, kernel: Tensor) -> None:
    """As `changes.gaussian_blur`, by kernels [n, 2 * radius + 1]: shifted images lie in one piece of memory each, a
    few numbers at the ends of rows being computed in vain.
    """
    colours, num, height, width = x.shape
    taps = kernel.shape[1]
    radius, weights = taps // 2, kernel.T[..., None]
    wide = x.new_empty(colours, num, height, width + 2 * radius)
    wide[..., radius:-radius] = x
    wide[..., :radius] = x[..., 1 : radius + 1].flip(-1)
    wide[..., -radius:] = x[..., -radius - 1 : -1].flip(-1)
    flat, total = wide.flatten(2), torch.empty_like(wide)
    length = flat.shape[2] - 2 * radius
    _weighted_sum([flat[..., place : place + length] for place in range(taps)], weights, total.flatten(2)[..., :length])
    high = x.new_empty(colours, num, height + 2 * radius, width)
    high[:, :, radius:-radius] = total[..., :width]
    high[:, :, :radius] = high[:, :, radius + 1 : 2 * radius + 1].flip(2)
    high[:, :, -radius:] = high[:, :, -2 * radius - 1 : -radius - 1].flip(2)
    flat, length = high.flatten(2), height * width
    parts = [flat[..., place * width : place * width + length] for place in range(taps)]
    _weighted_sum(parts, weights, x.flatten(2))


def _weighted_sum(parts: list[Tensor], weights: Tensor, total: Tensor) -> None:
    """Weighted sum of parts [3, n, length], by weights [parts, n, 1], written to `total`."""
    torch.mul(parts[0], weights[0], out=total)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(part, weight)
