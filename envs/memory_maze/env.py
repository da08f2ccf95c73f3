"""``longdream/MemoryMaze-{9x9,11x11,13x13,15x15}-v0``: the original Memory Maze, built on the package `memory-maze`."""

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

from longdream.envs.contract import UserError
from longdream.envs.extras import require
from longdream.envs.memory_maze import gl
from longdream.envs.memory_maze.sizes import ACTIONS, RENDER_SIDE, check_options

if TYPE_CHECKING:
    from longdream.envs.memory_maze.simulation import Simulation


class MemoryMazeEnv(gym.Env):
    """A maze with coloured targets. The colour of the image's border is the prompt: the target to find next.

    Touching the prompted target gives reward 1, and another target is prompted. Each reset generates a new maze. Only
    the time limit ends an episode, as a truncation; episodes never terminate.

    Observation: uint8 (camera_resolution, camera_resolution, 3). Action: Discrete(6): none, forward, left, right,
    forward left, forward right. Info: the probes (docs/memory-maze.md) if `probes` is true, else empty.

    ``reset(seed=s)`` starts the sequence of episodes that upstream's environment generates from seed s, in any process.
    ``reset()`` continues with the next episode of the sequence. A seed of 2**32 or more is hashed to a smaller one.

    Args:
        size: cells along a side: 9, 11, 13 or 15.
        probes: return the maze's layout and all poses in `info`.
        camera_resolution: side of the observation in pixels, 64 to 480.
        top_camera: the observation is the map from above.
        good_visibility: low walls, and targets above the floor.
        control_freq: steps per second of simulated time: 200 divided by an integer. The time limit in seconds does not
            change.
        randomize_colors: draw the targets' colours from all six in each episode.
        render_mode: None, "rgb_array" (the agent's view) or "top" (the map), both 480 pixels along a side.

    Raises:
        UserError: an argument is invalid, or no OpenGL backend works without a display.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "top"], "render_fps": 4}  # noqa: RUF012 as in gym.Env
    action_names = ACTIONS

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
        self.probes = probes
        self.render_mode = render_mode
        self.running = False
        self.metadata = self.metadata | {"render_fps": control_freq}
        self.observation_space = spaces.Box(0, 255, (camera_resolution, camera_resolution, 3), np.uint8)
        self.action_space = spaces.Discrete(len(ACTIONS))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        first_reset = self._np_random is None
        super().reset(seed=seed)
        if seed is not None:
            self.simulation.seed(seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0]))
        elif first_reset:
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
        """The current frame, uint8 (480, 480, 3), from the view that render_mode selects."""
        if self.render_mode is None:
            return None
        return self.simulation.draw("top" if self.render_mode == "top" else "egocentric", RENDER_SIDE)

    def close(self) -> None:
        self.simulation.close()
        self.running = False

    def get_probes(self) -> dict[str, Any]:
        """The state that the image does not show: the probes of docs/memory-maze.md."""
        return self.simulation.probes()

    def _info(self) -> dict[str, Any]:
        return self.get_probes() if self.probes else {}


def simulation_class(draws: bool = True) -> type[Simulation]:
    """Import the class Simulation and the packages that it needs. An OpenGL backend is chosen only if `draws` is true.

    Raises:
        UserError: a package or OpenGL does not work on this machine.
    """
    if draws:
        gl.choose()
    require("maze", "Memory Maze")
    with upstream_imports():
        try:
            from longdream.envs.memory_maze.simulation import Simulation
        except (ImportError, RuntimeError, AttributeError) as error:
            raise UserError(f"Memory Maze cannot be imported: {' '.join(str(error).split())}") from error
    return Simulation


@contextmanager
def upstream_imports() -> Iterator[None]:
    """Import modules of `memory_maze` within this context without running its __init__, which imports the old `gym`.

    The package is registered in sys.modules without being executed, and removed at the end, so that a later import
    elsewhere gets the complete package. Warning filters that dm_control changes are restored.
    """
    known = "memory_maze" in sys.modules
    spec = None if known else importlib.util.find_spec("memory_maze")
    if spec is not None:
        sys.modules["memory_maze"] = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if not known:
            sys.modules.pop("memory_maze", None)
