from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from largescale.data.task_views.shortcut_cures import normalised, single_channels, without_green_magenta

STD = [0.2, 0.3, 0.25]


def test_a_normalised_tile_has_mean_0_and_deviation_1_as_in_a_loop():
    tiles = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tile, found in zip(tiles, normalised(tiles), strict=True):
        for channel, own in zip(tile, found, strict=True):
            torch.testing.assert_close(own, (channel - channel.mean()) / channel.std(correction=0))


def test_brightness_and_contrast_of_a_tile_are_gone():
    tiles = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    changed = tiles * torch.tensor([0.5, 2, 3])[:, None, None] + torch.arange(6)[:, None, None, None]
    torch.testing.assert_close(normalised(changed), normalised(tiles), rtol=1e-4, atol=1e-4)


def test_a_flat_tile_becomes_0_whatever_its_value_and_size():
    for side in (3, 7, 64):
        values = torch.linspace(-2, 2, 101)[:, None, None, None].expand(-1, 3, side, side)
        assert torch.equal(normalised(values.contiguous()), torch.zeros_like(values))


def test_normalised_tiles_keep_their_type():
    tiles = torch.rand(2, 3, 8, 8).to(torch.bfloat16)
    found = normalised(tiles)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), normalised(tiles.float()), rtol=1e-2, atol=1e-2)


def test_one_channel_is_kept_and_the_others_are_faint_noise():
    ids, count = torch.arange(50), 9
    tiles = torch.randn(50 * count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 7
    found = single_channels(tiles, ids, seed=0, step=0)
    kept = (found == tiles).flatten(2).all(2)
    assert torch.equal(kept.sum(1), torch.ones(50 * count, dtype=torch.int64))
    shares = kept.float().mean(0)
    assert (shares - 1 / 3).abs().max() < 0.08, shares
    assert (kept.int().view(50, count, 3).argmax(2).float().std(1) > 0).all(), "tiles of an image are not all alike"
    noise = found[~kept] / 7
    assert 0.008 < noise.std() < 0.012 and noise.abs().max() < 0.1


def test_single_channels_are_a_function_of_seed_step_and_sample_alone():
    tiles = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))[[0, 1, 0]]
    together = single_channels(tiles.flatten(0, 1), torch.tensor([4, 7, 4]), seed=0, step=3).unflatten(0, (3, 4))
    alone = single_channels(tiles[1], torch.tensor([7]), seed=0, step=3)
    assert torch.equal(together[0], together[2]) and torch.equal(together[1], alone)
    assert not torch.equal(single_channels(tiles[1], torch.tensor([7]), seed=0, step=4), alone)


def fringed(num: int) -> Tensor:
    """Pictures of 48 px whose red and blue are drawn 5% larger than green, as a lens does."""
    noise = torch.randn(num, 1, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    green = 3 * avg_pool2d(noise, 3, 1, 1)
    larger = torch.tensor([[0.95, 0, 0], [0, 0.95, 0]], dtype=torch.float64).expand(num, -1, -1)
    magenta = grid_sample(green, affine_grid(larger, [num, 1, 48, 48], False), "bilinear", "reflection", False)
    return torch.cat([magenta, green, magenta], dim=1) / torch.tensor(STD, dtype=torch.float64)[:, None, None]


def in_tiles(images: Tensor) -> Tensor:
    """Nine tiles of 16 px of each image of 48 px, in reading order."""
    return images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def place_explained(tiles: Tensor) -> float:
    """Share of the variance of columns, left to right, that a linear probe explains on the other half of tiles; it sees
    how pixels of each channel go with those of each channel one to the left, there and one to the right.
    """
    place = torch.arange(len(tiles)).remainder(3).double() - 1
    seen = [
        (tiles[:, one, :, 1:-1] * tiles[:, other, :, 1 + by : 15 + by]).mean((1, 2))
        for one in range(3)
        for other in range(3)
        for by in (-1, 0, 1)
    ]
    x = torch.stack([*seen, torch.ones_like(place)], dim=1)
    half = len(tiles) // 2
    penalty = 1e-6 * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x[:half].T @ x[:half] / half + penalty, x[:half].T @ place[:half] / half)
    return 1 - float((x[half:] @ weights - place[half:]).square().mean() / place[half:].square().mean())


def test_what_a_lens_does_to_green_does_not_tell_a_tiles_place():
    images = fringed(100)
    assert place_explained(in_tiles(images)) > 0.8
    assert place_explained(in_tiles(without_green_magenta(images, STD))) < 0.1
    assert place_explained(single_channels(in_tiles(images), torch.arange(100), seed=0, step=0)) < 0.1


def test_the_projection_leaves_what_is_orthogonal_and_changes_nothing_twice():
    std = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    grey = torch.randn(2, 1, 5, 5, dtype=torch.float64).expand(2, 3, 5, 5) / std
    torch.testing.assert_close(without_green_magenta(grey, STD), grey)
    once = without_green_magenta(torch.randn(2, 3, 5, 5, dtype=torch.float64), STD)
    torch.testing.assert_close(without_green_magenta(once, STD), once)
