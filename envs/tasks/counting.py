"""``longdream/Counting-v0``: counts its own steps, so that tests can compute the exact content of every row."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from longdream.envs.contract import OneCopy

ACTIONS = 5
PHASES = 7
STATE = ("index", "episode", "time", "last_action", "ended")


def episode_length(index: Any, episode: Any) -> Any:
    """Number of steps in this episode of this copy, 3 to 13. There is one row more, for time 0. Scalars or arrays."""
    return 3 + (5 * index + 4 * episode) % 11


def is_terminal(index: Any, episode: Any) -> Any:
    """True if the episode terminates, False if it is truncated. Scalars or arrays."""
    return (index + episode) % 2 == 0


def expected_reward(time: Any, action: Any) -> Any:
    """Reward in the row at time >= 1, caused by ``action`` in the previous row. The reward at time 0 is 0."""
    return time + 0.001 * action


class CountingVecEnv(gym.vector.VectorEnv):
    """num_envs counters with NEXT_STEP autoreset. Nothing is random; episodes differ in length and in how they end.

    Observation: a Dict. "time", float32 (4,): steps since the episode began, index of the episode, index of the copy,
    and the action taken in the previous row (-1 at time 0). "phase", Discrete(7): the first of these modulo 7.
    Action: Discrete(5). ``reset`` with a seed starts again at episode 0; without a seed it begins the next episode.

    Args:
        num_envs: number of copies.
        first_index: index of the first copy; the others follow.
        render_mode: ignored, because nothing is drawn; part of Gymnasium's interface.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int = 1, first_index: int = 0, render_mode: str | None = None) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = spaces.Dict(
            {"time": spaces.Box(-1, np.inf, (4,), np.float32), "phase": spaces.Discrete(PHASES)}
        )
        self.single_action_space = spaces.Discrete(ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.index = first_index + np.arange(num_envs)
        self.episode, self.time, self.last_action = np.full((3, num_envs), -1, np.int64)
        self.ended = np.zeros(num_envs, np.bool_)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        seeds = seed if isinstance(seed, list) else [seed] * self.num_envs
        self.episode[[s is not None for s in seeds]] = -1
        self._begin(np.ones(self.num_envs, np.bool_))
        return self._obs(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        starting = self.ended.copy()
        self.time += 1
        self.last_action[:] = actions
        reward = np.where(starting, 0.0, expected_reward(self.time, self.last_action))
        self.ended = ~starting & (self.time >= episode_length(self.index, self.episode))
        terminal = is_terminal(self.index, self.episode)
        terminated = self.ended & terminal
        truncated = self.ended & ~terminal
        self._begin(starting)
        return self._obs(), reward, terminated, truncated, {}

    def get_state(self) -> dict[str, np.ndarray]:
        """The complete state of the environment: arrays (num_envs,)."""
        return {key: getattr(self, key).copy() for key in STATE}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        for key in STATE:
            setattr(self, key, np.array(state[key], dtype=getattr(self, key).dtype))

    def _begin(self, which: np.ndarray) -> None:
        self.episode += which
        self.time[which] = 0
        self.last_action[which] = -1
        self.ended &= ~which

    def _obs(self) -> dict[str, np.ndarray]:
        time = np.stack([self.time, self.episode, self.index, self.last_action], axis=1).astype(np.float32)
        return {"phase": self.time % PHASES, "time": time}


class CountingEnv(OneCopy):
    """A single counter, for ``gym.make``. ``index`` is the index of the copy."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, index: int = 0, render_mode: str | None = None) -> None:
        super().__init__(CountingVecEnv(1, index, render_mode))
