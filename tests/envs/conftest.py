"""An environment in another interpreter, for the tests that have one."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from longdream.envs.remote import RemoteEnv

# An environment with old gym's interface: `seed`, reset -> obs, 4-tuples, render(mode). It does not need old gym: the
# server recognises spaces by the names of their classes. Action 1 ends the episode, 2 reaches its time limit, and the
# actions from 3 on cause faults.
OLD_WORLD = """
import ctypes, os, random, signal, subprocess, sys, time
import numpy as np

OURS = ("longdream", "envs", "agent")

class Box:
    def __init__(self, low, high):
        self.low = np.full(2, low, np.float32)
        self.high = np.full(2, high, np.float32)
        self.dtype = np.dtype("f4")

class Discrete:
    def __init__(self, n):
        self.n = n

class Chance:
    pass

class Old:
    observation_space = Box(0, 1)
    action_space = Discrete(10)

    def __init__(self, marks="", stubborn=False, print_lines=0):
        self.marks = marks
        self.generator = np.random.RandomState()
        self.stubborn = stubborn
        self.mode = oct(os.stat(sys.argv[1]).st_mode & 0o777)
        for i in range(print_lines):
            print("line", i)

    def seed(self, seed=None):
        self.generator = np.random.RandomState(seed)

    def observe(self):
        return self.generator.rand(2).astype("f4")

    def reset(self):
        if self.marks and not os.path.exists(self.marks):
            open(self.marks, "w").close()
            os._exit(9)
        self.started = [random.random(), np.random.rand()]
        return self.observe()

    def step(self, action):
        info = {"started": self.started, "mode": self.mode, "ours": [m for m in sys.modules if m in OURS]}
        info.update(pid=os.getpid(), supervisor=os.getppid())
        info.update(chance=Chance(), array=np.arange(3), many=np.zeros(300000))
        if action == 2:
            info["TimeLimit.truncated"] = True
        if action == 3:
            print("the wheel came off"); os._exit(7)
        if action == 4:
            ctypes.string_at(0)
        if action == 5:
            raise ValueError("no such wheel")
        if action == 6:
            stuck_here()
        if action == 7:  # start a child in a session of its own, then block without releasing the GIL
            info["child"] = subprocess.Popen(["sleep", "600"], start_new_session=True).pid
            with open("pids", "w") as pids:
                pids.write("%d %d %d" % (os.getpid(), os.getppid(), info["child"]))
            ctypes.PyDLL(None).sleep(600)
        return self.observe(), np.float64(0.1), action in (1, 2), info

    def render(self, mode="human"):
        return np.full((2, 3, 3), 7, "u1") if mode == "rgb_array" else None

    def close(self):
        open("closed", "w").close()
        if self.stubborn:
            time.sleep(600)

def stuck_here():
    time.sleep(600)
"""


@pytest.fixture
def far_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with old_world.py in it: the other interpreter imports modules from there."""
    (tmp_path / "old_world.py").write_text(OLD_WORLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def remote(far_folder: Path) -> Iterator[Callable[..., RemoteEnv]]:
    made: list[RemoteEnv] = []

    def make(env: str = "old_world:Old", python: str = sys.executable, **kwargs: Any) -> RemoteEnv:
        made.append(gym.make("longdream/Remote-v0", python=python, env=env, **kwargs).unwrapped)
        return made[-1]

    yield make
    for env in made:
        env.close()
