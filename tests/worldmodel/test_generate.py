"""Generated frames, one piece after another."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.worldmodel.config import DynamicsConfig, ForcingConfig
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.generate import Step, generate, read_context, slope
from longdream.worldmodel.mixers import attention
from longdream.worldmodel.objectives.flow import Flow
from longdream.worldmodel.objectives.mask import Mask
from longdream.worldmodel.objectives.teacher import Teacher

ACTIONS = 2
CHANNELS = 6


def build(mixer: str = "hybrid", objective: str = "flow", grid: int = 2, **options):
    """A context of 9 frames behind an M with random weights: objective, M, feat, state."""
    made = {"layers": 1, "width": 8, "num_heads": 2, "state_size": 3, "window": 4} | options
    forcing = ForcingConfig()
    dynamics = Dynamics(DynamicsConfig(mixer, **made), grid, CHANNELS, ACTIONS)
    with torch.no_grad():
        for weight in dynamics.parameters():
            weight += 0.2 * torch.randn_like(weight)
    kinds = {
        "flow": lambda: Flow(forcing, dynamics),
        "mask": lambda: Mask(forcing, dynamics, 3),
        "teacher": lambda: Teacher(forcing, dynamics, 3, ACTIONS),
    }
    feat, state = read_context(dynamics, *context(dynamics, 9))
    return kinds[objective](), dynamics, feat, state


def context(dynamics: Dynamics, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    first = torch.arange(frames).expand(2, -1) == 0
    return torch.rand(2, frames, dynamics.tokens, CHANNELS) * 2 - 1, torch.rand(2, frames, ACTIONS), first


def held(state: State) -> int:
    """Bytes of memory behind the tensors, seen by them or not."""
    sizes = []
    state.map(lambda t: sizes.append(t.untyped_storage().nbytes()) or t)
    return sum(sizes)


@torch.no_grad()
def test_a_context_is_taken_in_whole_or_in_pieces() -> None:
    for together in (1, 3):
        _, dynamics, _, _ = build(chunk_frames=together, grid=1)
        clip = context(dynamics, 12)
        whole = read_context(dynamics, *clip)
        parts = read_context(dynamics, *clip, piece=5)
        head = read_context(dynamics, *(v[:, :6] for v in clip))[1]
        parts_too = read_context(dynamics, *(v[:, 6:] for v in clip), state=head)
        for feat, state in (parts, parts_too):
            torch.testing.assert_close(feat, whole[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state.mixers, whole[1].mixers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["hybrid", "window"])
def test_ten_thousand_frames_in_constant_memory(mixer: str) -> None:
    objective, dynamics, feat, state = build(mixer, grid=1)
    before = held(state)
    sizes = set()
    frames = 0
    for piece in generate(objective, dynamics, feat, state, torch.rand(2, 10_000, ACTIONS), steps=1, piece=50):
        sizes.add(held(piece.state))
        frames += piece.z.shape[1]
        assert piece.z.isfinite().all() and piece.feat.isfinite().all()
        assert all(t.isfinite().all() for t in (*piece.state.mixers, *piece.state.k, *piece.state.v))
    assert frames == 10_000 and sizes == {before}


def test_the_cache_of_causal_attention_grows_up_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_CONTEXT_FRAMES", 15)
    objective, dynamics, feat, state = build("causal")
    assert dynamics.grows
    pieces = generate(objective, dynamics, feat, state, torch.rand(2, 12, ACTIONS), steps=1)
    assert [piece.state.k[0].shape[1] for piece in pieces] == [10, 11, 12, 13, *[14] * 8]


@pytest.mark.parametrize("objective", ["flow", "mask", "teacher"])
def test_frame_after_frame_is_sampled_and_committed(objective: str) -> None:
    drawn, dynamics, feat, state = build(objective=objective)
    action = torch.rand(2, 4, ACTIONS)
    torch.manual_seed(5)
    made = list(generate(drawn, dynamics, feat, state, action, steps=2, temperature=0.7))
    torch.manual_seed(5)
    go_on = torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        for t, piece in enumerate(made):
            z = drawn.sample(dynamics, feat, state, action[:, t], 2, 0.7)
            feat, state = dynamics.commit(state, z, action[:, t], go_on)
            assert torch.equal(piece.z[:, 0], z) and torch.equal(piece.feat[:, 0], feat)
            assert all(torch.equal(a, b) for a, b in zip(piece.state.k, state.k, strict=True))


class Silent(Flow):
    """Flow that begins with no noise at all."""

    def pure_noise(self, like: Tensor, temperature: float) -> Tensor:
        return torch.zeros_like(like)


def test_pieces_in_order_are_frames_one_by_one() -> None:
    """Autoregressive pieces of any size are what single frames are; other orders are other computations."""
    _, dynamics, feat, state = build()
    objective = Silent(ForcingConfig(), dynamics)
    action = torch.rand(2, 6, ACTIONS)

    def made(**how) -> Tensor:
        return torch.cat([piece.z for piece in generate(objective, dynamics, feat, state, action, 3, **how)], 1)

    one_by_one = made()
    assert one_by_one.shape == (2, 6, 4, CHANNELS)
    torch.testing.assert_close(made(piece=4, order="autoregressive"), one_by_one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made(piece=6, order=3.0), one_by_one, rtol=1e-4, atol=1e-5)
    others = [made(piece=3, order=order) for order in ("full", "pyramid", 0.5)]
    for i, other in enumerate(others):
        assert all((other - x).abs().amax() > 1e-3 for x in (one_by_one, *others[:i]))


def test_chunks_of_attention_are_generated_whole() -> None:
    objective, dynamics, feat, state = build(chunk_frames=3, window=6)
    pieces = list(generate(objective, dynamics, feat, state, torch.rand(2, 9, ACTIONS), steps=2))
    assert [piece.z.shape[1] for piece in pieces] == [3, 3, 3]
    assert all(piece.z.abs().amax() <= 1 + 1e-5 for piece in pieces)
    first = torch.zeros(2, 3, dtype=torch.bool)
    with torch.no_grad():  # the last piece went into the state as what it is, clean
        out = dynamics(pieces[2].z, torch.rand(2, 3, ACTIONS), torch.ones(2, 3), first, pieces[1].state)
    torch.testing.assert_close(out.state.last, pieces[2].state.last)


@pytest.mark.parametrize("piece", [1, 2])
def test_finished_frames_are_trusted_as_far_as_their_level_says(piece: int) -> None:
    """Committed at a level below 1, without noise."""
    _, dynamics, feat, state = build()
    objective = Silent(ForcingConfig(), dynamics)
    action = torch.rand(2, 2, ACTIONS)

    def run(**how):
        *_, last = generate(objective, dynamics, feat, state, action, 1, piece=piece, **how)
        return last

    plain = run()
    doubtful = run(context_level=0.9)
    assert not torch.equal(plain.state.k[0], doubtful.state.k[0])
    torch.testing.assert_close(doubtful.state.last, 0.9 * doubtful.z[:, -1])
    if piece == 2:
        assert torch.equal(plain.z, doubtful.z)  # only what comes after a piece can tell


def test_what_cannot_be_generated() -> None:
    objective, dynamics, feat, state = build()
    action = torch.rand(2, 4, ACTIONS)
    with pytest.raises(ValueError, match="order = upwards: use one of full, pyramid, autoregressive"):
        list(generate(objective, dynamics, feat, state, action, 2, order="upwards", piece=2))
    with pytest.raises(ValueError, match="pieces of 0 frames"):
        list(generate(objective, dynamics, feat, state, action, 2, piece=0))
    teacher, dynamics, feat, state = build(objective="teacher")
    with pytest.raises(ValueError, match="Teacher draws frames one by one"):
        list(generate(teacher, dynamics, feat, state, action, 2, piece=2))
    objective, dynamics, feat, state = build(chunk_frames=3)
    for how in ({"piece": 2}, {}):
        with pytest.raises(ValueError, match=r"whole chunks of worldmodel\.chunk_frames = 3"):
            list(generate(objective, dynamics, feat, state, action, 2, **how))


def test_orders_are_slopes() -> None:
    assert [slope(order, 5) for order in ("full", "pyramid", "autoregressive", 2.5)] == [0, 1, 5, 2.5]


@pytest.mark.parametrize("mixer", ["hybrid", "window"])
def test_a_captured_step_generates_the_same(mixer: str) -> None:
    """What a CUDA graph does, rehearsed: inputs that are copies, outputs that the next call overwrites."""
    objective, dynamics, feat, state = build(mixer)
    action = torch.rand(2, 7, ACTIONS)
    kept = []

    def capture(step: Step) -> Step:
        def again(*args: Any) -> Any:
            result = step(*pytree.tree_map(torch.clone, args))
            if not kept:
                kept.append(pytree.tree_map(torch.clone, result))
            pytree.tree_map(lambda to, new: to.copy_(new), kept[0], result)
            return kept[0]

        return again

    def frames(capture: Any) -> list[Tensor]:
        torch.manual_seed(1)
        pieces = list(generate(objective, dynamics, feat, state, action, 2, capture=capture))
        return [torch.cat([piece[i] for piece in pieces], 1) for i in range(2)]

    for plain, captured in zip(frames(None), frames(capture), strict=True):
        assert torch.equal(plain, captured)
