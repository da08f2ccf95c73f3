"""``longdream/KeyDoor-v0``: fetch a key, then open a door, in a grid world that is seen whole, from above.

A small task that agents fail when V is blind to small things. It observes an image, a choice and a number, and acts by
two choices.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from longdream.envs.contract import UserError

MOVES = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
"""Rows and columns of each move: stay, up, down, left, right."""
FLOOR, WALL, DOOR, KEY, AGENT = (20, 20, 20), (90, 90, 90), (200, 60, 40), (240, 220, 40), (80, 160, 255)
KEY_REWARD, DOOR_REWARD = 0.5, 1.0


class KeyDoorEnv(gym.Env):
    """Agent, key and door lie in three different cells, drawn anew in each episode.

    Stepping on the key takes it, with reward 0.5. Stepping on the door with the key, and the action's second choice at
    1, opens it: reward 1, and the episode terminates. It is truncated after `max_steps` steps. The optimum is 1.5;
    uniform random actions have 0.35 (300 episodes).

    Observation: a Dict. "image", uint8 (side * cell, side * cell, 3). "key", Discrete(2): whether the agent has it.
    "left", float32 (1,): the share of the steps that is left. Action: MultiDiscrete([5, 2]): stay, up, down, left or
    right; and whether to open. Info is empty.

    Args:
        side: cells along a side, the wall around them included, at least 4.
        cell: pixels along a side of a cell, at least 2.
        max_steps: time limit in steps.
        render_mode: None or "rgb_array" (the image).

    Raises:
        UserError: an argument is out of its range.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 8}
    optimum = KEY_REWARD + DOOR_REWARD

    def __init__(self, side: int = 8, cell: int = 5, max_steps: int = 60, render_mode: str | None = None) -> None:
        if side < 4 or cell < 2 or max_steps < 1:
            raise UserError(
                f"KeyDoor has side={side}, cell={cell}, max_steps={max_steps}: it needs a side of at least 4 cells, of"
                f" at least 2 pixels, and a step"
            )
        self.side = side
        self.cell = cell
        self.max_steps = max_steps
        self.render_mode = render_mode
        pixels = side * cell
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (pixels, pixels, 3), np.uint8),
                "key": spaces.Discrete(2),
                "left": spaces.Box(0, 1, (1,), np.float32),
            }
        )
        self.action_space = spaces.MultiDiscrete([len(MOVES), 2])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        inner = self.side - 2
        cells = self.np_random.choice(inner**2, 3, replace=False)
        self.agent, self.key, self.door = np.stack(np.divmod(cells, inner), 1) + 1
        self.has_key = False
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        move, opens = action
        self.steps += 1
        self.agent = np.clip(self.agent + MOVES[move], 1, self.side - 2)
        reward, opened = 0.0, False
        if not self.has_key and (self.agent == self.key).all():
            self.has_key = True
            reward = KEY_REWARD
        elif self.has_key and opens and (self.agent == self.door).all():
            opened = True
            reward = DOOR_REWARD
        return self._observe(), reward, opened, self.steps >= self.max_steps and not opened, {}

    def render(self) -> np.ndarray | None:
        return self._image() if self.render_mode == "rgb_array" else None

    def _observe(self) -> dict[str, Any]:
        left = np.array([1 - self.steps / self.max_steps], np.float32)
        return {"image": self._image(), "key": int(self.has_key), "left": left}

    def _image(self) -> np.ndarray:
        grid = np.full((self.side, self.side, 3), WALL, np.uint8)
        grid[1:-1, 1:-1] = FLOOR
        grid[tuple(self.door)] = DOOR
        if not self.has_key:
            grid[tuple(self.key)] = KEY
        grid[tuple(self.agent)] = AGENT
        return grid.repeat(self.cell, 0).repeat(self.cell, 1)
