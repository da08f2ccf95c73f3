"""What the objectives of M draw, and that they learn."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longdream.worldmodel.config import DynamicsConfig, ForcingConfig
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.objectives.base import Forcing, schedule
from longdream.worldmodel.objectives.flow import Flow
from longdream.worldmodel.objectives.mask import Mask
from longdream.worldmodel.objectives.teacher import Teacher

BATCH = 4
CLASSES = 5
ACTIONS = 2
OBJECTIVES = [("flow", "clean"), ("flow", "noisy"), ("mask", "clean"), ("mask", "noisy"), ("teacher", "clean")]


def build(name: str, grid: int = 1, channels: int = 10, fresh: bool = False, **options):
    """An objective and a small M with random weights; as it is made, some are zero."""
    config = ForcingConfig(objective=name, **options)
    dynamics = Dynamics(
        DynamicsConfig(layers=1, width=24, num_heads=2, state_size=5, window=2), grid, channels, ACTIONS
    )
    with torch.no_grad():
        for weight in () if fresh else dynamics.parameters():
            weight += 0.1 * torch.randn_like(weight)
    if name == "flow":
        return Flow(config, dynamics), dynamics
    if name == "mask":
        return Mask(config, dynamics, CLASSES), dynamics
    return Teacher(config, dynamics, CLASSES, ACTIONS), dynamics


# -- sampling ---------------------------------------------------------------------------------------------------------


class GivenNoise(Flow):
    """Flow that begins frames with the noise it is given."""

    noise: Tensor

    def pure_noise(self, like: Tensor, temperature: float) -> Tensor:
        assert like.shape == self.noise.shape
        return self.noise


def stream_out(objective: Forcing, dynamics: Dynamics, state: State, action: Tensor, steps: int, heat: float, each):
    """Frame after frame, drawn and committed; `each(t)` is called before frame t."""
    out = []
    go_on = torch.zeros(BATCH, dtype=torch.bool)
    for t in range(action.shape[1]):
        each(t)
        z = objective.sample(dynamics, torch.zeros(0), state, action[:, t], steps, heat)
        out.append(z)
        _, state = dynamics.commit(state, z, action[:, t], go_on)
    return torch.stack(out, 1)


@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_an_autoregressive_clip_is_frame_after_frame(steps: int) -> None:
    _, dynamics = build("flow", grid=2)
    flow = GivenNoise(ForcingConfig(), dynamics)
    past = torch.rand(BATCH, 4, 10)
    action = torch.rand(BATCH, 6, ACTIONS)
    _, state = dynamics.commit(dynamics.initial(BATCH), past, action[:, 0], torch.ones(BATCH, dtype=torch.bool))
    noise = torch.randn(BATCH, 6, 4, 10)

    def each(t: int) -> None:
        flow.noise = noise[:, t]

    wanted = stream_out(flow, dynamics, state, action, steps, 1.0, each)
    flow.noise = noise
    got = flow.sample_clip(dynamics, state, action, schedule(6, steps, steps))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    together = flow.sample_clip(dynamics, state, action, schedule(6, steps, 0))
    assert (together - wanted).abs().amax() > 1e-2  # another schedule is another computation


@torch.no_grad()
def test_an_autoregressive_clip_of_categorical_latents() -> None:
    """Cold and in one step nothing is left to chance."""
    mask, dynamics = build("mask", grid=2)
    action = torch.rand(BATCH, 6, ACTIONS)
    state = dynamics.initial(BATCH)
    wanted = stream_out(mask, dynamics, state, action, 1, 1e-6, lambda t: None)
    assert torch.equal(mask.sample_clip(dynamics, state, action, schedule(6, 1, 1), 1e-6), wanted)


@pytest.mark.parametrize("name", ["flow", "mask"])
@pytest.mark.parametrize("slope", [0, 0.7, 2])
@torch.no_grad()
def test_clips_end_clean(name: str, slope: float) -> None:
    objective, dynamics = build(name, grid=2)
    z = objective.sample_clip(dynamics, dynamics.initial(3), torch.rand(3, 5, ACTIONS), schedule(5, 3, slope))
    assert z.shape == (3, 5, 4, 10)
    if name == "flow":
        assert z.abs().amax() <= 1 + 1e-5 and z.std() > 0.01
    else:
        assert (z.unflatten(-1, (-1, CLASSES)).sum(-1) == 1).all() and set(z.unique().tolist()) == {0, 1}


@pytest.fixture
def garbage_in_new_memory():
    """torch fills memory that nobody has written yet with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "history"), OBJECTIVES)
@torch.no_grad()
def test_samples_do_not_read_memory_that_nobody_wrote(name: str, history: str, garbage_in_new_memory) -> None:
    objective, dynamics = build(name, grid=2, history=history)
    feat, state = dynamics.commit(
        dynamics.initial(3), torch.rand(3, 4, 10), torch.rand(3, ACTIONS), torch.ones(3, dtype=torch.bool)
    )
    z = objective.sample(dynamics, feat, state, torch.rand(3, ACTIONS), 2)
    assert z.shape == (3, 4, 10) and z.isfinite().all()
    if name != "teacher":
        clip = objective.sample_clip(dynamics, state, torch.rand(3, 5, ACTIONS), schedule(5, 2, 1))
        assert clip.isfinite().all()


# -- learning ---------------------------------------------------------------------------------------------------------

CODES = torch.tensor([[0.9, 0.9, -0.9], [0.9, -0.9, 0.9], [-0.9, 0.9, 0.9], [-0.9, -0.9, -0.9], [0.9, 0.9, 0.9]])


def fit(loss: Callable[[], Tensor], parameters, updates: int, rate: float = 3e-3) -> list[float]:
    optimizer = torch.optim.Adam(list(parameters), rate)
    losses = []
    for _ in range(updates):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(
    ("name", "history", "updates"), [(*kind, 200 if kind[1] == "noisy" else 110) for kind in OBJECTIVES]
)
def test_one_batch_is_learned(name: str, history: str, updates: int) -> None:
    """A walk on a ring of five places, a step left or right as the action says. What comes next needs both the past and
    the action: place alone gives 50 %, action alone 20 %."""
    batch = 16
    frames = 10
    step = torch.randint(0, 2, (batch, frames))
    step[:, 0] = 0
    place = ((2 * step - 1) * (torch.arange(frames) > 0)).cumsum(1) % 5
    prev_action = F.one_hot(step, 2).float()
    first = torch.arange(frames).expand(batch, -1) == 0
    codes = CODES if name == "flow" else torch.cat([torch.eye(5), torch.eye(5)[[0, 2, 4, 1, 3]]], 1)
    z = codes[place][:, :, None]
    objective, dynamics = build(name, channels=z.shape[-1], fresh=True, history=history)
    losses = fit(
        lambda: objective.run(dynamics, z, prev_action, first, 1).loss,
        {*dynamics.parameters(), *objective.parameters()},
        updates,
    )
    assert sum(losses[-10:]) < (0.4 if history == "noisy" else 0.1) * sum(losses[:10])
    state = dynamics.initial(batch)
    right = []
    expected = []
    unexpected = []
    with torch.no_grad():
        feat, state = dynamics.commit(state, z[:, 0], prev_action[:, 0], first[:, 0])
        for t in range(1, frames):
            drawn = objective.sample(dynamics, feat, state, prev_action[:, t], 2)
            right.append((torch.cdist(drawn[:, 0], codes).argmin(1) == place[:, t]).float().mean())
            expected.append(objective.surprise(dynamics, feat, state, prev_action[:, t], z[:, t]))
            unexpected.append(objective.surprise(dynamics, feat, state, 1 - prev_action[:, t], z[:, t]))
            feat, state = dynamics.commit(state, z[:, t], prev_action[:, t], first[:, t])
    assert torch.stack(right).mean() > (0.75 if history == "noisy" else 0.85)
    expected = torch.stack(expected)
    unexpected = torch.stack(unexpected)
    assert expected.shape == (frames - 1, batch) and (expected >= 0).all()
    assert expected.mean() < 0.2 * unexpected.mean()


def test_steps_draw_from_both_modes_and_one_step_gives_their_mean() -> None:
    """After the same frame comes all-plus or all-minus, at random."""
    batch = 128
    objective, dynamics = build("flow", channels=2, fresh=True, ramp=False)
    first = torch.arange(2).expand(batch, -1) == 0
    action = torch.zeros(batch, 2, ACTIONS)

    def loss() -> Tensor:
        z = 0.8 * (torch.randint(0, 2, (batch, 2, 1, 1)) * 2.0 - 1).repeat(1, 1, 1, 2)
        z[:, 0] = 0
        return objective.run(dynamics, z, action, first, 1).loss

    fit(loss, dynamics.parameters(), 250)
    with torch.no_grad():
        go = torch.zeros(400, ACTIONS)
        feat, state = dynamics.commit(
            dynamics.initial(400), torch.zeros(400, 1, 2), go, torch.ones(400, dtype=torch.bool)
        )
        mean = objective.sample(dynamics, feat, state, go, 1)[:, 0]
        drawn = objective.sample(dynamics, feat, state, go, 4)[:, 0]
    assert mean.abs().amax() < 0.4
    near = (drawn.abs() - 0.8).abs().amax(1) < 0.25
    up = (drawn > 0).all(1)
    assert near.float().mean() > 0.7
    assert 0.25 < up[near].float().mean() < 0.75
    assert torch.equal(up[near], drawn[near, 0] > 0)  # never one of each
