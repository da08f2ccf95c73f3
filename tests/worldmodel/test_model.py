from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longdream.worldmodel.config import DynamicsConfig, EncoderConfig, ForcingConfig, HeadsConfig
from longdream.worldmodel.dream import Starts, imagine
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.objectives import objective_class
from longdream.worldmodel.objectives.flow import Flow
from longdream.worldmodel.objectives.mask import Mask
from longdream.worldmodel.objectives.prior import Prior
from longdream.worldmodel.objectives.teacher import Teacher
from longdream.worldmodel.types import Batch


class Spec(NamedTuple):
    kind: Literal["image", "vector", "discrete"]
    shape: tuple[int, ...] = ()
    n: int = 0


SYMBOLS = {"symbol": Spec("discrete", n=3)}
OBJECTIVES = [
    ("flow", "clean"),
    ("flow", "noisy"),
    ("mask", "clean"),
    ("mask", "noisy"),
    ("teacher", "clean"),
]


def build(objective="flow", history="clean", obs=SYMBOLS, **options) -> WorldModel:
    return WorldModel(
        obs,
        2,
        EncoderConfig(channels=8, classes=4),
        DynamicsConfig(layers=1, width=24, num_heads=2, state_size=4, window=2),
        ForcingConfig(objective=objective, history=history, **options),
        HeadsConfig(hidden=32, bins=41),
    )


def randomised(model: WorldModel) -> WorldModel:
    """Weights that start at zero, and hide what is wired wrongly, are random."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


def rows(batch: int, frames: int) -> Batch:
    """Clips of a game: three symbols come at random. On 0 and 1 the action of that number pays 1 with the next row; on
    2, action 0 pays 0.5 and action 1 ends the episode. What the row of a new episode says of reward is nonsense."""
    symbol = torch.randint(0, 3, (batch, frames))
    action = torch.randint(0, 2, (batch, frames))
    reward = torch.zeros(batch, frames)
    first = torch.zeros(batch, frames, dtype=torch.bool)
    terminated = torch.zeros_like(first)
    first[:, 0] = True
    for t in range(1, frames):
        before = symbol[:, t - 1]
        chosen = action[:, t - 1]
        reward[:, t] = torch.where(before == 2, 0.5 * (1 - chosen), (chosen == before).float())
        first[:, t] = terminated[:, t - 1]
        terminated[:, t] = (before == 2) & (chosen == 1)
        reward[:, t] = torch.where(first[:, t], 50.0, reward[:, t])
        terminated[:, t] &= ~first[:, t]
    return Batch(
        obs={"symbol": symbol},
        action=F.one_hot(action, 2).float(),
        reward=reward,
        is_first=first,
        terminated=terminated,
        truncated=torch.zeros_like(first),
        surprise=torch.zeros_like(reward),
    )


def seeded_loss(model: WorldModel, batch: Batch, starts: int = 1):
    torch.manual_seed(7)
    return model.loss(batch, starts)


def seeded_pass(model: WorldModel, batch: Batch, starts: int):
    """The objective's part of `seeded_loss`."""
    torch.manual_seed(7)
    with torch.no_grad():
        z = model.encoder(batch.obs)
        return model.objective.run(model.dynamics, z, batch.prev_action(), batch.clip_first(), starts)


@pytest.fixture(scope="module")
def taught() -> WorldModel:
    """A model that has learned the game; V is as it was made."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(rows(24, 12), 1)[0].value.backward()
        optimizer.step()
    return model


def at_symbol(model: WorldModel, symbol: int, n: int) -> tuple[Tensor, State]:
    """feat and state of n sequences that saw one other symbol, then this one."""
    state = model.dynamics.initial(n)
    feat = None
    for i, s in enumerate((1, symbol)):
        z = model.encoder({"symbol": torch.full((n,), s)}).detach()
        action = torch.eye(2)[torch.arange(n) % 2]
        feat, state = model.commit(state, z, action, torch.full((n,), i == 0))
    assert feat is not None
    return feat, state


def test_rewards_and_ends_follow_from_feature_and_action(taught: WorldModel) -> None:
    expected = {0: ([1, 0], [1, 1]), 1: ([0, 1], [1, 1]), 2: ([0.5, 0], [1, 0])}
    with torch.no_grad():
        for symbol, (reward, cont) in expected.items():
            got = taught.reward_continue.expect(at_symbol(taught, symbol, 2)[0], torch.eye(2))
            assert got[0].tolist() == pytest.approx(reward, abs=0.3)
            assert got[1].tolist() == pytest.approx(cont, abs=0.2)


def test_surprise_is_what_was_not_expected(taught: WorldModel) -> None:
    feat, state = at_symbol(taught, 2, 4)
    action = torch.eye(2)[[0, 0, 1, 1]]
    z = taught.encoder({"symbol": torch.zeros(4, dtype=torch.long)}).detach()
    no = torch.zeros(4, dtype=torch.bool)

    def of(reward: list[float], ended: list[bool], first: Tensor = no, latent: Tensor = z):
        return taught.surprise(feat, state, action, latent, torch.tensor(reward), torch.tensor(ended), first)

    as_ever = of([0.5, 0.5, 0.0, 0.0], [False, False, True, True])
    odd_reward = of([-1.0, 1.5, 1.0, -1.0], [False, False, True, True])
    odd_end = of([0.5, 0.5, 0.0, 0.0], [True, True, False, False])
    odd_frame = of([0.5, 0.5, 0.0, 0.0], [False, False, True, True], latent=-2 * z)
    for part in as_ever:
        assert part.shape == (4,) and (part >= 0).all()
    assert (as_ever.reward < 0.3).all() and (odd_reward.reward > 0.7).all()
    assert odd_reward.reward[1].item() == pytest.approx(1, abs=0.3)
    assert (as_ever.end < 0.2).all() and (odd_end.end > 1).all()
    assert (odd_frame.latent > as_ever.latent + 0.1).all()
    torch.testing.assert_close(as_ever.total(), as_ever.latent + as_ever.reward + as_ever.end)
    first = torch.tensor([True, False, True, False])
    new = of([50.0, 50.0, 50.0, 50.0], [True, True, False, False], first, -2 * z)
    for part in new:
        assert (part[first] == 0).all() and (part[~first] > 0).all()


@pytest.mark.parametrize(("objective", "history"), OBJECTIVES)
def test_each_reward_and_end_counts_once_where_it_should(objective: str, history: str) -> None:
    """Row t is learned from if frame t - 1 is in the clip, was seen clean and is of its episode; else it is nothing."""
    model = randomised(build(objective, history))
    batch = rows(2, 9)
    batch.is_first[0, 4] = batch.is_first[1, 2] = batch.is_first[1, 6] = True
    batch.terminated[:] = False
    clean = seeded_pass(model, batch, 1).clean
    with torch.no_grad():
        base = seeded_loss(model, batch)[0].value
        for row in range(2):
            for t in range(9):
                counts = t > 0 and bool(clean[row, t - 1]) and not batch.is_first[row, t]
                for key in ("reward", "terminated"):
                    changed = getattr(batch, key).clone()
                    changed[row, t] = 3.0 if key == "reward" else True
                    other = seeded_loss(model, replace(batch, **{key: changed}))[0].value
                    assert (other != base) == counts, (key, row, t)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    batch = rows(3, 8)
    for reward_weight in (1.0, 5.0):
        model = randomised(build())
        model.heads_config = replace(model.heads_config, reward_weight=reward_weight)
        value, metrics = seeded_loss(model, batch)[0]
        wanted = metrics["prediction"] + reward_weight * (metrics["reward"] + metrics["cont"])
        torch.testing.assert_close(value.detach(), wanted)
        assert not any(v.requires_grad for v in metrics.values())


@pytest.mark.parametrize(("objective", "history"), OBJECTIVES)
def test_states_to_dream_from(objective: str, history: str) -> None:
    """Feature, state and weight belong together; a dream from the row that ended an episode weighs nothing."""
    model = randomised(build(objective, history))
    batch = rows(4, 10)
    batch.terminated = (torch.arange(10) % 3 == 1).expand(4, -1)
    _, (feat, state, weight), _ = seeded_loss(model, batch, 15)
    passed = seeded_pass(model, batch, 15)
    index = torch.arange(4)[:, None], passed.at
    assert torch.equal(weight, (~batch.terminated[index]).float().flatten())
    assert 0 < weight.sum() < 60
    torch.testing.assert_close(feat, passed.feat[index].flatten(0, 1))
    assert not feat.requires_grad and all(s.shape[0] == 60 for s in (*state.mixers, *state.k, *state.v, state.age))
    for a, b in zip(
        (*state.mixers, *state.k, state.age),
        (*passed.start_states.mixers, *passed.start_states.k, passed.start_states.age),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_v_does_not_learn_from_m() -> None:
    model = build()
    model.loss(rows(2, 6), 1)[0].value.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    others = (*model.dynamics.parameters(), *model.reward_continue.parameters())
    assert all(p.grad is not None for p in others)


def test_batches_out_of_arrays() -> None:
    arrays = {
        "obs": {"symbol": np.array([[0, 2, 1]])},
        "action": np.array([[[1, 0], [0, 1], [1, 0]]], np.float32),
        "reward": np.array([[0, 1, 2]], np.float32),
        "is_first": np.array([[False, False, True]]),
        "terminated": np.array([[False, True, False]]),
        "truncated": np.zeros((1, 3), bool),
        "surprise": np.zeros((1, 3), np.float32),
    }
    batch = Batch.of(arrays)
    assert batch.obs["symbol"].tolist() == [[0, 2, 1]] and batch.reward.tolist() == [[0, 1, 2]]
    assert batch.prev_action().tolist() == [[[0, 0], [1, 0], [0, 1]]]
    assert batch.clip_first().tolist() == [[True, False, True]]
    assert batch.is_first.tolist() == [[False, False, True]]  # and stays as it is


# -- objectives -------------------------------------------------------------------------------------------------------

OWN = '''
import torch
from longdream.worldmodel.objectives.base import Pass

class Still(torch.nn.Module):
    """Expects that nothing changes."""
    latent = "categorical"

    def __init__(self, config, dynamics):
        super().__init__()
        self.last = None

    def run(self, dynamics, z, prev_action, first, num_starts):
        at = torch.zeros(len(z), num_starts, dtype=torch.long)
        ones = torch.ones(z.shape[:2])
        out = dynamics(z, prev_action, ones, first, dynamics.initial(len(z)), None, at)
        return Pass(out.feat.square().mean(), {"mine": torch.ones(())}, out.feat, ones.bool(), at, out.states_at)

    def sample(self, dynamics, feat, state, action, steps, temperature=1.0):
        return torch.full((len(feat), dynamics.tokens, dynamics.channels), 0.25)

    def surprise(self, dynamics, feat, state, action, z):
        return torch.full((len(z),), 0.125)
'''


def test_an_objective_of_ones_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_objectives.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = build("my_objectives:Still")
    assert type(model.objective).__name__ == "Still" and model.encoder.latent == "categorical"
    (value, metrics), (feat, state, _), _ = model.loss(rows(2, 5), 3)
    value.backward()
    assert "mine" in metrics
    z, *_ = model.dream_step(feat, state, torch.zeros(6, 2))
    assert (z == 0.25).all()
    no = torch.zeros(6, dtype=torch.bool)
    assert (model.surprise(feat, state, torch.zeros(6, 2), z, torch.zeros(6), no, no).latent == 0.125).all()


def test_objectives_by_name() -> None:
    assert [objective_class(name) for name in ("flow", "mask", "prior", "teacher")] == [Flow, Mask, Prior, Teacher]
    assert objective_class("longdream.worldmodel.objectives.mask:Mask") is Mask
    for name, hint in [
        ("fow", "flow, mask, prior, teacher"),
        ("worldmodel.forcing", "package.module:Class"),
        ("worldmodel.nowhere:Flow", "worldmodel.nowhere"),
        ("longdream.worldmodel.objectives.flow:Fow", "Fow"),
    ]:
        with pytest.raises(ValueError, match=f"forcing.objective = {name}.*{hint}"):
            objective_class(name)


@pytest.mark.parametrize(
    ("objective", "latent"),
    [("flow", "continuous"), ("mask", "categorical"), ("prior", "categorical"), ("teacher", "categorical")],
)
def test_the_objective_decides_the_kind_of_latents(objective: str, latent: str) -> None:
    assert build(objective).encoder.latent == latent


# -- dreams -----------------------------------------------------------------------------------------------------------


def begin(model: WorldModel, n: int = 6) -> Starts:
    with torch.no_grad():
        return model.loss(rows(n // 2, 5), 2)[1]


@pytest.mark.parametrize(("objective", "history"), OBJECTIVES)
def test_dreams_are_rows(objective: str, history: str) -> None:
    """Row t's action is chosen from feat_t, its reward and cont follow from both, and what comes next is committed."""
    model = randomised(build(objective, history, steps=2))
    starts = begin(model)
    asked = []
    kept = starts.state.map(torch.clone)

    def policy(feat: Tensor) -> Tensor:
        asked.append(feat)
        return 3 * torch.rand(len(feat), 2) - 1.5

    dream = imagine(model, starts, policy, 4)
    assert dream.feat.shape == (6, 5, model.feature_size)
    assert dream.action.shape == (6, 4, 2) and dream.reward.shape == dream.cont.shape == (6, 4)
    assert dream.z.shape == (6, 4, 1, 8) and torch.equal(dream.weight, starts.weight)
    assert torch.equal(torch.stack(asked, 1), dream.feat[:, :-1])
    assert dream.action.abs().amax() > 1  # C sees what it drew, M what the environment would have taken
    state = starts.state
    go_on = torch.zeros(6, dtype=torch.bool)
    for t in range(4):
        action = dream.action[:, t].clamp(-1, 1)
        with torch.no_grad():
            reward, cont = model.reward_continue.expect(dream.feat[:, t], action)
        torch.testing.assert_close(dream.reward[:, t], reward)
        torch.testing.assert_close(dream.cont[:, t], cont)
        feat, state = model.commit(state, dream.z[:, t], action, go_on)
        torch.testing.assert_close(dream.feat[:, t + 1], feat)
    for a, b in zip(
        (*kept.mixers, *kept.k, *kept.v), (*starts.state.mixers, *starts.state.k, *starts.state.v), strict=True
    ):
        assert torch.equal(a, b)
    assert not any(v.requires_grad for v in dream)


def follow(model: WorldModel, starts: Starts, action: Tensor, **options) -> Tensor:
    """The latents that M dreams under given actions."""
    plan = iter(action.unbind(1))
    return imagine(model, starts, lambda _: next(plan), action.shape[1], **options).z


def test_the_same_actions_lead_where_they_led() -> None:
    model = randomised(build())
    starts = begin(model)
    torch.manual_seed(3)
    dream = imagine(model, starts, lambda feat: torch.rand(len(feat), 2) * 2 - 1, 5, temperature=0.0)
    again = follow(model, starts, dream.action, temperature=0.0)
    assert torch.equal(again, dream.z)
    assert (follow(model, starts, -dream.action, temperature=0.0) - again).abs().amax() > 1e-3


def test_temperature_and_steps_reach_the_sampler() -> None:
    model = randomised(build())
    starts = begin(model)
    action = torch.zeros(6, 3, 2)

    def dream(**options) -> Tensor:
        return follow(model, starts, action, **options)

    assert torch.equal(dream(temperature=0.0), dream(temperature=0.0))
    assert not torch.equal(dream(), dream())
    assert not torch.equal(dream(temperature=0.0, steps=1), dream(temperature=0.0, steps=4))
    calls = []
    handle = model.dynamics.embed.register_forward_hook(lambda *_: calls.append(1))
    dream(steps=4)
    handle.remove()
    assert len(calls) == 3 * (4 + 1)  # per dreamt frame four looks and one commit
