from __future__ import annotations

import pytest
import torch

from largescale.models.autoencoders import ConvAutoencoder, Repair, code_side, filled_from_neighbours


@pytest.mark.parametrize(
    "side, widths, code", [(28, [4, 5, 6], 7), (96, [2, 3, 4, 5, 6], 6), (227, [2, 3, 4], 56), (5, [3, 4], 2)]
)
def test_images_of_any_size_come_back_in_theirs(side, widths, code):
    network, images = ConvAutoencoder(widths), torch.randn(2, 3, side, side)
    found = network.encode(images)
    assert found.shape == (2, widths[-1], code, code) and code_side(side, widths) == code
    assert network.decode(found, side).shape == images.shape


def test_where_nothing_was_dropped_repair_changes_nothing_and_elsewhere_it_does():
    network, repair = ConvAutoencoder([4, 5, 6]).eval(), Repair([6, 5]).eval()
    code = network.encode(torch.randn(2, 3, 32, 32))
    dropped = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    whole = network.decode(code, 32)
    assert torch.equal(network.decode(code, 32, repair, dropped), whole)
    dropped[1, 0, 0, 0] = True
    changed = (network.decode(code, 32, repair, dropped) != whole).any(1)
    assert not changed[0].any() and changed[1, :4, :4].any()
    assert not changed[1, 16:].any() and not changed[1, :, 16:].any()


def test_dropped_entries_become_the_mean_of_their_neighbours():
    code = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    dropped = torch.rand(2, 1, 4, 5) < 0.5
    found = filled_from_neighbours(code, dropped)
    for b in range(2):
        for y in range(4):
            for x in range(5):
                near = [
                    code[b, :, y + i, x + j]
                    for i in (-1, 0, 1)
                    for j in (-1, 0, 1)
                    if (i or j) and 0 <= y + i < 4 and 0 <= x + j < 5
                ]
                wanted = torch.stack(near).mean(0) if dropped[b, 0, y, x] else code[b, :, y, x]
                torch.testing.assert_close(found[b, :, y, x], wanted)
