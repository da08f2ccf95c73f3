"""Forcing in its other forms: clean prefixes on some clips, long denoising steps."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.config import DynamicsConfig, ForcingConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.objectives import base
from longdream.worldmodel.objectives import flow as flow_module
from longdream.worldmodel.objectives.flow import Flow, velocity
from longdream.worldmodel.objectives.mask import Mask

BATCH = 4
FRAMES = 12
ACTIONS = 2
CHANNELS = 6


def build(fresh: bool = False, **options) -> tuple[Flow, Dynamics]:
    dynamics = Dynamics(DynamicsConfig(layers=1, width=24, num_heads=2, state_size=5, window=2), 1, CHANNELS, ACTIONS)
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
def test_a_share_of_the_clips_has_a_clean_prefix(share: float, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MIN_PREFIX", least)
    flow, dynamics = build(history="noisy", prefix=share)
    with torch.no_grad():
        out = flow.run(dynamics, *clip(2000), 0 if share < 1 else 1)
    length = out.clean.sum(1)
    assert torch.equal(out.clean, torch.arange(FRAMES) < length[:, None])
    with_one = length[length > 0]
    if least:
        assert len(with_one) / 2000 == pytest.approx(share, abs=0.04)
    assert ((with_one >= least * FRAMES) & (with_one < FRAMES)).all()
    if share:
        assert set(with_one.tolist()) == set(range(max(1, int(least * FRAMES)), FRAMES))
    assert out.loss.isfinite()


def test_prefixes_are_whole_chunks() -> None:
    model = Dynamics(DynamicsConfig(width=8, num_heads=2, window=6, chunk_frames=3), 1, CHANNELS, ACTIONS)
    out = Flow(ForcingConfig(history="noisy"), model).run(model, *clip(50), 0)
    assert set(out.clean.sum(1).tolist()) == {6, 9}
    assert Flow(ForcingConfig(history="clean"), model).run(model, *clip(5), 0).loss.isfinite()


def test_dreams_need_clean_frames_to_begin_from() -> None:
    flow, dynamics = build(history="noisy", prefix=0.5)
    with pytest.raises(ValueError, match=r"forcing\.prefix = 0\.5: dreams begin at clean frames"):
        flow.run(dynamics, *clip(), 1)


@pytest.mark.parametrize("history", ["noisy", "clean"])
def test_a_state_is_carried_from_clip_to_clip(history: str) -> None:
    flow, dynamics = build(history=history)
    z, action, first = clip()
    assert flow.run(dynamics, z, action, first, 0).end is None  # nobody asked for one
    begun = flow.run(dynamics, z, action, first, 0, state=dynamics.initial(BATCH))
    assert begun.end is not None and not begun.end.last.requires_grad
    torch.testing.assert_close(begun.end.last, z[:, -1])  # clean, with a noisy history too
    go_on = torch.zeros_like(first)
    ones = torch.ones(BATCH, FRAMES)
    out = flow.run(dynamics, z, action, go_on, 0, state=begun.end)
    with torch.no_grad():
        wanted = dynamics(z, action, ones, go_on, begun.end).feat
        fresh = dynamics(z, action, ones, go_on, dynamics.initial(BATCH)).feat
    torch.testing.assert_close(out.feat[out.clean], wanted[out.clean], rtol=1e-3, atol=1e-4)
    assert (out.feat[:, 0] - fresh[:, 0]).abs().amax() > 1e-3


# -- velocity -------------------------------------------------------------------------------------------------------


def test_velocity_is_the_way_from_noise_to_latents() -> None:
    z = torch.rand(3, 1, 4)
    noise = torch.randn(3, 1, 4)
    level = torch.tensor([0.0, 0.3, 0.9])
    at = level[:, None, None]
    noisy = (1 - at) * noise + at * z
    torch.testing.assert_close(velocity(z, noisy, level), z - noise, rtol=1e-4, atol=1e-5)
    flow, _ = build()
    moved = flow.denoise(noisy, z, level, torch.full((3,), 0.95), 1.0)
    torch.testing.assert_close(moved, 0.05 * noise + 0.95 * z, rtol=1e-4, atol=1e-5)


# -- long steps -------------------------------------------------------------------------------------------------------


def denoising_steps(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let the shortest step be that of so many steps."""
    for module in (base, flow_module):
        monkeypatch.setattr(module, "MAX_DENOISING_STEPS", most)


def run_clip(noisy: Tensor, level: Tensor, step_size: Tensor | None) -> SimpleNamespace:
    """In M's place: a prediction that depends on all its inputs."""
    assert step_size is not None
    return SimpleNamespace(pred=0.3 * noisy + (level + 2 * step_size)[..., None, None])


def test_a_long_step_shall_lead_where_two_halves_of_it_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of 1, 2 and 4 steps, one of the most, 8, and a clean one."""
    denoising_steps(monkeypatch, 8)
    flow, _ = build(shortcut=0.5)
    steps = torch.tensor([[1.0, 2, 4, 8, 8]])
    level = torch.tensor([[0.0, 0.5, 0.25, 0.3, 1.0]])
    z = torch.rand(1, 5, 1, CHANNELS)
    noisy = torch.randn(1, 5, 1, CHANNELS)
    noisy[0, 4] = z[0, 4]
    shortcut_target = flow.shortcut_target(run_clip, z, noisy, level, steps)
    assert torch.equal(shortcut_target[0, 3:], z[0, 3:])
    for t, (count, step_size) in enumerate(((2, 1 / 3), (4, 2 / 3), (8, 1.0))):
        there = noisy[0, t]
        for at in (level[0, t], level[0, t] + 1 / count):
            pred = 0.3 * there + at + 2 * step_size
            there = there + (pred - there) / (1 - at) / count
        # one step of twice that length towards the target arrives at the same place
        to = level[0, t : t + 1] + 2 / count
        once = noisy[0, t : t + 1] + (to - level[0, t]) / (1 - level[0, t]) * (shortcut_target[0, t] - noisy[0, t])
        torch.testing.assert_close(once[0], there, rtol=1e-4, atol=1e-5)


def test_step_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    denoising_steps(monkeypatch, 16)
    flow, _ = build(shortcut=0.4)
    level, steps = flow.sample_step_sizes(torch.full((50_000,), 0.77))
    assert steps is not None
    coarse = steps < 16
    assert coarse.float().mean() == pytest.approx(0.4, abs=0.02) and (level[~coarse] == 0.77).all()
    for count in (1.0, 2.0, 4.0, 8.0):
        begun = level[steps == count] * count
        assert set(begun.tolist()) == set(range(int(count))) and len(begun) == pytest.approx(5_000, rel=0.1)
    step_size = flow.step_size(torch.tensor([1.0, 4, 16, 64]))
    assert step_size is not None and step_size.tolist() == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("history", ["noisy", "clean"])
def test_only_with_the_term_is_m_conditioned_on_step_sizes(history: str) -> None:
    plain = build(fresh=True, history=history)[1]
    with_term = build(history=history, shortcut=0.5)
    extra = set(with_term[1].state_dict()) - set(plain.state_dict())
    assert extra == {"step_size_embedding.weight", "step_size_embedding.bias"}
    flow, dynamics = with_term
    loss = flow.run(dynamics, *clip(), 1).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.any() for p in dynamics.parameters())
    # what is clean is as fine as can be; a frame that is drawn in few steps is another
    state, (z, action, _) = dynamics.initial(BATCH), clip()
    ask = z[:, 0], action[:, 0], torch.full((BATCH,), 0.5)
    with torch.no_grad():
        asked = [dynamics.predict(state, *ask, fine) for fine in (None, torch.ones(BATCH), torch.zeros(BATCH))]
    assert torch.equal(asked[0], asked[1]) and not torch.allclose(asked[0], asked[2])


def test_only_flow_has_long_steps() -> None:
    dynamics = Dynamics(DynamicsConfig(), 1, CHANNELS, ACTIONS)
    with pytest.raises(ValueError, match=r"needs forcing\.objective = flow"):
        Mask(ForcingConfig(shortcut=0.5), dynamics, 3)


# -- learning ---------------------------------------------------------------------------------------------------------


def two_modes(steps: int, updates: int, **options) -> Tensor:
    """Train on what is, after the same frame, all-plus or all-minus at random; draw 400 in so many steps."""
    flow, dynamics = build(fresh=True, ramp=False, **options)
    first = torch.arange(2).expand(64, -1) == 0
    action = torch.zeros(64, 2, ACTIONS)
    optimizer = torch.optim.Adam(dynamics.parameters(), 4e-3)
    for _ in range(updates):
        z = 0.8 * (torch.randint(0, 2, (64, 2, 1, 1)) * 2.0 - 1).repeat(1, 1, 1, CHANNELS)
        z[:, 0] = 0
        optimizer.zero_grad()
        flow.run(dynamics, z, action, first, 1).loss.backward()
        optimizer.step()
    with torch.no_grad():
        go = torch.zeros(400, ACTIONS)
        frame = torch.zeros(400, 1, CHANNELS)
        feat, state = dynamics.commit(dynamics.initial(400), frame, go, torch.ones(400, dtype=torch.bool))
        return flow.sample(dynamics, feat, state, go, steps)[:, 0]


def sides(drawn: Tensor) -> tuple[float, float]:
    """Shares of what was drawn that lie clearly on the one and on the other side."""
    up, down = ((sign * drawn > 0.25).all(1).float().mean() for sign in (1, -1))
    return float(up), float(down)


def test_with_shortcuts_one_step_takes_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, it stays at the mean of the two."""
    denoising_steps(monkeypatch, 8)
    assert sum(sides(two_modes(1, 150, shortcut=0.5))) > 0.4
    assert sum(sides(two_modes(1, 60))) < 0.1
