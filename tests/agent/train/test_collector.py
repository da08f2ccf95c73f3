"""Collecting: random actions, and surprise, measured at every real step, stored with the row, usable as curiosity."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.data.replay import Replay
from longdream.agent.train.collector import Collector
from longdream.envs.make import World
from longdream.worldmodel.types import Batch


@pytest.fixture
def config() -> Config:
    return options.update(options.load("tiny"), {"learn.model_rate": 3e-3, "replay.batch": 8, "replay.length": 16})


def collector(config: Config, folder: Path) -> Collector:
    torch.manual_seed(0)
    world = World(config.env.id, config.env.copies, 0, config.env.kwargs)
    agent = Agent(config, world.spec)
    replay = Replay(folder, world.spec, world.num_envs, config.replay.capacity)
    return Collector(world, agent, replay, np.random.default_rng(0))


@pytest.mark.parametrize("sticky", [0.0, 0.9])
def test_random_actions_stick(config: Config, tmp_path: Path, sticky: float) -> None:
    collecting = collector(
        dataclasses.replace(config, learn=dataclasses.replace(config.learn, sticky=sticky)), tmp_path
    )
    copies = collecting.world.num_envs
    stays = np.zeros((2, copies))
    for _ in range(600):
        before = collecting.carry.action
        follows = ~collecting.row.is_first
        collecting.step(random=True)
        stays += follows * np.stack([(collecting.carry.action == before).all(1).numpy(), np.ones(copies)])
    share = sticky * (np.arange(copies) + 0.5) / copies  # more in each copy than in the one before
    parts = collecting.world.spec.action.parts[0]
    assert stays[0] / stays[1] == pytest.approx(share + (1 - share) / parts, abs=0.1)


def test_surprise_is_stored_with_its_row_and_zero_at_first_rows(config: Config, tmp_path: Path) -> None:
    act = collector(config, tmp_path)
    for _ in range(60):
        act.step(random=False)
    rows = act.replay.sample(np.random.default_rng(0), 16, 40)
    assert (rows["surprise"][rows["is_first"]] == 0).all() and rows["is_first"].any()
    assert (rows["surprise"][~rows["is_first"]] > 0).all()


def test_what_came_before_m_learned_has_no_surprise(config: Config, tmp_path: Path) -> None:
    act = collector(config, tmp_path)
    for _ in range(60):
        act.step(random=True)
    assert (act.replay.sample(np.random.default_rng(0), 16, 40)["surprise"] == 0).all()


def test_each_episode_has_the_mean_of_its_parts(config: Config, tmp_path: Path) -> None:
    act = collector(config, tmp_path)
    ended = [episode for _ in range(60) for episode in act.step(random=True)]
    assert ended
    for episode in ended:
        parts = [episode[f"episode/surprise_{part}"] for part in ("latent", "reward", "end")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(episode["episode/surprise"], rel=1e-4)


def test_what_was_learned_surprises_less(config: Config, tmp_path: Path) -> None:
    act = collector(config, tmp_path)
    for _ in range(100):
        act.step(random=True)
    before = np.mean([e["episode/surprise"] for _ in range(100) for e in act.step(random=True)])
    rng = np.random.default_rng(1)
    for _ in range(200):
        act.agent.update(act.replay.sample(rng, config.replay.batch, config.replay.length))
    after = np.mean([e["episode/surprise"] for _ in range(100) for e in act.step(random=True)])
    assert after < 0.7 * before


@pytest.mark.parametrize("curiosity", [0.0, 0.5])
def test_curiosity_is_a_reward_that_m_expects(config: Config, tmp_path: Path, curiosity: float) -> None:
    """Rows after action 1 surprise by 2, others by 0, and nothing pays: M expects 2 * curiosity of action 1 alone."""
    config = dataclasses.replace(config, learn=dataclasses.replace(config.learn, curiosity=curiosity))
    act = collector(config, tmp_path)
    for _ in range(60):
        act.step(random=True)
    agent, rng = act.agent, np.random.default_rng(2)
    for _ in range(150):
        rows = act.replay.sample(rng, config.replay.batch, config.replay.length)
        rows["reward"][:] = 0
        rows["surprise"][:, 1:] = 2.0 * (rows["action"][:, :-1, 1] == 1)
        agent.update(rows)
    batch = Batch.of(rows)
    with torch.no_grad():
        z = agent.model.encoder(batch.obs)
        first = batch.clip_first()
        feat = agent.model.objective.run(agent.model.dynamics, z, batch.prev_action(), first, 1).feat
        reward, _ = agent.model.reward_continue.expect(feat, batch.action)
    surprising = batch.action[..., 1] == 1
    assert reward[surprising].mean().item() == pytest.approx(2 * curiosity, abs=0.2)
    assert reward[~surprising].mean().item() == pytest.approx(0, abs=0.2)
