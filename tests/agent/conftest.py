"""Disks that run full, for real; runs to dream of; small recordings, real files through the real codec."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
from gymnasium import spaces

from longdream.agent.config import options
from longdream.agent.data import npz_episodes as offline
from longdream.agent.train.trainer import OnlineTrainer


class Cramped:
    """A folder in which, inside `with cramped.room(bytes)`, a file larger than that cannot be written."""

    def __init__(self, folder: Path, full: bool):
        self.folder, self.full = folder, full

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        if self.full:
            disk = os.statvfs(self.folder)
            filler = self.folder / "filler"
            filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - size)))
            try:
                yield
            finally:
                filler.unlink()
        else:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["full disk", "file size limit"])
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cramped]:
    folder = tmp_path / "cramped"
    folder.mkdir()
    if request.param == "file size limit":
        yield Cramped(folder, full=False)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield Cramped(folder, full=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Mixed(gym.Env):
    """All kinds of observations at once, and factored actions that do not count from 0."""

    def __init__(self):
        self.observation_space = spaces.Dict(
            {
                "eye": spaces.Box(0, 255, (16, 20), np.uint8),
                "leg": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
                "gear": spaces.Discrete(3, start=-1),
            }
        )
        self.action_space = spaces.MultiDiscrete([2, 3], start=[0, 5])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.seen(), {}

    def seen(self):
        return {"eye": np.full((16, 20), 20 * self.t, np.uint8), "leg": np.eye(2) * self.t, "gear": self.t % 3 - 1}

    def step(self, action):
        assert action in self.action_space
        self.t += 1
        return self.seen(), float(action[0]), self.t >= 7, False, {}


class Nested(gym.Env):
    """A goal, a grid, a bag of things, a channel-first camera and words; buttons and a wheel; three steps."""

    def __init__(self):
        thing = spaces.Dict({"kind": spaces.Discrete(4, start=1), "at": spaces.Box(-1, 1, (2,))})
        self.observation_space = spaces.Dict(
            {
                "goal": spaces.Tuple([spaces.Box(-1, 1, (3,)), spaces.Discrete(3, start=1)]),
                "grid": spaces.Box(0, 255, (5, 5, 2), np.uint8),
                "bag": spaces.Sequence(thing),
                "eye": spaces.Box(0, 255, (2, 9, 12), np.uint8),
                "words": spaces.Text(9, charset="abc "),
            }
        )
        wheel = spaces.Box(-np.inf, np.inf, (1,))
        self.action_space = spaces.Dict({"buttons": spaces.MultiBinary(3), "wheel": wheel})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.seen(), {}

    def seen(self):
        thing = {"kind": np.int64(1 + self.t), "at": np.full(2, self.t / 4, np.float32)}
        return {
            "goal": (np.full(3, self.t / 4, np.float32), np.int64(1 + self.t % 3)),
            "grid": np.full((5, 5, 2), 60 * self.t, np.uint8),
            "bag": (thing,) * min(self.t, 2),
            "eye": np.full((2, 9, 12), 40 * self.t, np.uint8),
            "words": "a b" if self.t % 2 else "c",
        }

    def step(self, action):
        assert self.action_space.contains(action) and abs(action["wheel"]) <= 4
        self.t += 1
        return self.seen(), float(action["buttons"].sum()), self.t >= 3, False, {}


gym.register("MixedForDreams-v0", entry_point=Mixed)
gym.register("NestedForDreams-v0", entry_point=Nested)


@pytest.fixture(scope="session")
def dream_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of runs by name, each trained for a moment when first asked for. Not to be changed."""
    settings: dict[str, dict] = {"images": {}, "vectors": {"env.id": "CartPole-v1"}, "box": {"env.id": "Pendulum-v1"}}
    nested = {"read_as": {"bag": 2}, "act_as.wheel": 4.0}
    settings["nested"] = {"env.id": "NestedForDreams-v0", "env.kwargs": nested}
    settings["mixed"] = {"env.id": "MixedForDreams-v0", "forcing.objective": "mask"}
    short = {"learn.steps": 60, "learn.prefill": 40, "learn.warmup": 2, "evaluate.final_episodes": 4}
    root, made = tmp_path_factory.mktemp("dream_runs"), set()

    def folder(name: str) -> Path:
        if name not in made:
            other = {"env.kwargs": {}} if settings[name] else {}
            config = options.update(options.load("tiny"), {"evaluate.every": 0} | short | other | settings[name])
            OnlineTrainer.train(config, root / name, console=False)
            made.add(name)
        return root / name

    return folder


# -- recordings -------------------------------------------------------------------------------------------------------


def _shades(n: int, side: int = 32, first: int = 0) -> np.ndarray:
    """Frames `(n, side, side, 3)`, each of one shade that tells its number: 4 more than the one before."""
    values = (20 + 4 * (first + np.arange(n))) % 230
    return np.broadcast_to(values[:, None, None, None], (n, side, side, 3)).astype(np.uint8)


def _write_mp4(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, frames, plugin="pyav", codec="libx264", fps=20)


def _write_maze(path: Path, n: int = 12, seed: int = 0) -> np.ndarray:
    """An episode of Memory Maze whose row t was led to by action t % 6 and reward t; its pictures."""
    rng, rows = np.random.default_rng(seed), []
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = rng.integers(256, size=(n, 64, 64, 3)).astype(np.uint8)
    for t in range(n):
        probes = {
            "maze_layout": np.ones((9, 9), np.uint8),
            "agent_pos": np.array([t % 9, 4.5]),
            "agent_dir": np.array([1.0, 0.0]),
            "targets_pos": np.zeros((3, 2)),
            "targets_vec": np.zeros((3, 2)),
            "target_index": np.int64(0),
            "target_color": np.zeros(3),
        }
        rows.append(offline.row(frames[t], t % 6 if t else None, float(t), probes))
    offline.write(path, rows)
    return frames


@pytest.fixture
def shades() -> Callable[..., np.ndarray]:
    return _shades


@pytest.fixture
def write_mp4() -> Callable[[Path, np.ndarray], None]:
    pytest.importorskip("av")
    return _write_mp4


@pytest.fixture
def write_maze() -> Callable[..., np.ndarray]:
    return _write_maze


@pytest.fixture
def mazes(tmp_path: Path) -> Path:
    """Six episodes of 12 rows."""
    for i in range(6):
        _write_maze(tmp_path / "mazes" / f"episode-{i}.npz", seed=i)
    return tmp_path / "mazes"
