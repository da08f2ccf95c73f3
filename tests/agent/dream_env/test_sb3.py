"""Dreams as Stable-Baselines3 takes them: the same dreams as in Gymnasium's form, in spaces that count from 0."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3 import A2C, DQN, PPO, SAC

import longdream
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.dream_env.sb3 import DreamsForSb3
from longdream.envs.contract import UserError

SMALL: dict[str, Any] = {"pool": 20, "horizon": 4}


def test_the_dreams_are_those_of_the_vector_environment(dream_runs: Callable) -> None:
    run = dream_runs("vectors")
    ours = longdream.sb3_env(run, 5, **SMALL)
    theirs = DreamVecEnv(5, run, autoreset_mode=AutoresetMode.SAME_STEP, **SMALL)
    ours.seed(7)
    np.testing.assert_array_equal(ours.reset(), theirs.reset(seed=7)[0])
    ends = 0
    for t in range(11):
        action = np.arange(5) % 2
        obs, reward, done, infos = ours.step(action)
        expected, paid, terminated, truncated, given = theirs.step(action)
        np.testing.assert_array_equal(obs, expected)
        np.testing.assert_array_equal(reward, paid.astype(np.float32))
        np.testing.assert_array_equal(done, terminated | truncated)
        for i in np.flatnonzero(done):
            np.testing.assert_array_equal(infos[i]["terminal_observation"], given["final_obs"][i])
            assert infos[i]["TimeLimit.truncated"] == truncated[i] and 1 <= infos[i]["episode"]["l"] <= 4
            ends += 1
        assert all("terminal_observation" not in infos[i] for i in np.flatnonzero(~done)), t
    assert ends >= 5


def test_discrete_values_count_from_0(dream_runs: Callable) -> None:
    """The real actions are [0 or 1, 5 to 7], and the gear is -1 to 1."""
    env = DreamsForSb3(DreamVecEnv(3, dream_runs("mixed"), "image", autoreset_mode="same_step", **SMALL))
    assert env.action_space == spaces.MultiDiscrete([2, 3]) and env.observation_space["gear"] == spaces.Discrete(3)
    obs: Any = env.reset()
    assert all(space.contains({k: v[0] for k, v in obs.items()}[key]) for key, space in env.observation_space.items())
    env.step_async(np.array([[0, 0], [1, 2], [1, 0]]))
    assert env.actions.tolist() == [[0, 5], [1, 7], [1, 5]]
    for _ in range(6):
        obs, _, _, infos = env.step(np.array([env.action_space.sample() for _ in range(3)]))
        seen = [obs, *(info["terminal_observation"] for info in infos if info)]
        assert all(np.isin(each["gear"], (0, 1, 2)).all() for each in seen)


@pytest.mark.parametrize(
    ("name", "algorithm", "kwargs"),
    [
        ("vectors", PPO, {"n_steps": 8, "batch_size": 16}),
        ("images", A2C, {"n_steps": 8}),
        ("mixed", PPO, {"n_steps": 8, "batch_size": 16}),
        ("images", DQN, {"learning_starts": 16}),
        ("box", SAC, {"learning_starts": 16}),
    ],
)
def test_algorithms_learn_in_it(dream_runs: Callable, name: str, algorithm: Any, kwargs: dict[str, Any]) -> None:
    env = longdream.sb3_env(dream_runs(name), 4, **SMALL)
    learner = algorithm("MlpPolicy", env, seed=0, device="cpu", **kwargs)
    learner.learn(64)
    assert learner.num_timesteps == 64 and len(learner.ep_info_buffer) > 0
    env.close()


def test_the_error_of_sb3_names_the_adapter(dream_runs: Callable) -> None:
    dreams: Any = gym.make_vec(
        "longdream/Dream-v0", 2, "vector_entry_point", checkpoint=str(dream_runs("vectors")), **SMALL
    )
    with pytest.raises(ValueError, match=r"Stable-Baselines3 takes longdream\.sb3_env\(run, num_envs\) instead"):
        PPO("MlpPolicy", dreams)


def test_mistakes_are_one_line(dream_runs: Callable) -> None:
    with pytest.raises(UserError, match="autoreset_mode: Stable-Baselines3 has one of its own"):
        longdream.sb3_env(dream_runs("vectors"), 2, autoreset_mode="next_step")
    with pytest.raises(UserError, match="num_envs = 0: must be at least 1"):
        longdream.sb3_env(dream_runs("vectors"), 0)
    with pytest.raises(AttributeError, match="module 'longdream' has no attribute 'sb3env'"):
        _ = longdream.sb3env  # type: ignore[attr-defined]


def test_importing_the_package_stays_light() -> None:
    code = "import sys, longdream; print(*[n for n in ('torch', 'stable_baselines3') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
