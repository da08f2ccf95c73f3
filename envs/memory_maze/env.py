"""``longdream/MemoryMaze-{9x9,11x11,13x13,15x15}-v0``: the original, over the tasks of the package `memory-maze`."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from longdream.envs import gl
from longdream.envs.contract import UserError
from longdream.envs.memory_maze.sizes import ACTIONS, RENDER_SIDE, check_options

if TYPE_CHECKING:
    from longdream.envs.memory_maze.simulation import Simulation


class MemoryMazeEnv(gym.Env):
    """A maze with coloured targets, one of which is prompted by the colour of the image's border: find it, touch it
    (reward 1), and another is prompted. Each reset makes a new maze. Only the time limit ends an episode: truncated,
    never terminated.

    Observation: uint8 (camera_resolution, camera_resolution, 3). Action: Discrete(6), none, forward, left, right,
    forward left, forward right. Info: the probes (docs/memory-maze.md), if asked for, else empty.

    ``reset(seed=s)`` begins the episodes that upstream's environment made with seed s has, in this process and in any
    other; without a seed the next one of them follows. A seed of 2**32 or more is hashed into that range.

    Args:
        size: 9, 11, 13 or 15: cells along a side.
        probes: tell layout and poses in `info`.
        camera_resolution: pixels along a side of the observation, 64 to 480.
        top_camera: the observation is the map from above.
        good_visibility: low walls, and targets above the floor.
        control_freq: steps per second of simulated time, 200 divided by a whole number; the time limit stays.
        randomize_colors: the targets' colours are drawn from all six in each episode.
        render_mode: None, "rgb_array" (what the agent sees, large) or "top" (the map); 480 pixels along a side.

    Raises:
        UserError: an argument that cannot be, or no OpenGL that draws without a display.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "top"], "render_fps": 4}  # noqa: RUF012 as in gym.Env

    def __init__(
        self,
        size: int,
        probes: bool = False,
        camera_resolution: int = 64,
        top_camera: bool = False,
        good_visibility: bool = False,
        control_freq: float = 4.0,
        randomize_colors: bool = False,
        render_mode: str | None = None,
    ) -> None:
        check_options(size, camera_resolution, control_freq, render_mode)
        self.simulation = simulation_class()(
            size, camera_resolution, top_camera, good_visibility, control_freq, randomize_colors
        )
        self.probes, self.render_mode, self.running = probes, render_mode, False
        self.metadata = self.metadata | {"render_fps": control_freq}
        self.observation_space = spaces.Box(0, 255, (camera_resolution, camera_resolution, 3), np.uint8)
        self.action_space = spaces.Discrete(len(ACTIONS))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        fresh = self._np_random is None
        super().reset(seed=seed)
        if seed is not None:
            self.simulation.seed(seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0]))
        elif fresh:
            self.simulation.seed(int(self.np_random.integers(2**32)))
        self.simulation.reset()
        self.running = True
        return self.simulation.image(), self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self.running:
            raise ResetNeeded("Memory Maze: call reset before step, at the beginning and after an episode ended")
        if not self.action_space.contains(action):
            names = ", ".join(f"{i} {name}" for i, name in enumerate(ACTIONS))
            raise UserError(f"action {action!r}: Memory Maze has {names}")
        reward, over = self.simulation.step(int(action))
        self.running = not over
        return self.simulation.image(), reward, False, over, self._info()

    def render(self) -> np.ndarray | None:
        """The present frame, uint8 (480, 480, 3), as render_mode has it."""
        if self.render_mode is None:
            return None
        return self.simulation.draw("top" if self.render_mode == "top" else "egocentric", RENDER_SIDE)

    def close(self) -> None:
        self.simulation.close()
        self.running = False

    def _info(self) -> dict[str, Any]:
        return self.simulation.probes() if self.probes else {}


def simulation_class(draws: bool = True) -> type[Simulation]:
    """The class, imported with what it stands on; OpenGL is looked for only where it `draws`.

    Raises:
        UserError: a package of it, or OpenGL, does not work here.
    """
    if draws:
        gl.choose()
    with upstream_imports():
        try:
            from longdream.envs.memory_maze.simulation import Simulation
        except (ImportError, RuntimeError, AttributeError) as error:
            raise UserError(f"Memory Maze cannot be imported: {' '.join(str(error).split())}") from error
    return Simulation


@contextmanager
def upstream_imports() -> Iterator[None]:
    """Lets modules of `memory_maze` be imported without what its __init__ does, which is to import the old `gym`.

    The package is entered as a module that was found but never run, and taken out again: who imports it elsewhere gets
    the real one. Filters for warnings that dm_control sets are taken back.
    """
    known = "memory_maze" in sys.modules
    found = None if known else importlib.util.find_spec("memory_maze")
    if found is not None:
        sys.modules["memory_maze"] = importlib.util.module_from_spec(found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if not known:
            sys.modules.pop("memory_maze", None)
