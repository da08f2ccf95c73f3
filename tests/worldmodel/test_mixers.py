"""How the scans of M are laid over the token grid, and how long they remember when nothing is learned yet."""

import pytest
import torch

from worldmodel.dynamics import DynamicsConfig, ScanMixer

GRIDS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (6, 3)]


@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_a_token_reaches_its_own_block_and_no_other(grid: int, block: int) -> None:
    """In its own frame the tokens that come after it, row by row; later all of the block."""
    mixer = ScanMixer(DynamicsConfig(width=8, heads=2, state_size=3, chunk=2), grid, block).double()
    tokens = grid * grid
    h = torch.randn(1, 3, tokens, 8, dtype=torch.float64, requires_grad=True)
    state = mixer.initial(1, "cpu").double()
    assert state.shape == (1, (grid // block) ** 2, 2, 3, 4)
    y, _, end, _ = mixer(h, torch.zeros(1, 3, dtype=torch.bool), state, None, None)
    assert end.shape == state.shape
    for to in range(tokens):
        grad = torch.autograd.grad(y[0, 1, to].sum(), h, retain_graph=True)[0][0].abs().sum(-1) > 1e-12
        for frame in range(3):
            for since in range(tokens):
                (r, c), (r0, c0) = divmod(to, grid), divmod(since, grid)
                same = (r // block, c // block) == (r0 // block, c0 // block)
                wanted = same and (frame == 0 or (frame == 1 and since <= to))
                assert bool(grad[frame, since]) == wanted


@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_memory_begins_with_time_constants_from_4_to_1000_frames(grid: int, block: int) -> None:
    """Frames, not tokens: however many tokens a block has."""
    mixer = ScanMixer(DynamicsConfig(width=60, heads=5, state_size=3), grid, block)
    h, empty = torch.randn(1, 1, grid * grid, 60), mixer.initial(1, "cpu")
    with torch.no_grad():
        kept = mixer.step(h, torch.ones_like(empty))[1] - mixer.step(h, empty)[1]
    frames = -1 / kept.log().mean((0, 1, 3, 4))
    wanted = torch.tensor([4.0, 15.9, 63.2, 251.5, 1000.0])
    assert ((frames / wanted).log().abs() < 0.2).all()


def test_writing_is_gated_and_keys_are_of_unit_size() -> None:
    """However large its input, what a frame writes stays of the size of its values."""
    mixer = ScanMixer(DynamicsConfig(width=60, heads=5, state_size=16), 1, 1)
    with torch.no_grad():
        mixer.inp.weight[120:152] *= 1e4  # both keys
        state = mixer.step(torch.randn(64, 1, 1, 60), mixer.initial(64, "cpu"))[1]
        values = mixer.inp(torch.randn(64, 60))[:, 60:120].unflatten(-1, (5, 12))
    assert state.square().sum(-2).mean().sqrt() < values.square().mean().sqrt()
