"""Counting-v0, which other tests rely on: every row equals its formulas."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from longdream.envs import World
from longdream.envs.tasks.counting import PHASES, CountingVecEnv, episode_length, expected_reward, is_terminal

N, STEPS = 5, 120


def rows(first_index: int = 0, steps: int = STEPS, seed: int = 0):
    world = World("longdream/Counting-v0", N, seed=0, kwargs={"first_index": first_index})
    rng, row = np.random.default_rng(seed), world.reset()
    for _ in range(steps):
        action = world.random_action(rng)
        yield row, world.spec.action.decode(action)
        row = world.step(action)


def test_every_row_equals_the_formulas():
    time = np.zeros(N, int)
    episode = np.zeros(N, int)
    index = np.arange(3, 3 + N)
    last_action = np.full(N, -1)
    ends = {"terminated": 0, "truncated": 0}
    for row, action in rows(first_index=3):
        np.testing.assert_array_equal(row.obs["time"], np.stack([time, episode, index, last_action], 1))
        np.testing.assert_array_equal(row.obs["phase"], time % PHASES)
        np.testing.assert_array_equal(row.is_first, time == 0)
        reward = np.where(time == 0, 0, expected_reward(time, last_action))
        np.testing.assert_array_equal(row.reward, reward.astype(np.float32))
        done = time == episode_length(index, episode)
        np.testing.assert_array_equal(row.terminated, done & is_terminal(index, episode))
        np.testing.assert_array_equal(row.truncated, done & ~is_terminal(index, episode))
        ends["terminated"] += row.terminated.sum()
        ends["truncated"] += row.truncated.sum()
        time = np.where(done, 0, time + 1)
        episode = episode + done
        last_action = np.where(done, -1, action)
    assert min(ends.values()) > 10


def test_lengths_differ_by_copy_and_by_episode():
    lengths = episode_length(np.arange(4)[:, None], np.arange(4)[None])
    assert (np.diff(lengths, axis=0) != 0).all() and (np.diff(lengths, axis=1) != 0).all()
    assert lengths.min() >= 3


def test_state_continues_exactly():
    world = CountingVecEnv(N)
    world.reset(seed=0)
    rng = np.random.default_rng(0)
    while not world.ended.any():
        world.step(rng.integers(0, 5, N))
    state, actions = world.get_state(), rng.integers(0, 5, (60, N))
    expected = [world.step(action) for action in actions]
    other = CountingVecEnv(N)
    other.set_state(state)
    for action, row in zip(actions, expected, strict=True):
        obs, *rest, _ = other.step(action)
        np.testing.assert_array_equal(obs["time"], row[0]["time"])
        np.testing.assert_array_equal(rest, row[1:4])


def test_reset_with_and_without_seed():
    world = CountingVecEnv(3)
    for seed, expected in ((None, [0, 0, 0]), (None, [1, 1, 1]), (7, [0, 0, 0]), ([None, 7, None], [1, 0, 1])):
        np.testing.assert_array_equal(world.reset(seed=seed)[0]["time"][:, 1], expected)


def test_gymnasium_accepts_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*maximum value is infinity")  # the time has no upper bound
        check_env(gym.make("longdream/Counting-v0").unwrapped)
        single = gym.make("longdream/Counting-v0", index=2)
    assert single.reset(seed=0)[0]["time"].tolist() == [0, 0, 2, -1]
    for time in range(1, episode_length(2, 0) + 1):
        obs, reward, terminated, truncated, _ = single.step(3)
        assert obs["time"].tolist() == [time, 0, 2, 3] and reward == pytest.approx(time + 0.003)
        assert (terminated, truncated) == (time == episode_length(2, 0), False)
