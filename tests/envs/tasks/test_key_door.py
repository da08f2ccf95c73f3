"""KeyDoor-v0: its rewards, its ends and its pictures."""

import gymnasium as gym
import numpy as np
import pytest

from longdream.envs.checks import check
from longdream.envs.contract import UserError
from longdream.envs.tasks.key_door import AGENT, KEY, MOVES, KeyDoorEnv


def towards(env: KeyDoorEnv, place: np.ndarray) -> int:
    """The move that brings the agent a cell nearer."""
    return int(np.abs(env.agent + MOVES - place).sum(1).argmin())


def optimal(env: KeyDoorEnv) -> list[int]:
    return [towards(env, env.door if env.has_key else env.key), 1]


def play(env: KeyDoorEnv, policy, seed: int) -> tuple[float, int, bool]:
    """Return, length and whether the door was opened."""
    env.reset(seed=seed)
    total, length = 0.0, 0
    while True:
        _, reward, terminated, truncated, _ = env.step(policy(env))
        total, length = total + reward, length + 1
        if terminated or truncated:
            return total, length, terminated


def test_fetching_the_key_and_opening_the_door_is_the_optimum() -> None:
    env = KeyDoorEnv()
    played = [play(env, optimal, seed) for seed in range(40)]
    assert all(total == env.optimum and opened for total, _, opened in played)
    assert 1 < np.mean([length for _, length, _ in played]) < 16


def test_the_door_needs_the_key_and_the_second_choice() -> None:
    env = KeyDoorEnv()
    assert play(env, lambda env: [towards(env, env.door), 1], seed=3) == (0.0, 60, False)
    assert play(env, lambda env: [optimal(env)[0], 0], seed=3) == (0.5, 60, False)


def test_random_actions_have_what_the_page_says() -> None:
    env = KeyDoorEnv()
    rng = np.random.default_rng(0)
    returns = [play(env, lambda _: [rng.integers(5), rng.integers(2)], seed)[0] for seed in range(300)]
    assert np.mean(returns) == pytest.approx(0.35, abs=0.1)


def test_the_picture_shows_what_there_is() -> None:
    env = KeyDoorEnv(side=5, cell=3)
    obs, _ = env.reset(seed=1)
    cells = obs["image"][1::3, 1::3]
    assert obs["image"].shape == (15, 15, 3) and tuple(cells[tuple(env.agent)]) == AGENT
    assert tuple(cells[tuple(env.key)]) == KEY and obs["key"] == 0
    while not env.has_key:
        obs = env.step(optimal(env))[0]
    assert not (obs["image"] == KEY).all(-1).any() and obs["key"] == 1 and obs["left"] < 1


def test_gymnasium_accepts_it() -> None:
    report = check("longdream/KeyDoor-v0")
    assert report.problems == [] and len(report.passed) == 5


def test_arguments_out_of_range_are_one_line() -> None:
    with pytest.raises(UserError, match="at least 4 cells"):
        gym.make("longdream/KeyDoor-v0", side=3)
