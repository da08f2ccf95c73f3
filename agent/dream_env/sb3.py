"""Dreams for Stable-Baselines3, whose algorithms take a VecEnv of their own and no vector environment of Gymnasium."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from longdream.agent.config.flags import suggest
from longdream.agent.core.agent import Agent
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.envs.contract import UserError


def sb3_env(run: str | os.PathLike[str] | Agent, num_envs: int = 64, **arguments: Any) -> VecEnv:
    """Dreams of a run as a VecEnv of Stable-Baselines3: `PPO("MlpPolicy", longdream.sb3_env("runs/NAME"))`.

    Returns and lengths of dreams are in SB3's own log.

    Args:
        run: the folder of a run, or a `TrainedAgent`; or an Agent, with Moments to start from. num_envs: of dreams.
        arguments: others of `DreamVecEnv`, such as horizon, start and temperature.

    Raises:
        UserError: an argument is unknown or out of its range, there is no such run, or its checkpoint cannot be used.

    >>> import longdream as ld
    >>> from stable_baselines3 import PPO
    >>> learner = PPO("MlpPolicy", ld.sb3_env("runs/demo", 4, horizon=5), n_steps=8, batch_size=16, device="cpu")
    >>> learner.learn(64).num_timesteps
    64
    """
    if "autoreset_mode" in arguments:
        raise UserError("autoreset_mode: Stable-Baselines3 has one of its own; leave it out")
    known = list(inspect.signature(DreamVecEnv).parameters)[2:]  # without num_envs and checkpoint
    for name in arguments:
        if name not in known:
            raise UserError(f"unknown argument {name!r} of dreams" + suggest(name, known))
    source = run if isinstance(run, Agent) else Path(run)
    return VecMonitor(DreamsForSb3(DreamVecEnv(num_envs, source, autoreset_mode=AutoresetMode.SAME_STEP, **arguments)))


class DreamsForSb3(VecEnv):
    """Dreams with SAME_STEP autoreset as a VecEnv. Discrete actions and observations count from 0, as SB3 expects.

    The last observation of a dream that has ended is `terminal_observation` in its info, and `TimeLimit.truncated` says
    whether it ended at the horizon.
    """

    def __init__(self, dreams: DreamVecEnv):
        self.dreams = dreams
        observation = space_from_0(dreams.single_observation_space)
        super().__init__(dreams.num_envs, observation, space_from_0(dreams.single_action_space))

    def reset(self) -> Any:
        obs, _ = self.dreams.reset(seed=self._seeds[0], options=self._options[0])
        self._reset_seeds()
        self._reset_options()
        return self._seen(obs)

    def step_async(self, actions: np.ndarray) -> None:
        native = self.dreams.single_action_space
        start = getattr(native, "start", 0)
        shape = (self.num_envs, *(native.shape or ()))
        self.actions = np.asarray(actions).reshape(shape) + start

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, reward, terminated, truncated, given = self.dreams.step(self.actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        over = terminated | truncated
        for i in np.flatnonzero(over):
            last = self._seen(given["final_obs"][i])
            infos[i] = {"terminal_observation": last, "TimeLimit.truncated": bool(truncated[i])}
        return self._seen(obs), reward.astype(np.float32), over, infos

    def _seen(self, obs: Any) -> Any:
        """An observation or a batch of them, with discrete values from 0."""
        space = self.dreams.single_observation_space
        if isinstance(space, spaces.Dict):
            return {key: from_0(value, space[key]) for key, value in obs.items()}
        return from_0(obs, space)

    def get_images(self) -> list[np.ndarray | None]:
        return list(self.dreams.render() or [None] * self.num_envs)

    def close(self) -> None:
        self.dreams.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.dreams, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"{attr_name}: dreams have no attributes of single copies to set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise AttributeError(f"{method_name}: dreams have no methods of single copies to call")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


def space_from_0(space: spaces.Space) -> spaces.Space:
    """The same space, or Dict, with discrete values from 0, and several of them in one row, as SB3 needs them."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: space_from_0(each) for key, each in space.items()})
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec.ravel())
    return space


def from_0(value: Any, space: spaces.Space) -> Any:
    """A value of `space`, or a batch of them, as of `space_from_0`."""
    if isinstance(space, spaces.Discrete):
        return value - space.start
    if isinstance(space, spaces.MultiDiscrete):
        batch = np.shape(value)[: np.ndim(value) - len(space.shape)]
        return (value - space.start).reshape(*batch, -1)
    return value
