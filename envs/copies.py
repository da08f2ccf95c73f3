"""One copy of an environment: seeds, exact continuation, its time limit, and checks of everything that it returns."""

from __future__ import annotations

import traceback
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec as Registration

from longdream.envs.contract import EnvError, UserError, env_spec
from longdream.envs.meaning import Meaning, meaning_of
from longdream.envs.process import stops_the_program
from longdream.envs.remote import FAULTS
from longdream.envs.spaces.flat import make_flat, reading_of
from longdream.envs.spaces.values import Misfit, as_array, conform, described

LIMIT = "max_episode_steps"
"""Argument of every environment: the steps after which an episode is truncated."""


class Copy(gym.Wrapper):
    """One copy of an environment.

    It seeds every episode from (root seed, index, episode). It records the episode's actions so that the episode can be
    replayed. If the environment raises, or returns what its spaces do not announce, the EnvError names this copy.

    ``reset`` with a seed takes the seed as the root and starts at episode 0. After the end of an episode, ``step``
    ignores the action and begins the next episode, as NEXT_STEP autoreset does.

    Args:
        limit: steps after which an episode is truncated; 0 for none but the environment's own.
    """

    def __init__(self, env: gym.Env, env_id: str, index: int, limit: int = 0) -> None:
        super().__init__(env)
        self.env_id = env_id
        self.index = index
        self.limit = limit
        self.root = 0
        self.episode = -1
        self.actions = []
        self.ended = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.root = seed
            self.episode = -1
        return self._begin(self.episode + 1)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.ended:
            obs, info = self._begin(self.episode + 1)
            return obs, 0.0, False, False, info
        obs, reward, terminated, truncated, info = self._step(action)
        if self.limit and len(self.actions) >= self.limit and not terminated:
            truncated = True
        self.ended = terminated or truncated
        return obs, reward, terminated, truncated, info

    def render(self) -> Any:
        return self._run("render")

    def meaning(self) -> Meaning:
        """What the environment says of its actions."""
        return meaning_of(self.env)

    def reading(self) -> str:
        """How its observations and actions are read, in one line."""
        return reading_of(self.env).line()

    def get_probes(self) -> dict[str, np.ndarray]:
        """What the observation hides, where the environment has a `get_probes()` (Memory Maze); else nothing."""
        return getattr(self.env.unwrapped, "get_probes", dict)()

    def close(self) -> None:
        try:
            super().close()
        except BaseException as error:  # only a warning: an error in close must not hide an earlier one
            if stops_the_program(error):
                raise
            warnings.warn(
                f"environment worker {self.index} of {self.env_id} raised in close: {one_line(error)}", stacklevel=2
            )

    def get_state(self) -> dict[str, Any]:
        state = {"root": self.root, "episode": self.episode, "actions": np.array(self.actions)}
        return {**state, "ended": self.ended}

    def set_state(self, states: dict[int, dict[str, Any]]) -> None:
        """Replay this copy's episode up to the step at which its state, that of its number, was saved."""
        state = states[self.index]
        self.root = state["root"]
        self._begin(state["episode"])
        for action in state["actions"]:
            _, _, terminated, truncated, info = self._step(action)
            self.ended = terminated or truncated
            if FAULTS in info:
                raise self._error("failed while its episode was run again")
        # the limit may be another than it was: if the episode is longer already, it ends with the next step
        self.ended = state.get("ended", self.ended)

    def _step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions.append(np.copy(action))
        result = self._run("step", action)
        if not isinstance(result, tuple | list) or len(result) != 5:
            raise self._error(
                f"returned {described(result)} from step: return observation, reward, terminated, truncated, info"
            )
        obs, reward, terminated, truncated, info = result
        obs = self._observation(obs, "step")
        reward = self._reward(reward)
        terminated = self._flag("terminated", terminated)
        truncated = self._flag("truncated", truncated)
        return obs, reward, terminated, truncated, self._info(info)

    def _begin(self, episode: int, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, with this seed or else with its own."""
        self.episode = episode
        self.actions = []
        self.ended = False
        result = self._run("reset", seed=derive_seed(self.root, self.index, episode) if seed is None else seed)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise self._error(f"returned {described(result)} from reset: return observation, info")
        obs, info = result
        return self._observation(obs, "reset"), self._info(info)

    def _info(self, info: Any) -> dict[str, Any]:
        """What is kept of an info: the number of faults alone, since rows contain no infos."""
        return {FAULTS: info[FAULTS]} if isinstance(info, dict) and FAULTS in info else {}

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.env, name)(*args, **kwargs)
        except Misfit as misfit:
            raise self._error(f"returned {misfit} (in {name})") from None
        except BaseException as error:  # SystemExit too: an environment does not end the program
            if stops_the_program(error):
                raise
            raise self._error(f"raised in {name}: {one_line(error)}", traceback.format_exc()) from None

    def _observation(self, obs: Any, where: str) -> Any:
        """The observation in the type of its space. Raises EnvError where that would change it."""
        try:
            return conform(obs, self.observation_space)
        except Misfit as misfit:
            raise self._error(f"returned {misfit} (in {where})") from None

    def _reward(self, reward: Any) -> float:
        value = as_array(reward)
        if value.shape != () or value.dtype.kind not in "fiub":
            raise self._error(f"returned the reward {described(reward)}: return one number, float(reward)")
        return float(value)

    def _flag(self, name: str, flag: Any) -> bool:
        value = as_array(flag)
        if value.shape != () or value.dtype.kind not in "iub":
            raise self._error(f"returned {name} = {described(flag)}: return a bool, bool({name})")
        return bool(value)

    def _error(self, what: str, trace: str = "") -> EnvError:
        return EnvError(f"environment worker {self.index} of {self.env_id} {what}", self.index, trace)


def make_copy(
    env_id: str, registration: Registration, kwargs: dict[str, Any], limit: int, index: int, kind: type[Copy] = Copy
) -> Copy:
    """Make one copy, an instance of `kind`.

    Raises:
        UserError: the environment cannot be made with these arguments, or has a space that is not supported.
    """
    try:
        env = make_flat(registration, kwargs)
    except UserError:
        raise
    except BaseException as error:
        if stops_the_program(error):
            raise
        raise cannot_make(env_id, kwargs, error) from error
    env_spec(env.observation_space, env.action_space)  # raises UserError early if a space is not supported
    return kind(env, env_id, index, limit)


def split_limit(kwargs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The arguments without `max_episode_steps`, and its value; 0 where there is none.

    Raises:
        UserError: the value is not a positive integer.
    """
    rest = {key: value for key, value in kwargs.items() if key != LIMIT}
    limit = kwargs.get(LIMIT)
    if limit is None:
        return rest, 0
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UserError(f"env.kwargs.{LIMIT} = {limit!r}: must be a number of steps, at least 1")
    return rest, limit


def for_gym_make(registration: Registration, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `gym.make`, whose `max_episode_steps` replaces the registration's limit: here both hold."""
    rest, limit = split_limit(kwargs)
    return {**rest, LIMIT: min(limit, registration.max_episode_steps or limit)} if limit else rest


def cannot_make(env_id: str, kwargs: dict[str, Any], error: BaseException) -> UserError:
    arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
    return UserError(f"{env_id} cannot be made with {arguments}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """The name and the text of an exception, which may be long, have several lines or be none."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its __str__ raises
        text = ""
    text = text if len(text) <= 1000 else f"{text[:1000]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def name_workers(indices: list[int]) -> str:
    return f"worker {indices[0]}" if len(indices) == 1 else f"workers {', '.join(map(str, indices))}"


def derive_seed(root: int, index: int, episode: int) -> int:
    """A seed below 2**31 for one episode of one copy."""
    return int(np.random.SeedSequence((root, index, episode)).generate_state(1)[0] >> 1)
