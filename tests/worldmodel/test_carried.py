"""A clip that goes on with the state after the clip before it is learned from as if both were one."""

import dataclasses

import pytest
import torch

from longdream.envs.contract import ObsSpec
from longdream.worldmodel.config import DynamicsConfig, EncoderConfig, ForcingConfig, HeadsConfig
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.objectives.base import Pass
from longdream.worldmodel.types import Batch

B = 3
T = 12
A = 4


def model(heads: HeadsConfig | None = None, **forcing) -> WorldModel:
    obs = {"obs": ObsSpec("vector", (5,))}
    made = WorldModel(
        obs,
        A,
        EncoderConfig(channels=8),
        DynamicsConfig(layers=2, width=16, num_heads=2, state_size=4, window=3),
        ForcingConfig(**forcing),
        heads or HeadsConfig(hidden=16, bins=11),
    )
    for parameter in made.parameters():  # at initialisation some are zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def clips() -> Batch:
    flags = torch.zeros(3, B, T, dtype=torch.bool)
    flags[0, :, 0] = True
    flags[0, 1, 7] = True  # an episode begins within the second half
    action = torch.randn(B, T, A)
    obs = {"obs": torch.randn(B, T, 5)}
    return Batch(obs, action, torch.randn(B, T), *flags, torch.zeros(B, T))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    parts = {
        field.name: getattr(batch, field.name)[:, start:stop]
        for field in dataclasses.fields(batch)
        if field.name not in ("obs", "before")
    }
    before = batch.action[:, start - 1] if start else None
    return Batch({key: value[:, start:stop] for key, value in batch.obs.items()}, before=before, **parts)


@pytest.mark.parametrize("settings", [{"history": "clean"}, {"objective": "teacher"}], ids=["clean", "teacher"])
def test_two_halves_are_one_clip(settings: dict) -> None:
    made = model(**settings)
    batch = clips()
    _, whole = made.clip_loss(batch, 1, state=made.dynamics.initial(B))
    _, one = made.clip_loss(cut(batch, 0, 5), 1, state=made.dynamics.initial(B))
    assert one.end is not None and not one.end.last.requires_grad
    _, two = made.clip_loss(cut(batch, 5, T), 1, state=one.end)
    torch.testing.assert_close(torch.cat([one.feat, two.feat], 1), whole.feat)
    assert two.end is not None and whole.end is not None
    torch.testing.assert_close(two.end.last, whole.end.last)
    torch.testing.assert_close(two.end.mixers, whole.end.mixers)
    _, forgot = made.clip_loss(cut(batch, 5, T), 1)
    assert forgot.end is None and (forgot.feat - two.feat)[0].abs().max() > 1e-3
    torch.testing.assert_close(forgot.feat[1, 2:], two.feat[1, 2:])  # from the new episode on, both know the same


def test_noised_frames_are_not_carried() -> None:
    """With a noisy history the end of a clip is noised; what is carried has seen it clean."""
    made = model(history="noisy")
    batch = clips()
    torch.manual_seed(1)
    _, out = made.clip_loss(batch, 1, state=made.dynamics.initial(B))
    made.objective = model(history="clean").objective
    _, clean = made.clip_loss(batch, 1, state=made.dynamics.initial(B))
    assert out.end is not None and clean.end is not None
    torch.testing.assert_close(out.end.mixers, clean.end.mixers)
    torch.testing.assert_close(out.end.k, clean.end.k)


def test_heads_that_weigh_nothing_are_left_out() -> None:
    made = model(HeadsConfig(hidden=16, bins=11, reward_weight=0))
    loss, out = made.clip_loss(clips(), 1)
    loss.value.backward()
    assert set(loss.metrics) == {"prediction"} and isinstance(out, Pass)
    assert all(p.grad is None for p in made.reward_continue.parameters())
    assert any(p.grad is not None for p in made.dynamics.parameters())


def test_the_action_before_a_clip() -> None:
    batch = clips()
    assert not batch.prev_action()[:, 0].any()
    later = cut(batch, 5, T)
    assert torch.equal(later.prev_action(), batch.prev_action()[:, 5:])
