"""``longdream/Recall-v0``: remember a colour along a corridor, then open the door of that colour.

A small image-based memory task that no policy without memory can solve. It is vectorised and takes a few microseconds
per step.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from longdream.envs.contract import OneCopy, UserError

COLOURS = np.array(
    [(230, 30, 30), (30, 200, 50), (40, 80, 250), (245, 220, 30), (220, 40, 220), (30, 220, 225)], dtype=np.uint8
)
UPSCALE = 8  # enlargement of rendered frames


def chance_and_optimum(doors: int = 3) -> tuple[float, float]:
    """The best mean return without memory, and the best with memory. RecallVecEnv explains why the first is exact."""
    return 1.0 / doors, 1.0


class RecallVecEnv(gym.vector.VectorEnv):
    """num_envs corridors with NEXT_STEP autoreset.

    The agent starts at the entrance, position 0, in front of a large sign in the cue's colour. Action 0 moves it one
    cell forward, up to the junction at position ``corridor``. At the junction there are doors in a random order, which
    is drawn in each episode. Action k opens the k-th door from the left and terminates the episode: the reward is 1 if
    the door has the cue's colour, else 0. Opening a door elsewhere, or moving forward at the junction, only lets one
    step pass. The episode is truncated after ``max_steps`` steps. Only the frame at the entrance depends on the cue,
    only the frame at the junction depends on the order, and no frame depends on the time.

    The best return without memory is exactly 1 / doors. The cue is uniform and independent of the order, so for any
    frame at the junction each door is correct with probability 1 / doors. A policy of the current frame therefore gets
    at most 1 / doors, and any door gives that. A policy that remembers the cue always gets 1. (A memory of a few steps
    does not help a policy that always moves forward. A policy that waits could encode the cue in its waiting times.)

    Observation: uint8 (size, size, 3). Action: Discrete(1 + doors). Info is empty.

    Args:
        num_envs: number of copies.
        corridor: steps from the entrance to the junction, at least 1.
        doors: number of doors, 2 to 6.
        size: height and width of a frame in pixels, at least 16.
        max_steps: time limit in steps; None: 4 * (corridor + 2).
        render_mode: None or "rgb_array" (frames enlarged 8 times).

    Raises:
        UserError: an argument is out of its range.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["rgb_array"],
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        corridor: int = 12,
        doors: int = 3,
        size: int = 32,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if corridor < 1 or not 2 <= doors <= len(COLOURS) or size < 16:
            raise UserError(
                f"Recall has corridor={corridor}, doors={doors}, size={size}: it needs a corridor of at least 1,"
                f" 2 to {len(COLOURS)} doors and a size of at least 16"
            )
        max_steps = 4 * (corridor + 2) if max_steps is None else max_steps
        if max_steps <= corridor:
            raise UserError(
                f"Recall has max_steps={max_steps}: opening a door takes at least corridor + 1 = {corridor + 1}"
            )
        self.num_envs = num_envs
        self.corridor = corridor
        self.doors = doors
        self.size = size
        self.max_steps = max_steps
        self.render_mode = render_mode
        self.chance, self.optimum = chance_and_optimum(doors)
        self.action_names = ("forward", *(f"door {k}" for k in range(1, doors + 1)))
        self.single_observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.single_action_space = spaces.Discrete(1 + doors)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self.orders = np.array(list(permutations(range(doors))))  # (doors!, doors): colour of each door, left to right
        self.frames = draw_frames(corridor, self.orders, size)
        self.generators = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self.position, self.cue, self.order, self.steps = np.zeros((4, num_envs), np.int64)
        self.ended = np.zeros(num_envs, np.bool_)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode in every copy. An int seeds copy i with seed + i; None keeps the generators' states."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} copies")
        for i, s in enumerate(seeds):
            if s is not None:
                self.generators[i] = seeding.np_random(s)[0]
        self._begin(np.ones(self.num_envs, np.bool_))
        return self._frames(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.asarray(actions)
        starting = self.ended
        junction = (self.position == self.corridor) & ~starting
        terminated = junction & (actions > 0)
        chosen = self.orders[self.order, np.maximum(actions, 1) - 1]
        reward = (terminated & (chosen == self.cue)).astype(np.float64)
        self.position += (actions == 0) & (self.position < self.corridor)
        self.steps += 1
        truncated = (self.steps >= self.max_steps) & ~terminated & ~starting
        self.ended = terminated | truncated
        if starting.any():
            self._begin(starting)
        return self._frames(), reward, terminated, truncated, {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """An enlarged frame of each copy, (8 * size, 8 * size, 3) uint8."""
        if self.render_mode != "rgb_array":
            return None
        return tuple(self._frames().repeat(UPSCALE, 1).repeat(UPSCALE, 2))

    def get_state(self) -> dict[str, Any]:
        """The complete state of the environment: arrays (num_envs,), and the generators' states as plain numbers."""
        arrays = {key: getattr(self, key).copy() for key in ("position", "cue", "order", "steps", "ended")}
        return {**arrays, "generators": [g.bit_generator.state for g in self.generators]}

    def set_state(self, state: dict[str, Any]) -> None:
        for key in ("position", "cue", "order", "steps", "ended"):
            setattr(self, key, np.array(state[key], dtype=getattr(self, key).dtype))
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.bit_generator.state = value

    def _begin(self, which: np.ndarray) -> None:
        for i in np.flatnonzero(which):
            # a single draw gives both, uniform and independent
            self.cue[i], self.order[i] = divmod(
                int(self.generators[i].integers(self.doors * len(self.orders))), len(self.orders)
            )
        self.position[which] = self.steps[which] = 0
        self.ended[which] = False

    def _frames(self) -> np.ndarray:
        in_corridor = self.doors + self.position - 1
        at_junction = self.doors + self.corridor - 1 + self.order
        beyond_entrance = np.where(self.position == self.corridor, at_junction, in_corridor)
        return self.frames[np.where(self.position == 0, self.cue, beyond_entrance)]


class RecallEnv(OneCopy):
    """A single corridor, for ``gym.make``. Takes the arguments of RecallVecEnv except num_envs."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 8}
    vector: RecallVecEnv

    def __init__(
        self,
        corridor: int = 12,
        doors: int = 3,
        size: int = 32,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(RecallVecEnv(1, corridor, doors, size, max_steps, render_mode))
        self.chance = self.vector.chance
        self.optimum = self.vector.optimum


def draw_frames(corridor: int, orders: np.ndarray, size: int) -> np.ndarray:
    """All frames of the environment, uint8 (doors + corridor - 1 + doors!, size, size, 3).

    First the entrance for each cue, then the cells 1 to corridor - 1, then the junction for each order."""
    doors = orders.shape[1]
    margin = max(1, size // 10)
    top = size // 8
    bottom = size - size // 5
    frames = []
    for cue in range(doors):
        frame = _corridor(0, corridor, size)
        frame[top:bottom, margin : size - margin] = COLOURS[cue]
        frames.append(frame)
    frames += [_corridor(position, corridor, size) for position in range(1, corridor)]
    edges = np.linspace(margin, size - margin, doors + 1).round().astype(int)
    gap = max(1, size // 32)
    for order in orders:
        frame = _corridor(corridor, corridor, size)
        for left, right, colour in zip(edges[:-1], edges[1:], order, strict=True):
            frame[top:bottom, left + (left > margin) * gap : right] = COLOURS[colour]
        frames.append(frame)
    return np.stack(frames)


def _corridor(position: int, corridor: int, size: int) -> np.ndarray:
    """A dark corridor in perspective above a progress bar. Its rings and its end move closer with the position."""
    centre = (np.arange(size) + 0.5) / size * 2 - 1
    radius = np.maximum(np.abs(centre)[:, None], np.abs(centre)[None])
    rings = np.floor(2.0 * math.log(corridor + 1) - 2.0 * np.log(radius) + 0.5 * position) % 2
    end = radius < 0.1 + 0.5 * position / corridor
    grey = np.where(end, 90, 25 + 20 * rings)
    bar = np.clip(position / corridor * size - np.arange(size), 0, 1)  # a pixel that is partly filled is partly bright
    grey[-max(2, size // 10) :] = 10 + 220 * bar
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)
