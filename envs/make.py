"""Registering, finding and running environments: vectorisation, seeding, failures, saving and restoring state."""

from __future__ import annotations

import difflib
import importlib
import multiprocessing
import os
import sys
import traceback
import warnings
from functools import partial
from multiprocessing.connection import wait
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import logger
from gymnasium.envs.registration import EnvSpec as Registration
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from longdream.envs.contract import EnvError, Row, UserError, env_spec
from longdream.envs.memory_maze.sizes import SIZES
from longdream.envs.minerl.controls import CONTROLS
from longdream.envs.remote import FAULTS, registration
from longdream.envs.text import without_text

REPLAYED_STEPS_PER_TIMEOUT = 100  # restoring a copy replays its episode; the time limit grows by one timeout_s per this


def register() -> None:
    """Register the project's environments with Gymnasium. Repeated calls have no effect."""
    for name, module in {"Recall": "recall", "Counting": "counting"}.items():
        if (env_id := f"longdream/{name}-v0") not in gym.registry:
            entry = f"longdream.envs.{module}:{name}"
            gym.register(env_id, entry_point=f"{entry}Env", vector_entry_point=f"{entry}VecEnv")
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
    if module:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module)
        except Exception as error:
            raise UserError(f"cannot import module {module!r} of environment {env_id!r}: {_one_line(error)}") from error
    if name in gym.registry:
        return gym.registry[name]
    by_lower = {known.lower(): known for known in gym.registry}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}?" if close else "import the package that registers it: module:Id"
    raise UserError(f"unknown environment {env_id!r}: {hint}")


def makes_tensors(env_id: str) -> bool:
    """Whether the environment's own vector class can keep its rows on a device.

    It then has `reset_tensors(seed)` and `step_tensors(actions)`, as envs/fast_memory_maze does."""
    entry: Any = find(env_id).vector_entry_point
    entry = load_env_creator(entry) if isinstance(entry, str) else entry
    return hasattr(entry, "step_tensors") and hasattr(entry, "reset_tensors")


class World:
    """num_envs copies of an environment, whose time steps are rows (see envs.contract).

    If the environment's registration has a vector class with NEXT_STEP autoreset, get_state and set_state, that class
    is used. Otherwise single copies run in this process ("sync") or in one process each ("async"). Episode e of single
    copy i is seeded from (seed, i, e), so a copy's behaviour depends only on these and on its actions.

    Args:
        env_id: a registered id, "module:Id", or "remote:PYTHON:ENV".
        num_envs: number of copies.
        seed: root of all seeds, not negative.
        kwargs: arguments of the environment.
        mode: "sync" or "async".
        timeout_s: time limit in seconds for a step or a reset of a copy that runs in its own process.

    Raises:
        UserError: the environment does not exist, cannot be made, or has a space that is not supported.
        EnvError: (also in every method) a copy raised an exception, did not answer in time (async only), or its process
            died. The world is then closed.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int,
        kwargs: dict[str, Any] | None = None,
        mode: Literal["sync", "async"] = "sync",
        timeout_s: float = 60.0,
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
        self.timeout_s = timeout_s
        registration = find(env_id)
        kwargs = kwargs or {}
        native = _native(registration, num_envs, kwargs)
        self.native = native is not None
        self.vector: VectorEnv = native or self._single_copies(registration, kwargs, mode)
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
            seeds = [derive_seed(self.seed, i, 0) for i in range(self.num_envs)]
        obs, info = self._ask("reset", self.timeout_s, seed=seeds)
        self.faults += int(np.sum(info.get(FAULTS, 0)))
        self.row = Row(
            self.spec.pack_obs(obs),
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
            self.spec.pack_obs(obs),
            self.row.terminated | self.row.truncated,
            np.asarray(reward, np.float32),
            np.asarray(terminated, np.bool_),
            np.asarray(truncated, np.bool_),
        )
        self._check_finite(self.row)
        return self.row

    def _check_finite(self, row: Row) -> None:
        """Raise EnvError for an observation that is not finite: it would stay in the world model's state.

        Rewards are not checked here: the learner skips an update that is not finite."""
        for name, values in row.obs.items():
            if values.dtype.kind != "f":
                continue
            bad = np.flatnonzero(~np.isfinite(values.reshape(self.num_envs, -1)).all(1))
            if len(bad):
                self.close()
                workers = _workers(bad.tolist())
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
        """Continue from where get_state was called. ``row`` is again the row that was current then."""
        copies = state["copies"]
        if self.native:
            self._ask("set_state", self.timeout_s, state=copies)
        else:
            # reset first: it clears any autoreset that the vector environment still has pending
            self._ask("reset", self.timeout_s)
            longest_episode = max(len(copy["actions"]) for copy in copies)
            timeout_s = self.timeout_s * (1 + longest_episode // REPLAYED_STEPS_PER_TIMEOUT)
            self._ask("set_state", timeout_s, states=copies)
        self.row = Row(**state["row"])

    def render(self, i: int = 0) -> Any:
        """The rendered image of copy i, (H, W, 3) uint8. None unless kwargs has {"render_mode": "rgb_array"}."""
        return None if self.vector.render_mode is None else self._ask("render", self.timeout_s)[i]

    def close(self) -> None:
        """Close every copy. Repeated calls have no effect."""
        if isinstance(self.vector, AsyncVectorEnv) and self.vector._state is not AsyncState.DEFAULT:
            self._end()  # a call was interrupted
        self.vector.close()

    def _single_copies(self, registration: Registration, kwargs: dict[str, Any], mode: str) -> VectorEnv:
        if registration.entry_point is None:
            raise UserError(
                f"{self.env_id} has only a vector form, and not one with NEXT_STEP autoreset and get_state/set_state:"
                " give it an entry_point for single environments"
            )
        makers = [partial(_make_copy, self.env_id, registration, kwargs, i) for i in range(self.num_envs)]
        if mode == "sync":
            return SyncVectorEnv(makers)
        try:
            return AsyncVectorEnv(makers, context="forkserver")
        except (EOFError, OSError) as error:
            raise EnvError(
                f"an environment worker of {self.env_id} died at its start, for a reason shown above"
            ) from error

    def _ask(self, name: str, timeout_s: float, **kwargs: Any) -> Any:
        """Call a method of the vector environment, or of every copy. Every failure is raised as an EnvError."""
        try:
            if isinstance(self.vector, AsyncVectorEnv):
                return self._ask_workers(self.vector, name, timeout_s, **kwargs)
            if isinstance(self.vector, SyncVectorEnv) and name not in ("reset", "step"):
                return self.vector.call(name, **kwargs)
            return getattr(self.vector, name)(**kwargs)
        except EnvError as error:
            self._end()
            # Gymnasium raises a worker's error as type(error)(error), so the EnvError may be nested
            raise (error.message if isinstance(error.message, EnvError) else error) from None
        except Exception as error:
            self._end()
            message = f"environment {self.env_id} raised in {name}: {_one_line(error)}"
            raise EnvError(message, trace=traceback.format_exc()) from None

    def _ask_workers(self, vector: AsyncVectorEnv, name: str, timeout_s: float, **kwargs: Any) -> Any:
        # Silence Gymnasium's logger: it logs a worker's traceback with %-formatting, which fails on a "%" in the text,
        # and our EnvError already contains it.
        level = logger.min_level
        logger.min_level = logger.ERROR + 1
        try:
            if name in ("reset", "step"):
                getattr(vector, f"{name}_async")(**kwargs)
                return getattr(vector, f"{name}_wait")(timeout=timeout_s)
            vector.call_async(name, **kwargs)
            return vector.call_wait(timeout=timeout_s)
        except (EOFError, OSError):
            wait([process.sentinel for process in vector.processes], timeout=1.0)  # the pipe closes before the process
            dead = [i for i, process in enumerate(vector.processes) if not process.is_alive()]
            message = f"environment {_workers(dead)} of {self.env_id} died in {name}"
            raise EnvError(message, min(dead, default=None)) from None
        except multiprocessing.TimeoutError:
            silent = [i for i, pipe in enumerate(vector.parent_pipes) if not pipe.poll(0)]
            message = f"environment {_workers(silent)} of {self.env_id} gave no answer to {name} within {timeout_s:g} s"
            raise EnvError(message, min(silent, default=None)) from None
        finally:
            logger.min_level = level

    def _end(self) -> None:
        """Terminate every copy without waiting for an answer."""
        if isinstance(self.vector, AsyncVectorEnv) and not self.vector.closed:
            for process in self.vector.processes:
                process.kill()  # a worker that hangs may ignore SIGTERM
            self.vector._state = AsyncState.DEFAULT  # otherwise close would wait for the pending call
            self.vector.close(terminate=True)
        self.vector.close()


class Copy(gym.Wrapper):
    """One copy of an environment.

    It seeds every episode from (root seed, index, episode). It records the episode's actions so that the episode can be
    replayed. If the environment raises, the EnvError names this copy.

    ``reset`` with a seed takes the seed as the root and starts at episode 0. After the end of an episode, ``step``
    ignores the action and begins the next episode, as NEXT_STEP autoreset does.
    """

    def __init__(self, env: gym.Env, env_id: str, index: int) -> None:
        super().__init__(env)
        self.env_id = env_id
        self.index = index
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
        self.actions.append(np.copy(action))
        obs, reward, terminated, truncated, info = self._run("step", action)
        self.ended = bool(terminated or truncated)
        return obs, float(reward), bool(terminated), bool(truncated), _faults(info)

    def render(self) -> Any:
        return self._run("render")

    def close(self) -> None:
        try:
            super().close()
        except Exception as error:  # only a warning: an error in close must not hide an earlier one
            warnings.warn(
                f"environment worker {self.index} of {self.env_id} raised in close: {_one_line(error)}", stacklevel=2
            )

    def get_state(self) -> dict[str, Any]:
        return {"root": self.root, "episode": self.episode, "actions": np.array(self.actions)}

    def set_state(self, states: list[dict[str, Any]]) -> None:
        """Replay this copy's episode up to the step at which its state was saved."""
        state = states[self.index]
        self.root = state["root"]
        self._begin(state["episode"])
        for action in state["actions"]:
            if FAULTS in self.step(action)[-1]:
                message = f"environment worker {self.index} of {self.env_id} failed while its episode was run again"
                raise EnvError(message, self.index)

    def _begin(self, episode: int) -> tuple[Any, dict[str, Any]]:
        self.episode = episode
        self.actions = []
        self.ended = False
        obs, info = self._run("reset", seed=derive_seed(self.root, self.index, episode))
        return obs, _faults(info)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.env, name)(*args, **kwargs)
        except Exception as error:
            message = f"environment worker {self.index} of {self.env_id} raised in {name}: {_one_line(error)}"
            raise EnvError(message, self.index, traceback.format_exc()) from None


def _faults(info: dict[str, Any]) -> dict[str, Any]:
    """Keep only the number of faults of an info: rows contain no infos."""
    return {FAULTS: info[FAULTS]} if FAULTS in info else {}


def derive_seed(root: int, index: int, episode: int) -> int:
    """A seed below 2**31 for one episode of one copy."""
    return int(np.random.SeedSequence((root, index, episode)).generate_state(1)[0] >> 1)


def _native(registration: Registration, num_envs: int, kwargs: dict[str, Any]) -> VectorEnv | None:
    if registration.vector_entry_point is None or registration.additional_wrappers:
        return None
    entry: Any = registration.vector_entry_point
    try:
        entry = load_env_creator(entry) if isinstance(entry, str) else entry
        resumable = hasattr(entry, "get_state") and hasattr(entry, "set_state")
        if not resumable or entry.metadata.get("autoreset_mode") is not AutoresetMode.NEXT_STEP:
            return None
        return gym.make_vec(registration, num_envs, "vector_entry_point", **kwargs)
    except UserError:
        raise
    except Exception as error:
        raise _cannot_make(registration.id, kwargs, error) from error


def _make_copy(env_id: str, registration: Registration, kwargs: dict[str, Any], index: int) -> Copy:
    try:
        env = without_text(gym.make(registration, **kwargs))
    except UserError:
        raise
    except Exception as error:
        raise _cannot_make(env_id, kwargs, error) from error
    env_spec(env.observation_space, env.action_space)  # raises UserError early if a space is not supported
    return Copy(env, env_id, index)


def _cannot_make(env_id: str, kwargs: dict[str, Any], error: Exception) -> UserError:
    arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
    return UserError(f"{env_id} cannot be made with {arguments}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _workers(indices: list[int]) -> str:
    return f"worker {indices[0]}" if len(indices) == 1 else f"workers {', '.join(map(str, indices))}"
