"""Forcing in its other forms: clean prefixes on some clips, velocities as what is predicted, long denoising steps."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.dynamics import Dynamics, DynamicsConfig
from longdream.worldmodel.objectives.base import Flow, ForcingConfig, Mask, velocity

BATCH, FRAMES, ACTIONS, CHANNELS = 4, 12, 2, 6


def build(fresh: bool = False, **options) -> tuple[Flow, Dynamics]:
    dynamics = Dynamics(DynamicsConfig(layers=1, width=24, heads=2, state_size=5, window=2), 1, CHANNELS, ACTIONS)
    flow = Flow(ForcingConfig(**options), dynamics)
    with torch.no_grad():
        for weight in () if fresh else dynamics.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return flow, dynamics


def clip(batch: int = BATCH, frames: int = FRAMES) -> tuple[Tensor, Tensor, Tensor]:
    first = torch.arange(frames).expand(batch, -1) == 0
    return torch.rand(batch, frames, 1, CHANNELS) * 2 - 1, torch.rand(batch, frames, ACTIONS), first


# -- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "least"), [(0.5, 0.5), (1.0, 0.75), (0.25, 0.0), (0.0, 0.5)])
def test_a_share_of_the_clips_has_a_clean_prefix(share: float, least: float) -> None:
    flow, dynamics = build(stream="one", prefix=share, prefix_least=least)
    with torch.no_grad():
        found = flow.run(dynamics, *clip(2000), 0 if share < 1 else 1)
    length = found.clean.sum(1)
    assert torch.equal(found.clean, torch.arange(FRAMES) < length[:, None])
    with_one = length[length > 0]
    if least:
        assert len(with_one) / 2000 == pytest.approx(share, abs=0.04)
    assert ((with_one >= least * FRAMES) & (with_one < FRAMES)).all()
    if share:
        assert set(with_one.tolist()) == set(range(max(1, int(least * FRAMES)), FRAMES))
    assert found.loss.isfinite()


def test_prefixes_are_whole_chunks() -> None:
    model = Dynamics(DynamicsConfig(width=8, heads=2, window=6, frames_together=3), 1, CHANNELS, ACTIONS)
    found = Flow(ForcingConfig(stream="one"), model).run(model, *clip(50), 0)
    assert set(found.clean.sum(1).tolist()) == {6, 9}
    assert Flow(ForcingConfig(stream="two"), model).run(model, *clip(5), 0).loss.isfinite()


def test_dreams_need_clean_frames_to_begin_from() -> None:
    flow, dynamics = build(stream="one", prefix=0.5)
    with pytest.raises(ValueError, match=r"forcing\.prefix = 0\.5: dreams begin at clean frames"):
        flow.run(dynamics, *clip(), 1)


@pytest.mark.parametrize("stream", ["one", "two"])
def test_a_state_is_carried_from_clip_to_clip(stream: str) -> None:
    flow, dynamics = build(stream=stream)
    z, action, first = clip()
    assert flow.run(dynamics, z, action, first, 0).end is None  # nobody asked for one
    begun = flow.run(dynamics, z, action, first, 0, state=dynamics.initial(BATCH))
    assert begun.end is not None and not begun.end.last.requires_grad
    torch.testing.assert_close(begun.end.last, z[:, -1])  # clean, in stream one too
    go_on, ones = torch.zeros_like(first), torch.ones(BATCH, FRAMES)
    found = flow.run(dynamics, z, action, go_on, 0, state=begun.end)
    with torch.no_grad():
        wanted = dynamics(z, action, ones, go_on, begun.end).feat
        fresh = dynamics(z, action, ones, go_on, dynamics.initial(BATCH)).feat
    torch.testing.assert_close(found.feat[found.clean], wanted[found.clean], rtol=1e-3, atol=1e-4)
    assert (found.feat[:, 0] - fresh[:, 0]).abs().amax() > 1e-3


# -- velocities -------------------------------------------------------------------------------------------------------


def test_velocity_is_the_way_from_noise_to_latents() -> None:
    z, noise, level = torch.rand(3, 1, 4), torch.randn(3, 1, 4), torch.tensor([0.0, 0.3, 0.9])
    at = level[:, None, None]
    noisy = (1 - at) * noise + at * z
    torch.testing.assert_close(velocity(z, noisy, level), z - noise, rtol=1e-4, atol=1e-5)
    flow, _ = build(predict="v")
    torch.testing.assert_close(flow.clean(z - noise, noisy, level), z)
    assert flow.error(z - noise, z, noisy, level).amax() < 1e-10
    torch.testing.assert_close(flow.error(z - noise + 2, z, noisy, level), torch.full((3,), 4.0))  # evenly weighted
    moved = flow.advance(noisy, z - noise, level, torch.full((3,), 0.95), 1.0)
    torch.testing.assert_close(moved, 0.05 * noise + 0.95 * z, rtol=1e-4, atol=1e-5)


# -- long steps -------------------------------------------------------------------------------------------------------


def told(noisy: Tensor, level: Tensor, fineness: Tensor | None) -> SimpleNamespace:
    """In M's place: a prediction that depends on all that M is told."""
    assert fineness is not None
    return SimpleNamespace(pred=0.3 * noisy + (level + 2 * fineness)[..., None, None])


@pytest.mark.parametrize("predict", ["x", "v"])
def test_a_long_step_shall_lead_where_two_halves_of_it_lead(predict: str) -> None:
    """Frames of 1, 2 and 4 steps, one of the finest, 8, and a clean one."""
    flow, _ = build(predict=predict, shortcut=0.5, finest=8)
    steps, level = torch.tensor([[1.0, 2, 4, 8, 8]]), torch.tensor([[0.0, 0.5, 0.25, 0.3, 1.0]])
    z, noisy = torch.rand(1, 5, 1, CHANNELS), torch.randn(1, 5, 1, CHANNELS)
    noisy[0, 4] = z[0, 4]
    landing = flow.landing(told, z, noisy, level, steps)
    assert torch.equal(landing[0, 3:], z[0, 3:])
    for t, (count, fineness) in enumerate(((2, 1 / 3), (4, 2 / 3), (8, 1.0))):
        there = noisy[0, t]
        for at in (level[0, t], level[0, t] + 1 / count):
            pred = 0.3 * there + at + 2 * fineness
            there = there + (pred if predict == "v" else (pred - there) / (1 - at)) / count
        # one step of twice that length towards the landing arrives at the same place
        to = level[0, t : t + 1] + 2 / count
        once = noisy[0, t : t + 1] + (to - level[0, t]) / (1 - level[0, t]) * (landing[0, t] - noisy[0, t])
        torch.testing.assert_close(once[0], there, rtol=1e-4, atol=1e-5)


def test_paces() -> None:
    flow, _ = build(shortcut=0.4, finest=16)
    level, steps = flow.pace(torch.full((50_000,), 0.77))
    assert steps is not None
    coarse = steps < 16
    assert coarse.float().mean() == pytest.approx(0.4, abs=0.02) and (level[~coarse] == 0.77).all()
    for count in (1.0, 2.0, 4.0, 8.0):
        begun = level[steps == count] * count
        assert set(begun.tolist()) == set(range(int(count))) and len(begun) == pytest.approx(5_000, rel=0.1)
    fineness = flow.fineness(torch.tensor([1.0, 4, 16, 64]))
    assert fineness is not None and fineness.tolist() == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("stream", ["one", "two"])
def test_only_with_the_term_is_m_told_of_steps(stream: str) -> None:
    plain, with_term = build(fresh=True, stream=stream)[1], build(stream=stream, shortcut=0.5)
    extra = set(with_term[1].state_dict()) - set(plain.state_dict())
    assert extra == {"pace.weight", "pace.bias"} and plain.dimmed and not with_term[1].dimmed
    flow, dynamics = with_term
    found = flow.run(dynamics, *clip(), 1)
    found.loss.backward()
    assert found.loss.isfinite() and all(p.grad is not None and p.grad.any() for p in dynamics.parameters())
    # what is clean is as fine as can be; a frame that is drawn in few steps is another
    state, (z, action, _) = dynamics.initial(BATCH), clip()
    ask = z[:, 0], action[:, 0], torch.full((BATCH,), 0.5)
    with torch.no_grad():
        asked = [dynamics.predict(state, *ask, fine) for fine in (None, torch.ones(BATCH), torch.zeros(BATCH))]
    assert torch.equal(asked[0], asked[1]) and not torch.allclose(asked[0], asked[2])


@pytest.mark.parametrize("options", [{"shortcut": 0.5}, {"predict": "v"}])
def test_only_flow_has_steps_and_velocities(options: dict) -> None:
    dynamics = Dynamics(DynamicsConfig(), 1, CHANNELS, ACTIONS)
    with pytest.raises(ValueError, match=r"need forcing\.objective = flow"):
        Mask(ForcingConfig(**options), dynamics, 3)
    with pytest.raises(ValueError, match=r"forcing\.finest = 24 is no power of 2: use 16"):
        Flow(ForcingConfig(finest=24), dynamics)


# -- learning ---------------------------------------------------------------------------------------------------------


def two_modes(steps: int, updates: int, **options) -> tuple[Tensor, Tensor]:
    """Train on what is, after the same frame, all-plus or all-minus at random; draw 400 in so many steps. Where they
    lie, and the surprise at a frame between the two and at one far from both."""
    flow, dynamics = build(fresh=True, ramp=False, **options)
    first, action = torch.arange(2).expand(64, -1) == 0, torch.zeros(64, 2, ACTIONS)
    optimiser = torch.optim.Adam(dynamics.parameters(), 4e-3)
    for _ in range(updates):
        z = 0.8 * (torch.randint(0, 2, (64, 2, 1, 1)) * 2.0 - 1).repeat(1, 1, 1, CHANNELS)
        z[:, 0] = 0
        optimiser.zero_grad()
        flow.run(dynamics, z, action, first, 1).loss.backward()
        optimiser.step()
    with torch.no_grad():
        go, frame = torch.zeros(400, ACTIONS), torch.zeros(400, 1, CHANNELS)
        feat, state = dynamics.commit(dynamics.initial(400), frame, go, torch.ones(400, dtype=torch.bool))
        drawn = flow.sample(dynamics, feat, state, go, steps)[:, 0]
        surprise = [flow.surprise(dynamics, feat, state, go, frame + at).mean() for at in (0.0, 3.0)]
    return drawn, torch.stack(surprise)


def sides(drawn: Tensor) -> tuple[float, float]:
    """Shares of what was drawn that lie clearly on the one and on the other side."""
    up, down = ((sign * drawn > 0.25).all(1).float().mean() for sign in (1, -1))
    return float(up), float(down)


def test_velocities_draw_both_modes() -> None:
    drawn, surprise = two_modes(8, 150, predict="v")
    assert sum(sides(drawn)) > 0.8 and min(sides(drawn)) > 0.2
    assert surprise[0] < 0.5 < 4 < surprise[1]


def test_with_shortcuts_one_step_takes_sides() -> None:
    """Without, it stays at the mean of the two."""
    assert sum(sides(two_modes(1, 150, shortcut=0.5, finest=8)[0])) > 0.4
    assert sum(sides(two_modes(1, 60)[0])) < 0.1
