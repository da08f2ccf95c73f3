"""``longdream/Recall-v0``: remember a colour through a corridor, then open the door that wears it.

A small pixel world that no policy without memory can solve, natively vectorised and a few microseconds a step.
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
UPSCALE = 8  # of rendered frames


def chance_and_optimum(doors: int = 3) -> tuple[float, float]:
    """The best mean return without memory, and with it. See RecallVecEnv for why the first is exact."""
    return 1.0 / doors, 1.0


class RecallVecEnv(gym.vector.VectorEnv):
    """num_envs corridors side by side, with NEXT_STEP autoreset.

    You start at the entrance, position 0, before a big sign in the cue's colour. Action 0 walks one cell forward, up
    to the junction at position ``corridor``. There the doors stand in random order, drawn per episode, and action k
    opens the k-th from the left: reward 1 if it wears the cue's colour, else 0; either terminates. Doors can be
    opened nowhere else and there is nowhere to walk at the junction: such an action lets one step pass. After
    ``max_steps`` steps, 4 * (corridor + 2) unless given, the episode is truncated. No frame but the entrance's
    depends on the cue, no frame but the junction's on the order, and none on the time.

    Chance is exactly 1 / doors. The cue is uniform and independent of the order, so given the junction's frame each
    door is the right one with probability 1 / doors, whatever that frame is: a policy of the present frame alone
    gets at most that, and gets it by walking on and opening any door. Opening the remembered one gets 1, always.
    (Some steps of memory do not help a policy that walks on. One that dawdles could hide the cue in its own rhythm.)

    Observation: uint8 (size, size, 3). Action: Discrete(1 + doors). Info is empty.

    Args:
        num_envs: copies.
        corridor: steps from the entrance to the junction, at least 1.
        doors: 2 to 6.
        size: height and width of a frame in pixels, at least 16.
        max_steps: time limit in steps.
        render_mode: None or "rgb_array" (frames enlarged 8 times).

    Raises:
        UserError: an argument out of its range.
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
        self.num_envs, self.corridor, self.doors, self.size = num_envs, corridor, doors, size
        self.max_steps, self.render_mode = max_steps, render_mode
        self.chance, self.optimum = chance_and_optimum(doors)
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
        """A new episode in every copy. An int seeds copy i with seed + i; None lets the generators run on."""
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
        fresh = self.ended
        junction = (self.position == self.corridor) & ~fresh
        terminated = junction & (actions > 0)
        chosen = self.orders[self.order, np.maximum(actions, 1) - 1]
        reward = (terminated & (chosen == self.cue)).astype(np.float64)
        self.position += (actions == 0) & (self.position < self.corridor)
        self.steps += 1
        truncated = (self.steps >= self.max_steps) & ~terminated & ~fresh
        self.ended = terminated | truncated
        if fresh.any():
            self._begin(fresh)
        return self._frames(), reward, terminated, truncated, {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """An enlarged frame per copy, (8 * size, 8 * size, 3) uint8."""
        if self.render_mode != "rgb_array":
            return None
        return tuple(self._frames().repeat(UPSCALE, 1).repeat(UPSCALE, 2))

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on: arrays (num_envs,) and the generators' states as plain numbers."""
        arrays = {key: getattr(self, key).copy() for key in ("position", "cue", "order", "steps", "ended")}
        return {**arrays, "generators": [g.bit_generator.state for g in self.generators]}

    def set_state(self, state: dict[str, Any]) -> None:
        for key in ("position", "cue", "order", "steps", "ended"):
            setattr(self, key, np.array(state[key], dtype=getattr(self, key).dtype))
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.bit_generator.state = value

    def _begin(self, which: np.ndarray) -> None:
        for i in np.flatnonzero(which):
            # one draw for both: cue and order are independent and uniform
            self.cue[i], self.order[i] = divmod(
                int(self.generators[i].integers(self.doors * len(self.orders))), len(self.orders)
            )
        self.position[which] = self.steps[which] = 0
        self.ended[which] = False

    def _frames(self) -> np.ndarray:
        way = self.doors + self.position - 1
        door = self.doors + self.corridor - 1 + self.order
        index = np.where(self.position == 0, self.cue, np.where(self.position == self.corridor, door, way))
        return self.frames[index]


class RecallEnv(OneCopy):
    """One corridor, for ``gym.make``. Arguments as RecallVecEnv."""

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
        self.chance, self.optimum = self.vector.chance, self.vector.optimum


def draw_frames(corridor: int, orders: np.ndarray, size: int) -> np.ndarray:
    """All pictures of the world, uint8 (doors + corridor - 1 + doors!, size, size, 3): the entrance by cue, the
    cells 1 to corridor - 1, the junction by order."""
    doors = orders.shape[1]
    margin, top, bottom = max(1, size // 10), size // 8, size - size // 5
    pictures = []
    for cue in range(doors):
        picture = _corridor(0, corridor, size)
        picture[top:bottom, margin : size - margin] = COLOURS[cue]
        pictures.append(picture)
    pictures += [_corridor(position, corridor, size) for position in range(1, corridor)]
    edges = np.linspace(margin, size - margin, doors + 1).round().astype(int)
    gap = max(1, size // 32)
    for order in orders:
        picture = _corridor(corridor, corridor, size)
        for left, right, colour in zip(edges[:-1], edges[1:], order, strict=True):
            picture[top:bottom, left + (left > margin) * gap : right] = COLOURS[colour]
        pictures.append(picture)
    return np.stack(pictures)


def _corridor(position: int, corridor: int, size: int) -> np.ndarray:
    """A dark corridor in perspective, whose rings pass by and whose end grows, above a bar that fills as one walks."""
    centre = (np.arange(size) + 0.5) / size * 2 - 1
    radius = np.maximum(np.abs(centre)[:, None], np.abs(centre)[None])
    rings = np.floor(2.0 * math.log(corridor + 1) - 2.0 * np.log(radius) + 0.5 * position) % 2
    end = radius < 0.1 + 0.5 * position / corridor
    grey = np.where(end, 90, 25 + 20 * rings)
    bar = np.clip(position / corridor * size - np.arange(size), 0, 1)  # a cell partly filled is partly bright
    grey[-max(2, size // 10) :] = 10 + 220 * bar
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)
