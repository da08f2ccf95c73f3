"""Tubes of the token grid, and the reference of the gated norm."""

import math

import pytest
import torch

from longdream.worldmodel.kernels.gated_norm import from_tubes, gated_norm, gated_norm_reference, to_tubes

GRIDS = [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)]


@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_a_tube_is_a_block_of_the_grid_through_all_frames(grid: int, block: int) -> None:
    side = grid // block
    v = torch.arange(2 * 3 * grid * grid).view(2, 3, grid * grid)
    tubes = to_tubes(v, side)
    assert tubes.shape == (2 * side * side, 3, block * block)
    for clip in range(2):
        for row in range(side):
            for column in range(side):
                square = v[clip].view(3, grid, grid)[:, row * block :][:, :block, column * block :][:, :, :block]
                assert torch.equal(tubes[(clip * side + row) * side + column], square.flatten(1))
    assert torch.equal(from_tubes(tubes, side), v)


@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_the_reference_by_hand(grid: int, block: int) -> None:
    """A norm over the width, times weight and silu(gate), where the token lies in the frame."""
    side = grid // block
    y = torch.randn(2 * side * side, 3, block * block, 2, 5, dtype=torch.float64)
    gate = torch.randn(2, 3, grid * grid, 10, dtype=torch.float64)
    weight = torch.randn(10, dtype=torch.float64)
    got = gated_norm_reference(y, gate, weight, side)
    token = from_tubes(y, side).flatten(-2)[1, 2, -1]
    deviation = math.sqrt(float((token - token.mean()).square().mean()) + 1e-5)
    wanted = (token - token.mean()) / deviation * weight * gate[1, 2, -1] * gate[1, 2, -1].sigmoid()
    torch.testing.assert_close(got[1, 2, -1], wanted)
    assert torch.equal(gated_norm(y, gate, weight, side), got)  # no kernel computes in float64
