"""Registering, finding and running environments: vectorisation, seeding, failures, saving and restoring state."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
import warnings
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec as Registration
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from longdream.envs.contract import EnvError, Row, UserError, check_form, env_spec
from longdream.envs.copies import (
    cannot_make,
    derive_seed,
    make_copy,
    name_workers,
    one_line,
    split_limit,
)
from longdream.envs.meaning import Meaning, meaning_of
from longdream.envs.memory_maze.sizes import SIZES
from longdream.envs.minerl.controls import CONTROLS
from longdream.envs.process import environments_turn, stops_the_program
from longdream.envs.remote import FAULTS, registration
from longdream.envs.spaces.flat import Reading, split_options
from longdream.envs.spaces.values import Misfit, conform
from longdream.envs.workers import Workers

REPLAYED_STEPS_PER_TIMEOUT = 100  # restoring a copy replays its episode; the time limit grows by one timeout_s per this


def register() -> None:
    """Register the project's environments with Gymnasium. Repeated calls have no effect."""
    for name, module in {"Recall": "recall", "Counting": "counting"}.items():
        if (env_id := f"longdream/{name}-v0") not in gym.registry:
            entry = f"longdream.envs.tasks.{module}:{name}"
            gym.register(env_id, entry_point=f"{entry}Env", vector_entry_point=f"{entry}VecEnv")
    for name, module in {"Homing": "homing", "KeyDoor": "key_door"}.items():
        if (env_id := f"longdream/{name}-v0") not in gym.registry:
            gym.register(env_id, entry_point=f"longdream.envs.tasks.{module}:{name}Env")
    if (env_id := "longdream/Remote-v0") not in gym.registry:
        gym.register(env_id, entry_point="longdream.envs.remote:RemoteEnv")
    for size in SIZES:
        if (env_id := f"longdream/MemoryMaze-{size}x{size}-v0") not in gym.registry:
            gym.register(env_id, entry_point="longdream.envs.memory_maze.env:MemoryMazeEnv", kwargs={"size": size})
        if (env_id := f"longdream/FastMemoryMaze-{size}x{size}-v0") not in gym.registry:
            entry = "longdream.envs.fast_memory_maze.env:FastMemoryMaze"
            gym.register(env_id, entry_point=f"{entry}Env", vector_entry_point=f"{entry}VecEnv", kwargs={"size": size})
    for task in CONTROLS:
        if (env_id := f"longdream/MineRL-{task}-v0") not in gym.registry:
            gym.register(env_id, entry_point="longdream.envs.minerl.env:MineRLEnv", kwargs={"task": task})
    if (env_id := "longdream/Dream-v0") not in gym.registry:
        entry = "longdream.agent.dream_env.env:Dream"  # only a name: nothing is imported here
        gym.register(env_id, entry_point=f"{entry}Env", vector_entry_point=f"{entry}VecEnv")


def find(env_id: str) -> Registration:
    """Gymnasium's registration of "Id" or "module:Id".

    The module is imported first; it may lie in the current folder. "remote:PYTHON:ENV" is longdream/Remote-v0 with
    these arguments.

    Raises:
        UserError: the module cannot be imported, or the id is not registered; the message suggests similar ids.
    """
    if env_id.startswith("remote:"):
        return registration(env_id)
    module, _, name = env_id.rpartition(":")
    known_before = set(gym.registry)
    if module:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            with environments_turn():
                importlib.import_module(module)
        except BaseException as error:
            if stops_the_program(error):
                raise
            missing = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
            fix = "; start in the folder where it lies, or install it" if missing else ""
            raise UserError(
                f"cannot import module {module!r} of environment {env_id!r}: {one_line(error)}{fix}"
            ) from error
    if name in gym.registry:
        return gym.registry[name]
    by_lower = {known.lower(): known for known in gym.registry}
    matches = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    # an id that only the module registers needs it in front
    close = [f"{module}:{match}" if match not in known_before or _is_of(module, match) else match for match in matches]
    front = f"put the module that registers it in front, as in my_envs:{name}"
    hint = f"did you mean {' or '.join(close)}?" if close else front
    raise UserError(f"unknown environment {env_id!r}: {hint}")


def _is_of(module: str, env_id: str) -> bool:
    """Whether what a registered id makes lies in the module."""
    entry = gym.registry[env_id].entry_point
    where = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
    return bool(module) and where == module


def makes_tensors(env_id: str) -> bool:
    """Whether the environment's own vector class can keep its rows on a device.

    It then has `reset_tensors(seed)` and `step_tensors(actions)`, as envs/fast_memory_maze does."""
    entry = _vector_entry(env_id)
    return hasattr(entry, "step_tensors") and hasattr(entry, "reset_tensors")


def vector_takes(env_id: str, argument: str) -> bool:
    """Whether the environment's own vector class has an argument of this name."""
    entry = _vector_entry(env_id)
    return entry is not None and argument in inspect.signature(entry).parameters


def _vector_entry(env_id: str) -> Any:
    entry: Any = find(env_id).vector_entry_point
    return load_env_creator(entry) if isinstance(entry, str) else entry


class World:
    """num_envs copies of an environment, whose time steps are rows (see envs.contract).

    If the environment's registration has a vector class with NEXT_STEP autoreset, get_state and set_state, that class
    is used. Otherwise single copies run in this process ("sync") or in one process each ("async"). Episode e of single
    copy i is seeded from (seed, i, e), so a copy's behaviour depends only on these and on its actions.

    Args:
        env_id: a registered id, "module:Id", or "remote:PYTHON:ENV".
        num_envs: number of copies.
        seed: root of all seeds, not negative.
        kwargs: arguments of the environment. Any environment takes `max_episode_steps`, after which its episodes are
            truncated; its own limit, where that is shorter, also holds. Any also takes `read_as` and `act_as`, which
            say how single entries of its observations and actions are read (envs/spaces). With each of these, and where
            its spaces are not flat, the copies are single ones.
        mode: "sync" or "async".
        timeout_s: time limit in seconds for a copy that runs in its own process: to be made, to step, to reset, to
            close.
        first: number of the first copy, where others run elsewhere: copy i is number `first` + i to its seeds.

    Raises:
        UserError: the environment does not exist, cannot be made, or has a space that is not supported.
        EnvError: (also in every method) a copy raised an exception, returned what its spaces do not announce, did not
            answer in time (async only), or its process died. The world is then closed.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int,
        kwargs: dict[str, Any] | None = None,
        mode: Literal["sync", "async"] = "sync",
        timeout_s: float = 60.0,
        first: int = 0,
    ) -> None:
        if num_envs < 1 or seed < 0:
            raise UserError(
                f"num_envs={num_envs}, seed={seed}: there must be at least 1 copy and seeds are not negative"
            )
        if mode not in ("sync", "async"):
            raise UserError(f"unknown mode {mode!r} of {env_id}: use 'sync' or 'async'")
        self.env_id = env_id
        self.num_envs = num_envs
        self.seed = seed
        self.first = first
        self.timeout_s = timeout_s
        registration = find(env_id)
        kwargs, limit = split_limit(kwargs or {})
        single = limit or split_options(kwargs)[1]
        with environments_turn():
            native = None if single else _native(registration, num_envs, kwargs)
            self.native = native is not None
            self.vector: VectorEnv = native or self._single_copies(registration, kwargs, limit, mode)
        self.max_episode_steps = limit or registration.max_episode_steps or 0  # 0: no limit is known
        self.single_observation_space = self.vector.single_observation_space
        self.single_action_space = self.vector.single_action_space
        try:
            self.spec = env_spec(self.single_observation_space, self.single_action_space)
        except UserError:
            self.close()
            raise
        self.row: Row | None = None  # the last row returned
        self.faults = 0  # number of faults that copies have recovered from (longdream/Remote-v0 does)

    def reset(self) -> Row:
        """The first row of every copy. Always starts again from episode 0, as in a new World."""
        seeds: list[int | None] = [self.seed] * self.num_envs  # a `Copy` derives its own seeds from this root
        if self.native:
            seeds = [derive_seed(self.seed, self.first + i, 0) for i in range(self.num_envs)]
        obs, info = self._ask("reset", self.timeout_s, seed=seeds)
        self.faults += int(np.sum(info.get(FAULTS, 0)))
        self.row = Row(
            self._pack(obs, "reset"),
            is_first=np.ones(self.num_envs, np.bool_),
            reward=np.zeros(self.num_envs, np.float32),
            terminated=np.zeros(self.num_envs, np.bool_),
            truncated=np.zeros(self.num_envs, np.bool_),
        )
        return self.row

    def step(self, action: np.ndarray) -> Row:
        """Apply encoded actions (n, A) and return the next row of every copy.

        Where the previous row ended an episode, the action is ignored and the new row is the first of the next
        episode."""
        if self.row is None:
            raise RuntimeError("World.step before World.reset")
        if action.shape != (self.num_envs, self.spec.action.size):
            raise ValueError(f"actions of shape {action.shape}, expected {(self.num_envs, self.spec.action.size)}")
        native = self.spec.action.decode(action)
        obs, reward, terminated, truncated, info = self._ask("step", self.timeout_s, actions=native)
        self.faults += int(np.sum(info.get(FAULTS, 0)))
        self.row = Row(
            self._pack(obs, "step"),
            self.row.terminated | self.row.truncated,
            self._each("reward", reward, np.float32),
            self._each("terminated", terminated, np.bool_),
            self._each("truncated", truncated, np.bool_),
        )
        self._check_finite(self.row)
        return self.row

    def _pack(self, obs: Any, name: str) -> dict[str, np.ndarray]:
        """Observations as they are stored. Raises EnvError for those that their space does not announce."""
        if self.native:  # a single copy has checked its own
            try:
                obs = conform(obs, self.single_observation_space, (self.num_envs,))
            except Misfit as misfit:
                self.close()
                raise EnvError(f"environment {self.env_id} returned {misfit} (in {name})") from None
        return self.spec.pack_obs(obs)

    def _each(self, name: str, values: Any, dtype: type) -> np.ndarray:
        """Rewards or flags of all copies, (n,)."""
        array = np.asarray(values)
        if array.shape != (self.num_envs,) or array.dtype.kind not in "fiub":
            self.close()
            raise EnvError(
                f"environment {self.env_id} returned {name} as {array.dtype} of shape {array.shape}: return an array of"
                f" one value for each of {self.num_envs} copies"
            )
        return array.astype(dtype, copy=False)

    def _check_finite(self, row: Row) -> None:
        """Raise EnvError for an observation that is not finite: it would stay in the world model's state.

        Rewards are not checked here: the learner skips an update that is not finite."""
        for name, values in row.obs.items():
            if values.dtype.kind != "f":
                continue
            bad = np.flatnonzero(~np.isfinite(values.reshape(self.num_envs, -1)).all(1))
            if len(bad):
                self.close()
                workers = name_workers((self.first + bad).tolist())
                message = f"environment {workers} of {self.env_id} returned an observation {name!r} that is not finite"
                raise EnvError(message, int(bad[0]))

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """Encoded actions (n, A), drawn uniformly at random."""
        return self.spec.action.sample(rng, self.num_envs)

    def get_state(self) -> dict[str, Any]:
        """The state from which `set_state` of an equal World continues exactly.

        It consists of scalars, strings, lists, dicts and numpy arrays. The state of a single copy is the index of its
        episode and the actions taken in it. Restoring is exact if the environment depends only on its seed and its
        actions; one that also depends on a clock or on another process will differ.
        """
        if self.row is None:
            raise RuntimeError("World.get_state before World.reset")
        copies = self._ask("get_state", self.timeout_s)
        return {"copies": copies if self.native else list(copies), "row": dict(vars(self.row))}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from where get_state was called. ``row`` is again the row that was current then.

        Raises:
            ValueError: no World of this environment has such a state.
        """
        if self.row is not None:
            check_form(state["row"], dict(vars(self.row)), "row")
        copies = state["copies"]
        if self.native == isinstance(copies, list):
            form = "as single copies" if self.native else "in its vector form"
            raise UserError(f"{self.env_id} was saved {form}: leave env.kwargs.max_episode_steps as it was then")
        if self.native:
            try:
                self._ask("set_state", self.timeout_s, state=copies)
            except EnvError as error:
                raise ValueError(error.message) from error
        else:
            self._check_copies(copies)
            # reset first: it clears any autoreset that the vector environment still has pending
            self._ask("reset", self.timeout_s)
            longest_episode = max(len(copy["actions"]) for copy in copies)
            timeout_s = self.timeout_s * (1 + longest_episode // REPLAYED_STEPS_PER_TIMEOUT)
            self._ask("set_state", timeout_s, states=dict(enumerate(copies, self.first)))
        self.row = Row(**state["row"])

    def _check_copies(self, copies: list[dict[str, Any]]) -> None:
        """Raise ValueError for what are no states of single copies."""
        shape = self.single_action_space.shape or ()
        for i, copy in enumerate(copies):
            numbers = {"root": copy.get("root"), "episode": copy.get("episode"), "ended": copy.get("ended", False)}
            check_form(numbers, {"root": 0, "episode": 0, "ended": False}, f"copies.{i}")
            actions = copy.get("actions")
            if not isinstance(actions, np.ndarray) or (len(actions) and actions.shape[1:] != shape):
                raise ValueError(f"copies.{i}.actions are none of {self.single_action_space}")
        if len(copies) != self.num_envs:
            raise ValueError(f"there are {len(copies)} states of {self.num_envs} copies")

    def render(self, i: int = 0) -> Any:
        """The rendered image of copy i, (H, W, 3) uint8. None unless kwargs has {"render_mode": "rgb_array"}."""
        return None if self.vector.render_mode is None else self._ask("render", self.timeout_s)[i]

    def meaning(self) -> Meaning:
        """What the environment says of its actions."""
        return meaning_of(self.vector) if self.native else self._ask("meaning", self.timeout_s)[0]

    def reading(self) -> str:
        """How observations and actions are read, in one line."""
        if self.native:
            return Reading(self.single_observation_space, self.single_action_space, {}).line()
        return self._ask("reading", self.timeout_s)[0]

    def probes(self, i: int = 0) -> dict[str, np.ndarray]:
        """What the observation of copy i hides (docs/memory-maze.md); empty where the environment has no probes."""
        if not self.native:
            return self._ask("get_probes", self.timeout_s)[i]
        if not hasattr(self.vector, "get_probes"):
            return {}
        return {key: values[i] for key, values in self._ask("get_probes", self.timeout_s).items()}

    def close(self) -> None:
        """Close every copy. Repeated calls have no effect. In worker processes it takes `timeout_s` at most."""
        try:
            with environments_turn():
                self.vector.close()
        except BaseException as error:  # only a warning: an error in close must not hide an earlier one
            if stops_the_program(error):
                raise
            warnings.warn(f"environment {self.env_id} raised in close: {one_line(error)}", stacklevel=2)

    def _single_copies(self, registration: Registration, kwargs: dict[str, Any], limit: int, mode: str) -> VectorEnv:
        if registration.entry_point is None:
            lack = "and not one with NEXT_STEP autoreset, get_state/set_state and flat spaces"
            if limit or split_options(kwargs)[1]:
                lack = "which takes no max_episode_steps, read_as or act_as"
            raise UserError(
                f"{self.env_id} has only a vector form, {lack}: give it an entry_point for single environments"
            )
        numbers = range(self.first, self.first + self.num_envs)
        makers = [partial(make_copy, self.env_id, registration, kwargs, limit, number) for number in numbers]
        if mode == "sync":
            return SyncVectorEnv(makers)
        return Workers(makers, self.env_id, self.timeout_s, self.first)

    def _ask(self, name: str, timeout_s: float, **kwargs: Any) -> Any:
        """Call a method of the vector environment, or of every copy. Every failure is raised as an EnvError."""
        vector = self.vector
        try:
            if isinstance(vector, Workers):
                return vector.call_within(timeout_s, name, **kwargs)
            with environments_turn():
                if isinstance(vector, SyncVectorEnv) and name not in ("reset", "step"):
                    return vector.call(name, **kwargs)
                return getattr(vector, name)(**kwargs)
        except EnvError:
            self._end()
            raise
        except BaseException as error:  # SystemExit too: an environment does not end the program
            if stops_the_program(error):
                raise
            self._end()
            message = f"environment {self.env_id} raised in {name}: {one_line(error)}"
            raise EnvError(message, trace=traceback.format_exc()) from None

    def _end(self) -> None:
        """End every copy after a failure. Workers are not asked: they may hang."""
        if isinstance(self.vector, Workers):
            self.vector.kill()
        self.close()


def _native(registration: Registration, num_envs: int, kwargs: dict[str, Any]) -> VectorEnv | None:
    if registration.vector_entry_point is None or registration.additional_wrappers:
        return None
    entry: Any = registration.vector_entry_point
    try:
        entry = load_env_creator(entry) if isinstance(entry, str) else entry
        resumable = hasattr(entry, "get_state") and hasattr(entry, "set_state")
        if not resumable or entry.metadata.get("autoreset_mode") is not AutoresetMode.NEXT_STEP:
            return None
        vector = gym.make_vec(registration, num_envs, "vector_entry_point", **kwargs)
        if not Reading(vector.single_observation_space, vector.single_action_space, {}).plain:
            vector.close()
            return None
        return vector
    except UserError:
        raise
    except BaseException as error:
        if stops_the_program(error):
            raise
        raise cannot_make(registration.id, kwargs, error) from error
