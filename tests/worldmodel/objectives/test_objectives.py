import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longdream.worldmodel.categorical import cross_entropy, draw_one_hots
from longdream.worldmodel.config import DynamicsConfig, ForcingConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.objectives.base import Pass, schedule
from longdream.worldmodel.objectives.flow import Flow
from longdream.worldmodel.objectives.mask import Mask
from longdream.worldmodel.objectives.teacher import Teacher

BATCH = 4
CLASSES = 5
ACTIONS = 2
OBJECTIVES = [("flow", "clean"), ("flow", "noisy"), ("mask", "clean"), ("mask", "noisy"), ("teacher", "clean")]


def build(name: str, grid: int = 1, **options):
    """An objective and a small M whose weights are all random: freshly made, some are zero."""
    config = ForcingConfig(objective=name, **options)
    dynamics = Dynamics(DynamicsConfig(layers=1, width=24, num_heads=2, state_size=5, window=2), grid, 10, ACTIONS)
    with torch.no_grad():
        for weight in dynamics.parameters():
            weight += 0.1 * torch.randn_like(weight)
    if name == "flow":
        return Flow(config, dynamics), dynamics
    if name == "mask":
        return Mask(config, dynamics, CLASSES), dynamics
    return Teacher(config, dynamics, CLASSES, ACTIONS), dynamics


def latents(name: str, *size: int) -> Tensor:
    """Random latents `(*size, 10)` of the kind that the objective works on."""
    if name == "flow":
        return torch.rand(*size, 10) * 2 - 1
    return F.one_hot(torch.randint(0, CLASSES, (*size, 2)), CLASSES).float().flatten(-2)


# -- schedules --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 15))
def test_schedules(frames: int, steps: int, slope: float) -> None:
    matrix = schedule(frames, steps, slope)
    assert matrix.shape[1] == frames
    assert (matrix[0] == steps).all() and (matrix[-1] == 0).all()  # all noise at first, all clean at last
    drop = matrix[:-1] - matrix[1:]
    assert set(drop.unique().tolist()) <= {0, 1}
    assert slope > steps or drop.any(1).all()  # no row for nothing
    assert (matrix[:, :-1] <= matrix[:, 1:]).all()  # never is a frame behind a later one
    # a frame is denoised without a pause, once it has begun
    for column in matrix.T:
        moving = (column[:-1] > column[1:]).nonzero().flatten()
        assert moving.tolist() == list(range(int(moving[0]), int(moving[0]) + steps))


@given(st.integers(1, 20), st.integers(1, 8))
def test_the_ends_of_the_range_of_schedules(frames: int, steps: int) -> None:
    together = schedule(frames, steps, 0)
    assert torch.equal(together, torch.arange(steps, -1, -1)[:, None].expand(-1, frames))
    one_by_one = schedule(frames, steps, steps)
    assert len(one_by_one) == frames * steps + 1
    assert (((one_by_one > 0) & (one_by_one < steps)).sum(1) <= 1).all()
    for row in one_by_one.tolist():  # a frame begins when the one before is done
        assert all(early == 0 or late == steps for early, late in pairwise(row))


def test_a_pyramid_by_hand() -> None:
    assert schedule(3, 2, 1).tolist() == [[2, 2, 2], [1, 2, 2], [0, 1, 2], [0, 0, 1], [0, 0, 0]]
    assert schedule(3, 2, 0.5).tolist() == [[2, 2, 2], [1, 1, 2], [0, 0, 1], [0, 0, 0]]
    for wrong in ((3, 0, 1.0), (3, 2, -0.1)):
        with pytest.raises(ValueError, match="schedule"):
            schedule(*wrong)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_flow_noise_is_a_straight_line() -> None:
    flow, _ = build("flow")
    z = latents("flow", 3, 40, 30)
    level = torch.tensor([1.0, 0.0, 0.25])[:, None].expand(-1, 40)
    noisy = flow.corrupt(z, level)
    assert torch.equal(noisy[0], z[0])
    added = torch.stack(
        [noisy[1], (noisy[2] - 0.25 * z[2]) / 0.75, flow.pure_noise(z[2], 1.0), 2 * flow.pure_noise(z[2], 0.5)]
    )
    assert (added.mean((1, 2, 3)).abs() < 0.03).all()
    assert (added.std((1, 2, 3)) - 1).abs().amax() < 0.03
    independent = torch.corrcoef(torch.cat([added, z[2:]]).flatten(1)) - torch.eye(5)
    assert independent.abs().amax() < 0.04


@given(st.floats(0, 0.99), st.floats(0, 1))
@settings(max_examples=50)
def test_flow_steps_stay_on_the_line(level: float, share: float) -> None:
    """With the truth as prediction, a step from level to any other lands where the noise of that level would be."""
    flow, _ = build("flow")
    z = latents("flow", 2, 3)
    noise = torch.randn(2, 3, 10)
    at, to = (torch.full((2,), v) for v in (level, level + share * (1 - level)))

    def line(where: Tensor) -> Tensor:
        return (1 - where)[:, None, None] * noise + where[:, None, None] * z

    moved = flow.denoise(line(at), z, at, to, temperature=1.0)
    torch.testing.assert_close(moved, line(to), rtol=1e-4, atol=1e-4)
    done = flow.denoise(line(at), 3 * z, at, torch.ones(2), temperature=1.0)
    torch.testing.assert_close(done, (3 * z).clamp(-1, 1), rtol=1e-5, atol=1e-6)  # latents are bounded, whatever M says


def test_flow_error_by_hand() -> None:
    z = torch.zeros(2, 1, 4)
    pred = torch.tensor([[[1.0, 1.0, 1.0, 3.0]], [[2.0, 0.0, 0.0, 0.0]]])
    level = torch.tensor([0.0, 0.5])
    assert build("flow", ramp=False)[0].error(pred, z, z, level).tolist() == [3.0, 1.0]
    assert build("flow", ramp=True)[0].error(pred, z, z, level).tolist() == pytest.approx([0.3, 0.55])


def test_mask_noise_hides_whole_variables() -> None:
    mask, _ = build("mask")
    z = latents("mask", 3, 50, 20)
    noisy = mask.corrupt(z, torch.tensor([1.0, 0.0, 0.3])[:, None].expand(-1, 50))
    assert torch.equal(noisy[0], z[0]) and not noisy[1].any()
    kept = noisy[2].unflatten(-1, (-1, CLASSES))
    seen = kept.sum(-1)
    assert abs(seen.mean() - 0.3) < 0.04
    assert torch.equal(kept, z[2].unflatten(-1, (-1, CLASSES)) * seen[..., None]) and set(seen.unique().tolist()) == {
        0,
        1,
    }


@given(st.floats(0, 0.99), st.floats(0, 1))
@settings(max_examples=50)
def test_mask_steps_never_change_what_is_known(level: float, share: float) -> None:
    mask, _ = build("mask")
    z = latents("mask", 20, 6)
    logits = torch.randn(20, 6, 10)
    at, to = (torch.full((20,), v) for v in (level, level + share * (1 - level)))
    noisy = mask.corrupt(z, at)
    known = noisy.unflatten(-1, (-1, CLASSES)).sum(-1) > 0
    moved = mask.denoise(noisy, logits, at, to, 1.0).unflatten(-1, (-1, CLASSES))
    assert torch.equal(moved[known], z.unflatten(-1, (-1, CLASSES))[known])
    shown = moved.sum(-1)
    assert set(shown.unique().tolist()) <= {0, 1}
    hidden = int((~known).sum())
    spread = 5 * math.sqrt(hidden * share * (1 - share)) + 3
    assert abs(float(shown[~known].sum()) - share * hidden) <= spread
    done = mask.denoise(noisy, logits, at, torch.ones(20), 1.0).unflatten(-1, (-1, CLASSES))
    assert (done.sum(-1) == 1).all()


def test_mask_error_counts_hidden_variables_only() -> None:
    mask, _ = build("mask")
    z = latents("mask", 3, 2)
    logits = torch.randn(3, 2, 10)
    noisy = z.clone()
    noisy[0, 1, :CLASSES] = 0  # one variable
    noisy[1] = 0
    nats = -(logits.unflatten(-1, (-1, CLASSES)).log_softmax(-1) * z.unflatten(-1, (-1, CLASSES))).sum(-1)
    wanted = torch.stack([nats[0, 1, 0], nats[1].mean(), torch.tensor(0.0)])
    torch.testing.assert_close(mask.error(logits, z, noisy, torch.zeros(3)), wanted)


def test_categorical_draws() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5, 1.0, 0.0, 0.0, 0.0, 3.0, -9.0]])
    probs = logits.view(2, CLASSES).softmax(-1)
    drawn = draw_one_hots(logits.expand(20_000, -1), CLASSES, 1.0).view(-1, 2, CLASSES)
    assert (drawn.sum(-1) == 1).all()
    assert (drawn.mean(0) - probs).abs().amax() < 0.015
    cold = draw_one_hots(logits.expand(50, -1), CLASSES, 0.01).view(-1, 2, CLASSES)
    assert (cold.argmax(-1) == probs.argmax(-1)).all()
    torch.testing.assert_close(cross_entropy(logits.expand(50, -1), cold.flatten(1), CLASSES)[0], -probs.amax(-1).log())


# -- the training pass ------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A training pass, what went into M (`noisy`, `level`: of the query stream if there is one), what came out and its
    gradient."""

    passed: Pass
    inputs: Tensor
    input_level: Tensor
    noisy: Tensor
    level: Tensor
    grad: Tensor
    z: Tensor
    prev_action: Tensor
    first: Tensor
    pred: Tensor


def watch(objective, dynamics: Dynamics, name: str, frames: int = 12, starts: int = 3) -> Seen:
    seen = []

    def keep(_, args, out) -> None:
        out.pred.retain_grad()
        seen.append((args, out))

    z = latents(name, BATCH, frames, dynamics.tokens)
    prev_action = torch.rand(BATCH, frames, ACTIONS)
    first = torch.rand(BATCH, frames) < 0.1
    first[:, 0] = True
    handle = dynamics.register_forward_hook(keep)
    passed = objective.run(dynamics, z, prev_action, first, starts)
    passed.loss.backward()
    handle.remove()
    [(args, out)] = seen
    noisy, level = args[5] or (args[0], args[2])
    return Seen(passed, args[0], args[2], noisy, level, out.pred.grad, z, prev_action, first, out.pred.detach())


@pytest.mark.parametrize("name", ["flow", "mask"])
@pytest.mark.parametrize("frames", [2, 12, 13])
def test_one_stream_learns_from_noised_frames_behind_a_clean_prefix(name: str, frames: int) -> None:
    lengths = set()
    levels = []
    for _ in range(8):
        objective, dynamics = build(name, history="noisy")
        seen = watch(objective, dynamics, name, frames)
        clean = seen.passed.clean
        length = clean.sum(1)
        assert torch.equal(clean, torch.arange(frames) < length[:, None])  # a prefix
        assert (length >= frames // 2).all() and (length < frames).all()
        assert torch.equal(seen.inputs[clean], seen.z[clean]) and (seen.level[clean] == 1).all()
        assert (seen.level[~clean] < 1).all()
        assert not seen.grad[clean].any()
        learned = objective.error(seen.pred, seen.z, seen.noisy, seen.level)
        torch.testing.assert_close(seen.passed.loss.detach(), learned[~clean].mean())
        moving = learned[~clean] > 0  # nothing may be hidden
        assert torch.equal(seen.grad[~clean].flatten(1).any(1), moving) and moving.any()
        assert (seen.passed.at < length[:, None]).all() and (seen.passed.at >= 0).all()
        lengths.update(length.tolist())
        levels.append(seen.level[~clean])
    assert len(lengths) >= min(4, frames - frames // 2)
    if frames > 2:
        assert 0.15 < (torch.cat(levels) == 0).float().mean() < 0.45


@pytest.mark.parametrize("name", ["flow", "mask"])
def test_two_streams_learn_from_every_frame_against_a_clean_past(name: str) -> None:
    objective, dynamics = build(name, grid=2, history="clean")
    seen = watch(objective, dynamics, name, 50)
    assert torch.equal(seen.inputs, seen.z) and (seen.input_level == 1).all()
    assert seen.passed.clean.all()
    learned = objective.error(seen.pred, seen.z, seen.noisy, seen.level)
    torch.testing.assert_close(seen.passed.loss.detach(), learned.mean())
    assert torch.equal(seen.grad.flatten(2).any(2), learned > 0)
    assert 0.2 < (seen.level == 0).float().mean() < 0.4
    assert (seen.level[seen.level > 0] - 0.5).abs().mean() == pytest.approx(0.25, abs=0.05)  # uniform


@pytest.mark.parametrize(("name", "history"), OBJECTIVES)
def test_a_pass_hands_on_states_of_clean_frames(name: str, history: str) -> None:
    """feat where `clean`, and the states to dream from, are those of an agent that took in the frames one by one."""
    objective, dynamics = build(name, grid=2, history=history)
    seen = watch(objective, dynamics, name, starts=5)
    passed = seen.passed
    state = dynamics.initial(BATCH)
    pasts = []
    with torch.no_grad():
        for t in range(seen.z.shape[1]):
            feat, state = dynamics.commit(state, seen.z[:, t], seen.prev_action[:, t], seen.first[:, t])
            clean = passed.clean[:, t]
            torch.testing.assert_close(passed.feat[clean, t], feat[clean], rtol=1e-3, atol=1e-4)
            pasts.append(state)
        for row in range(BATCH):
            for i, t in enumerate(passed.at[row].tolist()):
                one, other = (
                    s.map(lambda v, k=k: v[k : k + 1]) for s, k in ((passed.start_states, 5 * row + i), (pasts[t], row))
                )
                question = torch.randn(1, dynamics.tokens, dynamics.channels), torch.randn(1, ACTIONS), torch.rand(1)
                torch.testing.assert_close(
                    dynamics.predict(one, *question), dynamics.predict(other, *question), rtol=1e-3, atol=1e-4
                )
