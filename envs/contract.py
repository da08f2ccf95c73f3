"""The interface between environments and agents: time steps (rows), observations and actions.

Row t is ``(obs, is_first, reward, terminated, truncated | action)``. Reward and flags arrive *with* obs_t and were
caused by action_{t-1}; action_t is chosen *from* obs_t. This is Gymnasium's ``NEXT_STEP`` autoreset: the final
observation of an episode has its own row, whose action is ignored, and the next row holds the reset observation.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

MOST_CHOICES = 1 << 20
"""Choices of a discrete observation or action, which are encoded as one-hot vectors."""
FIX = "register a single environment (entry_point), whose spaces are made flat"


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong, and how to fix it."""


class EnvError(RuntimeError):
    """An environment failed while it was running: it raised an exception, did not answer, or its process died.

    Args:
        message: one line that names the worker and the call that failed.
        worker: index of the copy that failed; None if it is unknown.
        trace: text of the original traceback, printed below the message.
    """

    def __init__(self, message: str, worker: int | None = None, trace: str = "") -> None:
        super().__init__(f"{message}\n{trace}".rstrip())
        self.message = message
        self.worker = worker
        self.trace = trace

    def __reduce__(self) -> tuple[type[EnvError], tuple[str, int | None, str]]:
        return EnvError, (self.message, self.worker, self.trace)


@dataclass
class Row:
    """One time step of n copies of an environment.

    Attributes:
        obs: each observation, (n, ...), in the type and shape of its ObsSpec.
        is_first: (n,) bool, true for the first row of an episode.
        reward: (n,) float32.
        terminated: (n,) bool.
        truncated: (n,) bool.
    """

    obs: dict[str, np.ndarray]
    is_first: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class ObsSpec:
    """How one observation is stored.

    Attributes:
        kind: "image": uint8, shape (H, W, C); "vector": float32, shape (n,); "discrete": int64 in 0..n-1, shape ();
            "categories": integers in 0..n-1, any shape, such as the cells of a grid.
        shape: of a single observation.
        n: number of values of a discrete observation, or of each category.
        start: smallest native value of these; `pack` subtracts it.
    """

    kind: Literal["image", "vector", "discrete", "categories"]
    shape: tuple[int, ...]
    n: int = 0
    start: int = 0

    @property
    def dtype(self) -> np.dtype:
        if self.kind == "categories":
            return np.dtype(np.int16 if self.n <= 1 << 15 else np.int32)
        return np.dtype({"image": np.uint8, "vector": np.float32, "discrete": np.int64}[self.kind])

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether `pack` takes a single value of this shape: of the same size and, for an image, the same axes."""
        if self.kind == "image":
            return shape == self.shape or (*shape, 1) == self.shape
        return math.prod(shape) == math.prod(self.shape)

    def pack(self, batch: Any) -> np.ndarray:
        """Convert a batch (n, *native shape) of the environment to (n, *shape) in the stored type."""
        values = np.asarray(batch)
        if self.start:
            values = values - np.int64(self.start)  # (a narrow type may not hold the difference)
        return np.ascontiguousarray(values.reshape(len(values), *self.shape), dtype=self.dtype)


@dataclass(frozen=True)
class ActionSpec:
    """How an action is encoded as a float32 vector of length A = ``size``. Agents only use the encoded form.

    Attributes:
        parts: numbers of values of the categorical factors, which are encoded as concatenated one-hot vectors:
            Discrete(n) gives (n,), MultiDiscrete gives nvec. Empty for a Box.
        low, high: bounds of a Box, which is flattened and scaled from [low, high] to [-1, 1].
        native: what `decode` needs: kind ("discrete", "multi_discrete", "box"), start, shape, dtype.
    """

    parts: tuple[int, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    native: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Length A of the encoded vector."""
        return sum(self.parts) if self.parts else len(self.low)

    def encode(self, native: Any) -> np.ndarray:
        """Encode a batch of native actions, (n, *native shape), as (n, A) float32."""
        values = np.asarray(native)
        if not self.parts:
            low = np.array(self.low)
            high = np.array(self.high)
            value_range = np.where(high > low, high - low, 1.0)
            scaled = 2.0 * (values.reshape(len(values), -1).astype(np.float64) - low) / value_range - 1.0
            return np.where(high > low, scaled, 0.0).astype(np.float32)
        choice = values.reshape(len(values), -1).astype(np.int64) - np.array(self.native["start"]).reshape(-1)
        return self._one_hot(choice)

    def _one_hot(self, choice: np.ndarray) -> np.ndarray:
        """The index of each categorical factor, (n, factors), as (n, A) float32."""
        encoded = np.zeros((len(choice), self.size), np.float32)
        offset = np.cumsum((0, *self.parts[:-1]))
        np.put_along_axis(encoded, choice + offset, 1.0, axis=1)
        return encoded

    def decode(self, encoded: np.ndarray) -> np.ndarray:
        """Decode (n, A) to a batch of native actions for ``VectorEnv.step``.

        A categorical factor takes the index of its largest entry. Box values are clipped to their bounds."""
        encoded = np.asarray(encoded)
        dtype = np.dtype(self.native["dtype"])
        shape = (len(encoded), *self.native["shape"])
        if not self.parts:
            low = np.array(self.low)
            high = np.array(self.high)
            values = low + (encoded.astype(np.float64) + 1.0) * 0.5 * (high - low)
            if dtype.kind in "iu":
                values = np.rint(values)
            return np.clip(values, low, high).reshape(shape).astype(dtype)
        choice = np.stack([part.argmax(1) for part in np.split(encoded, np.cumsum(self.parts[:-1]), axis=1)], axis=1)
        return (choice + np.array(self.native["start"]).reshape(-1)).reshape(shape).astype(dtype)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw n encoded actions uniformly at random: (n, A) float32."""
        if not self.parts:
            return rng.uniform(-1.0, 1.0, (n, self.size)).astype(np.float32)
        choice = np.stack([rng.integers(k, size=n) for k in self.parts], axis=1)
        return self._one_hot(choice)


@dataclass(frozen=True)
class EnvSpec:
    """The observations and the action of an environment. An observation space that is no Dict has the key "obs"."""

    obs: dict[str, ObsSpec]
    action: ActionSpec

    def pack_obs(self, batch: Any) -> dict[str, np.ndarray]:
        """Convert a batched observation of a vector environment to {key: (n, *shape) in the stored type}."""
        batch = batch if isinstance(batch, dict) else {"obs": batch}
        return {key: spec.pack(batch[key]) for key, spec in self.obs.items()}

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON types; ``from_json`` restores an equal spec."""
        return {
            "obs": {key: _plain(asdict(spec)) for key, spec in self.obs.items()},
            "action": _plain(asdict(self.action)),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EnvSpec:
        obs = {key: ObsSpec(**{**spec, "shape": tuple(spec["shape"])}) for key, spec in data["obs"].items()}
        action = data["action"]
        parts, low, high = (tuple(action[key]) for key in ("parts", "low", "high"))
        return cls(obs, ActionSpec(parts, low, high, action["native"]))


def env_spec(observation_space: spaces.Space, action_space: spaces.Space) -> EnvSpec:
    """The spec of an environment with these spaces (of a single copy, not batched), which are flat: envs/spaces makes
    others so.

    Raises:
        UserError: a space is not supported; the message names its key and says how to fix it.
    """
    if isinstance(observation_space, spaces.Dict):
        if not observation_space.spaces:
            raise UserError("the observation Dict is empty: an environment must show at least one key")
        for key in observation_space.spaces:
            if not isinstance(key, str):
                raise UserError(
                    f"the observation Dict has the key {key!r}, a {type(key).__name__}: name its entries by strings,"
                    f" such as {str(key)!r}"
                )
            if not key.isprintable():  # half a pair of surrogates cannot be written into any file
                raise UserError(f"the observation Dict has the key {key!r}: name its entries by letters and digits")
        obs = {key: _obs_spec(key, space) for key, space in observation_space.spaces.items()}
    else:
        obs = {"obs": _obs_spec("obs", observation_space)}
    return EnvSpec(obs, _action_spec(action_space))


def _obs_spec(key: str, space: spaces.Space) -> ObsSpec:
    where = f"observation {key!r}"
    if isinstance(space, spaces.Discrete):
        _check_choices(where, space, int(space.n))
        return ObsSpec("discrete", (), int(space.n), int(space.start))
    flat = spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary
    if not isinstance(space, flat) or (isinstance(space, spaces.Box) and space.dtype.kind not in "fiu"):
        raise UserError(f"{where} is {_shown(space)}, which is not flat: {FIX}")
    shape = tuple(int(s) for s in space.shape or ())
    if 0 in shape:
        raise UserError(f"{where} is empty (shape {shape}): leave it out or give it at least one value")
    if isinstance(space, spaces.MultiBinary):
        return ObsSpec("categories", shape, 2)
    if isinstance(space, spaces.MultiDiscrete):
        start = int(space.start.min())
        n = int((space.start.astype(np.int64) + space.nvec).max()) - start
        _check_choices(where, space, n)
        return ObsSpec("categories", shape, n, start)
    if space.dtype == np.uint8 and len(shape) > 1:
        if len(shape) > 3:
            raise UserError(f"{where} is uint8 of shape {shape}: an image has the shape (height, width, channels)")
        return ObsSpec("image", shape if len(shape) == 3 else (*shape, 1))
    return ObsSpec("vector", (int(np.prod(shape)),))


def _action_spec(space: spaces.Space) -> ActionSpec:
    if isinstance(space, spaces.Discrete):
        _check_choices("the action space", space, int(space.n))
        native = {"kind": "discrete", "start": int(space.start), "shape": [], "dtype": str(space.dtype)}
        return ActionSpec((int(space.n),), native=native)
    if isinstance(space, spaces.MultiDiscrete):
        _check_choices("the action space", space, sum(map(int, space.nvec.ravel())))
        native = {"kind": "multi_discrete", "start": space.start.tolist(), "shape": list(space.shape)}
        return ActionSpec(tuple(space.nvec.ravel().tolist()), native={**native, "dtype": str(space.dtype)})
    if not isinstance(space, spaces.Box):
        raise UserError(f"the action space is {_shown(space)}, which is not flat: {FIX}")
    low = space.low.astype(np.float64).ravel()
    high = space.high.astype(np.float64).ravel()
    if not low.size:
        raise UserError(f"the action space is an empty Box (shape {space.shape}): give it at least one value")
    if max(np.abs(low).max(), np.abs(high).max()) >= np.finfo(np.float32).max:
        raise UserError(f"the action space is an unbounded Box: {FIX}")
    native = {"kind": "box", "start": 0, "shape": list(space.shape), "dtype": str(space.dtype)}
    return ActionSpec((), tuple(low.tolist()), tuple(high.tolist()), native)


def _check_choices(where: str, space: spaces.Space, count: int) -> None:
    """Raise UserError where a one-hot vector would be too long."""
    if count > MOST_CHOICES:
        raise UserError(
            f"{where} is {_shown(space)}, and a choice is a vector of {count:,} numbers here, of"
            f" {MOST_CHOICES:,} at most: use a Box for what is a quantity, or several smaller choices"
        )


def _shown(space: spaces.Space) -> str:
    return " ".join(str(space).split())[:80]


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


class OneCopy(gym.Env):
    """A single environment that wraps a vector environment with one copy.

    There is no autoreset: as in every Gymnasium environment, ``step`` after the end of an episode is undefined.
    """

    def __init__(self, vector: gym.vector.VectorEnv) -> None:
        self.vector = vector
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space
        self.render_mode = vector.render_mode
        self.action_names = getattr(vector, "action_names", None)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        obs, _ = self.vector.reset(seed=seed)
        return self._first(obs), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = self.vector.step(np.asarray(action)[None])
        return self._first(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> Any:
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def _first(self, obs: Any) -> Any:
        return {key: value[0] for key, value in obs.items()} if isinstance(obs, dict) else obs[0]


def check_form(saved: Any, like: Any, name: str) -> None:
    """Check that a value out of a checkpoint has the form of one of this program's: names, shapes and kinds.

    Raises:
        ValueError: it has another; the message begins with `name`.
    """
    if isinstance(like, dict):
        if not isinstance(saved, dict) or saved.keys() != like.keys():
            raise ValueError(f"{name} has not the entries {', '.join(map(str, like))}")
        for key in like:
            check_form(saved[key], like[key], f"{name}.{key}")
    elif isinstance(like, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(like):
            raise ValueError(f"{name} has not {len(like)} values")
        for i, value in enumerate(like):
            check_form(saved[i], value, f"{name}.{i}")
    elif hasattr(like, "shape"):
        if type(saved) is not type(like) or saved.shape != like.shape or saved.dtype != like.dtype:
            raise ValueError(f"{name} is not of shape {tuple(like.shape)} and {like.dtype}")
    elif isinstance(saved, bool) != isinstance(like, bool) or not isinstance(saved, int | float):
        raise ValueError(f"{name} is a {type(saved).__name__}")
