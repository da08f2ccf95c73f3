"""An environment whose observations and actions are flat, whatever its own spaces are."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec as Registration

from longdream.envs.contract import UserError
from longdream.envs.spaces import actions, observations
from longdream.envs.spaces.leaves import WAYS

OPTIONS = ("read_as", "act_as")
"""Arguments of every environment: how single observations and actions are read."""
MOST_NAMED = 24
"""Entries that the line about them names."""


class Reading:
    """How the two spaces of an environment are read.

    Attributes:
        observation_space, action_space: the flat ones. plain: whether they are the environment's own.

    Args:
        options: `read_as` and `act_as`, by name of an entry.

    Raises:
        UserError: a space cannot be read, or an option does not fit.
    """

    def __init__(self, observation: spaces.Space, action: spaces.Space, options: dict[str, dict[str, Any]]) -> None:
        read_as = dict(options.get("read_as", {}))
        act_as = dict(options.get("act_as", {}))
        self.observations = observations.read(observation, "", read_as)
        self.actions = actions.read(action, "", act_as)
        for option, left in (("read_as", read_as), ("act_as", act_as)):
            if left:
                known = ", ".join(self.observations.leaves) if option == "read_as" else self.actions.words
                raise UserError(f"env.kwargs.{option}.{next(iter(left))}: there is no such entry; there are {known}")
        self.single = isinstance(self.observations, observations.One)
        self.same_observation = self.observations.plain
        self.same_action = _is_flat(action)
        self.plain = self.same_observation and self.same_action
        by_key = {name: leaf.flat for name, leaf in self.observations.leaves.items()}
        flat = by_key["obs"] if self.single else spaces.Dict(by_key)
        self.observation_space = observation if self.same_observation else flat
        self.action_space = action if self.same_action else actions.flat_space(self.actions.parts)

    def observation(self, value: Any) -> Any:
        """An observation of the environment as a flat one. Raises Misfit for one that its space does not announce."""
        into: dict[str, Any] = {}
        self.observations.put(value, into)
        return into["obs"] if self.single else into

    def action(self, value: Any) -> Any:
        """A flat action as one of the environment."""
        return self.actions.build(actions.values_of(self.actions.parts, value))

    def line(self) -> str:
        """How each entry is read, and the flags that read it otherwise."""
        leaves = self.observations.leaves
        named = [f"{name} as {leaf.words}" for name, leaf in list(leaves.items())[:MOST_NAMED]]
        more = [f"{len(leaves) - MOST_NAMED} more"] if len(leaves) > MOST_NAMED else []
        mixed = ""
        if actions.is_mixed(self.actions.parts):
            mixed = f"; numbers beside choices as {actions.VALUES} values each"
        flags = f"otherwise: --env.kwargs.read_as.KEY {'|'.join(WAYS)}"
        return f"reads {', '.join(named + more)} ({flags}); acts by {self.actions.words}{mixed}"


class Flat(gym.Wrapper):
    """An environment with the flat spaces of a `Reading`. What is no observation at all is passed on as it is."""

    def __init__(self, env: gym.Env, reading: Reading) -> None:
        super().__init__(env)
        self.reading = reading
        self.observation_space = reading.observation_space
        self.action_space = reading.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._read(self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> Any:
        return self._read(self.env.step(action if self.reading.same_action else self.reading.action(action)))

    def _read(self, result: Any) -> Any:
        if self.reading.same_observation or not isinstance(result, tuple | list) or not result:
            return result
        return (self.reading.observation(result[0]), *result[1:])


def make_flat(registration: Registration, kwargs: dict[str, Any], **options: Any) -> gym.Env:
    """`gym.make`, with flat spaces: the environment itself where its own are flat.

    Args:
        kwargs: its arguments, and beside them `read_as` and `act_as`. options: others of `gym.make`.

    Raises:
        UserError: its spaces cannot be read. Any other exception: of the environment.
    """
    rest, how = split_options(kwargs)
    env = gym.make(registration, **options, **rest)
    reading = Reading(env.observation_space, env.action_space, how)
    return env if reading.plain else Flat(env, reading)


def reading_of(env: gym.Env) -> Reading:
    """How the spaces of an environment that `make_flat` made are read."""
    return env.reading if isinstance(env, Flat) else Reading(env.observation_space, env.action_space, {})


def split_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The arguments of the environment itself, and those of OPTIONS, by entry.

    `{"read_as": {"board": "vector"}}` and `{"read_as.board": "vector"}` say the same.

    Raises:
        UserError: an option does not name an entry.
    """
    rest: dict[str, Any] = {}
    how: dict[str, dict[str, Any]] = {}
    for key, value in kwargs.items():
        option, dot, name = key.partition(".")
        if option not in OPTIONS:
            rest[key] = value
        elif dot and name:
            how.setdefault(option, {})[name] = value
        elif isinstance(value, dict) and not dot:
            how.setdefault(option, {}).update(value)
        else:
            raise UserError(f"env.kwargs.{key} = {value!r}: name the entry, as --env.kwargs.{option}.NAME VALUE")
    return rest, how


def _is_flat(space: spaces.Space) -> bool:
    """Whether an action space is one that contract.py encodes."""
    if isinstance(space, spaces.Box):
        bounds = np.abs([space.low.astype(np.float64), space.high.astype(np.float64)])
        return space.dtype.kind != "b" and bool((bounds < np.finfo(np.float32).max).all())
    return isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
