"""Homing-v0: what it takes to be home in time, and what its observations tell."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest

from longdream.envs.checks import check
from longdream.envs.contract import UserError
from longdream.envs.tasks.homing import FORWARD, HEADINGS, LEFT, RIGHT, STAY, HomingEnv


def play(env: HomingEnv, policy: Callable[[dict], int], seed: int) -> list[float]:
    """The rewards of an episode."""
    obs, _ = env.reset(seed=seed)
    rewards = []
    while True:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        rewards.append(reward)
        assert not truncated
        if terminated:
            assert len(rewards) == env.away + env.back and not any(rewards[: env.away])
            return rewards


class Navigator:
    """Goes home by what the agent sees alone: it adds up its moves, as seen when the episode began."""

    def __init__(self) -> None:
        self.at = np.zeros(2, int)
        self.heading = 0

    def __call__(self, obs: dict) -> int:
        if obs["moved"] == FORWARD:
            self.at = self.at + HEADINGS[self.heading]
        elif obs["moved"] in (LEFT, RIGHT):
            self.heading = (self.heading + (1 if obs["moved"] == RIGHT else -1)) % 4
        way = -self.at
        if not way.any():
            return STAY
        if way @ HEADINGS[self.heading] > 0:
            return FORWARD
        return RIGHT if way @ HEADINGS[(self.heading + 1) % 4] >= 0 else LEFT


@pytest.mark.parametrize(("side", "away"), [(2, 3), (5, 10), (6, 40)])
def test_adding_up_the_moves_leads_home(side: int, away: int) -> None:
    """The way back is at most 2 * side - 2 cells long and has three turns."""
    env = HomingEnv(side, away, 2 * side + 2)
    assert all(play(env, Navigator(), seed)[-1] == 1 for seed in range(100))


def test_returns_are_those_that_are_said() -> None:
    env = HomingEnv()
    rng = np.random.default_rng(0)
    policies = {10.1: Navigator, 3.6: lambda: lambda _: STAY, 3.3: lambda: lambda _: rng.integers(4)}
    for said, policy in policies.items():
        returns = [sum(play(env, policy(), seed)) for seed in range(400)]
        assert np.mean(returns) == pytest.approx(said, abs=0.5)


def test_what_is_seen() -> None:
    env = HomingEnv(side=3, away=0, back=7)
    obs, _ = env.reset(seed=4)
    assert obs["led"] == 0 and obs["left"] == 1 and obs["moved"] == STAY
    while obs["ahead"]:
        before = obs["ahead"]
        obs = env.step(FORWARD)[0]
        assert obs["moved"] == FORWARD and obs["ahead"] == before - 1
    obs = env.step(FORWARD)[0]
    assert obs["moved"] == STAY and obs["ahead"] == 0  # the wall
    env = HomingEnv(away=2)
    env.reset(seed=0)
    led = [env.step(STAY)[0] for _ in range(3)]
    assert [obs["led"] for obs in led] == [1, 0, 0] and led[2]["moved"] == STAY
    env.render_mode = "rgb_array"
    image = env.render()
    assert image is not None and image.shape == (7 * 24, 7 * 24, 3)


def test_gymnasium_accepts_it() -> None:
    report = check("longdream/Homing-v0")
    assert report.problems == [] and len(report.passed) == 5


def test_arguments_out_of_range_are_one_line() -> None:
    with pytest.raises(UserError, match="a back of at least 1"):
        gym.make("longdream/Homing-v0", back=0)
