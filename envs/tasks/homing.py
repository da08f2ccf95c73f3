"""``longdream/Homing-v0``: led away from home with no landmark in sight, find back. A test of path integration."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from longdream.envs.contract import UserError

STAY, FORWARD, LEFT, RIGHT = range(4)
HEADINGS = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""Rows and columns of a step forward: up, right, down, left. A turn to the right is the next heading."""
LED = (0.5, 0.25, 0.25)
"""Probabilities of forward, left and right while the agent is led."""
FLOOR, WALL, HOME, AGENT, NOSE = (20, 20, 20), (90, 90, 90), (60, 200, 90), (80, 160, 255), (240, 240, 240)
PIXELS = 24
"""Of a cell's side in the rendered picture."""


class HomingEnv(gym.Env):
    """The agent starts at home, a random cell of an empty square room, and faces a random way.

    For `away` steps it is led: random moves take the place of its actions. Then it has `back` steps, after which the
    episode terminates. After each of these the reward is 0.5 to the power of its distance from home, in cells along the
    walls: 1 at home, 0.5 beside it. Home looks like any other cell, so the agent has to add up its moves, and remember
    the sum. As it is made by default, going home on a shortest path has 10.1 in an episode, staying where it was left
    3.6, uniform random actions 3.3 (2,000 episodes each).

    Observation: a Dict of what it sees and feels from inside. "ahead", Discrete(side): free cells in front of it.
    "moved", Discrete(4): what it just did, nothing, forward, left or right; a wall stops a step. "led", Discrete(2):
    whether it is still led. "left", float32 (1,): the share of the steps that is left. Action: Discrete(4): stay,
    forward, turn left, turn right. Info is empty.

    Args:
        side: cells along a side of the room, at least 2.
        away, back: steps for which the agent is led, and has to return.
        render_mode: None or "rgb_array" (the room from above).

    Raises:
        UserError: an argument is out of its range.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_names = ("stay", "forward", "left", "right")

    def __init__(self, side: int = 5, away: int = 10, back: int = 12, render_mode: str | None = None) -> None:
        if side < 2 or away < 0 or back < 1:
            raise UserError(
                f"Homing has side={side}, away={away}, back={back}: it needs a side of at least 2, an away of at least"
                f" 0 and a back of at least 1"
            )
        self.side = side
        self.away = away
        self.back = back
        self.render_mode = render_mode
        self.observation_space = spaces.Dict(
            {
                "ahead": spaces.Discrete(side),
                "moved": spaces.Discrete(4),
                "led": spaces.Discrete(2),
                "left": spaces.Box(0, 1, (1,), np.float32),
            }
        )
        self.action_space = spaces.Discrete(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.home = self.np_random.integers(self.side, size=2)
        self.agent = self.home.copy()
        self.heading = int(self.np_random.integers(4))
        self.steps = 0
        return self._observe(STAY), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        done = int(action)
        if self.steps < self.away:
            done = int(self.np_random.choice((FORWARD, LEFT, RIGHT), p=LED))
        self.steps += 1
        if done == FORWARD:
            if self._ahead():
                self.agent = self.agent + HEADINGS[self.heading]
            else:
                done = STAY
        elif done != STAY:
            self.heading = (self.heading + (1 if done == RIGHT else -1)) % 4
        over = self.steps == self.away + self.back
        led = self.steps <= self.away
        reward = 0.0 if led else 0.5 ** int(np.abs(self.agent - self.home).sum())
        return self._observe(done), reward, over, False, {}

    def render(self) -> np.ndarray | None:
        if self.render_mode != "rgb_array":
            return None
        image = np.full((self.side + 2, self.side + 2, 3), WALL, np.uint8)
        image[1:-1, 1:-1] = FLOOR
        image[tuple(self.home + 1)] = HOME
        image[tuple(self.agent + 1)] = AGENT
        image = image.repeat(PIXELS, 0).repeat(PIXELS, 1)
        row, column = ((self.agent + 1.5) * PIXELS + HEADINGS[self.heading] * PIXELS // 3).astype(int)
        image[row - 3 : row + 3, column - 3 : column + 3] = NOSE
        return image

    def _ahead(self) -> int:
        """Free cells in front of the agent."""
        axis = self.heading % 2
        forward = HEADINGS[self.heading][axis] > 0
        return int(self.side - 1 - self.agent[axis] if forward else self.agent[axis])

    def _observe(self, moved: int) -> dict[str, Any]:
        left = np.array([1 - self.steps / (self.away + self.back)], np.float32)
        return {"ahead": self._ahead(), "moved": moved, "led": int(self.steps < self.away), "left": left}
