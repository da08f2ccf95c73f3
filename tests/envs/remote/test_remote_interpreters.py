"""Old interpreters with old gym, if this machine has such an interpreter and can install the packages."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from other_pythons import interpreters

from longdream.envs.contract import UserError
from longdream.envs.remote import RemoteEnv

OLD = ("3.7", "3.8", "3.9", "3.10")
# gym, seeds of env.seed() and 4-tuples; and the last one, with Gymnasium's interface
GYMS = {"gym==0.19.0": "numpy<1.24", "gym==0.26.2": "numpy<2"}


@pytest.fixture(scope="module", params=GYMS)
def old_gym(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The oldest Python here, and a folder with an old gym for it: arguments of RemoteEnv."""
    python = next((path for version in OLD for path in interpreters(version)), None)
    if python is None:
        pytest.skip(f"there is no Python {', '.join(OLD)} with pip here")
    folder = str(tmp_path_factory.mktemp("gym"))
    packages = [request.param, GYMS[request.param]]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "-t", folder, *packages], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed with {python}: {done.stderr[-300:]}")
    return {"python": python, "environ": {"PYTHONPATH": folder}}


def test_old_gym(old_gym: dict[str, Any]) -> None:
    env = RemoteEnv(env="gym:CartPole-v1", **old_gym)
    try:
        here = gym.make("CartPole-v1")
        assert env.action_space == here.action_space
        assert env.observation_space.shape == (4,) and env.observation_space.dtype == np.float32
        ends, seen = [], []
        for _ in range(2):
            seen.append(env.reset(seed=3)[0])
            for t in range(500):
                obs, reward, terminated, truncated, _ = env.step(np.int64(t % 2))
                assert obs.shape == (4,) and reward == 1.0
                seen.append(obs)
                if terminated or truncated:
                    ends.append((t, terminated, truncated))
                    break
        assert ends[0] == ends[1] and ends[0][1:] == (True, False)
        np.testing.assert_array_equal(*np.split(np.array(seen), 2))  # the seed reaches it
        assert (env.reset(seed=4)[0] != seen[0]).all()
    finally:
        env.close()


def test_old_time_limit(old_gym: dict[str, Any]) -> None:
    env = RemoteEnv(env="MountainCar-v0", **old_gym)
    try:
        env.reset(seed=0)
        flags = [env.step(np.int64(1))[2:4] for _ in range(200)]
        assert flags[-1] == (False, True) and set(flags[:-1]) == {(False, False)}
    finally:
        env.close()


def test_an_interpreter_that_is_too_old_is_reported() -> None:
    paths = interpreters("3.6")
    if not paths:
        pytest.skip("there is no Python 3.6 here")
    with pytest.raises(UserError, match=r"it said: Python 3\.7 or newer is needed, this is 3\.6"):
        RemoteEnv(paths[0], "CartPole-v1")


def test_an_interpreter_without_numpy_is_reported(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = str(tmp_path / "bare" / "bin" / "python")
    with pytest.raises(UserError, match=rf"numpy is missing here .*: {tmp_path}.* -m pip install numpy"):
        RemoteEnv(bare, "CartPole-v1")
