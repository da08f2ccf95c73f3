"""Scripted policies: `longdream evaluate oracle|navigator|random` and `longdream collect`."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from longdream.agent.data import npz_episodes as offline
from longdream.agent.evaluation.limits import LONGEST_EPISODE, endless
from longdream.envs.contract import EnvError, UserError
from longdream.envs.copies import LIMIT, Copy, cannot_make, derive_seed, for_gym_make, make_copy, one_line
from longdream.envs.make import find
from longdream.envs.memory_maze import policies
from longdream.envs.memory_maze.sizes import references
from longdream.envs.process import environments_turn, stops_the_program
from longdream.envs.spaces.flat import split_options
from longdream.envs.workers import Workers

Name = Literal["oracle", "navigator", "random"]
NAMES: tuple[Name, ...] = ("oracle", "navigator", "random")

TIMEOUT_S = 300.0
"""Seconds that an environment in a process of its own has for a step or a reset."""

Watch = Callable[[np.ndarray, np.ndarray | None, np.ndarray, dict[str, Any]], None]
"""Called after every step with observations (n, ...), the actions before them (None after a reset), rewards (n,) and
infos."""


def evaluate(
    policy: Name, env: str, env_kwargs: dict[str, Any] | None, episodes: int, seed: int, copies: int | None = None
) -> dict[str, Any]:
    """The returns of a scripted policy over complete episodes, with known returns of the environment.

    Raises:
        UserError: the environment cannot be made, or lacks the probes that the policy needs.
    """
    from longdream.agent.evaluation.rollout import Returns  # imported here: it brings torch

    returns = np.zeros(episodes)
    lengths = np.zeros(episodes)
    with closing(_Players(policy, env, env_kwargs or {}, episodes, seed, copies)) as players:
        for first in range(0, episodes, players.n):
            total, length = players.play(first)
            last = min(first + players.n, episodes)
            returns[first:last] = total[: last - first]
            lengths[first:last] = length[: last - first]
    summary = Returns.of(returns, lengths).to_json()
    known = references(env, env_kwargs)
    return {**summary, "env": env, "seed": seed, "policy": policy} | ({"references": known} if known else {})


def collect(
    env: str = "longdream/MemoryMaze-9x9-v0",
    policy: Name = "navigator",
    episodes: int = 10,
    out: Path = Path("runs/collected"),
    first: int = 0,
    seed: int = 0,
    copies: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write episodes of a scripted policy in Memory Maze, in the format of the published offline data.

    Each episode is one NPZ file of 1,001 rows (docs/memory-maze.md), OUT/episode-000000.npz and so on. It depends on
    the seed, on its number and, except with the oracle, on the episodes that are played in parallel with it.

    examples
      longdream collect --episodes 100 --out runs/offline-9x9
      longdream collect --env longdream/MemoryMaze-15x15-v0 --policy oracle --episodes 20 --out runs/oracle
      longdream collect --episodes 100 --first 100 --out runs/offline-9x9        # go on with it

    Args:
        env: a Memory Maze, the original or the fast (batched) one
        policy: the policy
        episodes: number of episodes
        out: folder of the files
        first: number of the first episode
        seed: random seed of mazes and actions
        copies: number of environments in parallel (default: one per processor)
        env_kwargs: its arguments, one by one as --env.kwargs.randomize_colors true, or all as JSON

    Raises:
        UserError: a file exists already, or the environment cannot be made or does not fit.
    """
    for flag, value, least in (
        ("episodes", episodes, 1),
        ("first", first, 0),
        ("seed", seed, 0),
        ("copies", copies, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    paths = [out / f"episode-{first + i:06d}.npz" for i in range(episodes)]
    existing = [path for path in paths if path.exists()]
    if existing:
        raise UserError(f"{existing[0]} exists already: name another --out, or a --first after the last episode there")
    out.mkdir(parents=True, exist_ok=True)
    rewards = []
    with closing(_Players(policy, env, env_kwargs or {}, episodes, seed, copies, first, probes=True)) as players:
        if players.observation_space.shape != (64, 64, 3):
            raise UserError(f"{env} shows {players.observation_space}: the layout has 64 x 64 pixels")
        for start in range(0, episodes, players.n):
            rows: list[list[dict[str, np.ndarray]]] = [[] for _ in range(min(players.n, episodes - start))]

            def keep(
                obs: np.ndarray, action: np.ndarray | None, reward: np.ndarray, info: dict[str, Any], rows: Any = rows
            ) -> None:
                for i, kept in enumerate(rows):
                    probes = {key: value[i] for key, value in info.items()}
                    taken = None if action is None else int(action[i])
                    kept.append(offline.row(np.copy(obs[i]), taken, float(reward[i]), probes))

            total, _ = players.play(start, offline.STEPS, keep)
            for path, kept, value in zip(paths[start:], rows, total, strict=False):
                offline.write(path, kept)
                rewards.append(float(value))
    mean = float(np.mean(rewards))
    print(f"{episodes} episodes of {env} by the {policy} in {out}, mean return {mean:.2f}")
    return {
        "env": env,
        "policy": policy,
        "episodes": episodes,
        "steps": episodes * offline.STEPS,
        "return_mean": mean,
        "out": str(out),
        "files": [str(path) for path in paths],
    }


class Told(Copy):
    """A copy that begins episodes with seeds that it is given, and passes on what the environment tells."""

    def begin(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """The first observation of the episode with this seed, and its info."""
        return self._begin(0, seed)

    def _info(self, info: Any) -> dict[str, Any]:
        return info if isinstance(info, dict) else {}


class _Players:
    """A policy in copies of an environment. The copies begin their episodes together, each with the seed of its
    episode's number."""

    def __init__(
        self,
        name: Name,
        env: str,
        kwargs: dict[str, Any],
        episodes: int,
        seed: int,
        copies: int | None,
        offset: int = 0,
        probes: bool = False,
    ) -> None:
        if episodes < 1:
            raise UserError(f"--episodes {episodes}: must be at least 1")
        self.name = name
        self.env = env
        self.episodes = episodes
        self.seed = seed
        self.offset = offset
        registration = find(env)
        kwargs = for_gym_make(registration, kwargs)
        native = registration.vector_entry_point is not None and LIMIT not in kwargs and not split_options(kwargs)[1]
        limit = kwargs.get(LIMIT) or registration.max_episode_steps or 0
        self.most_steps = max(LONGEST_EPISODE, limit)
        self.n = min(episodes, copies or (64 if native else os.cpu_count() or 1))
        if probes or name != "random":
            kwargs = {**kwargs, "probes": True}
        self.probing = "probes" in kwargs
        makers = [partial(make_copy, env, registration, kwargs, 0, i, Told) for i in range(self.n)]
        try:
            with environments_turn():
                if native:
                    self.vector: Any = gym.make_vec(registration, self.n, "vector_entry_point", **kwargs)
                else:
                    self.vector = Workers(makers, env, TIMEOUT_S) if self.n > 1 else makers[0]()
        except BaseException as error:
            if stops_the_program(error):
                raise
            known = error if isinstance(error, UserError) else cannot_make(env, kwargs, error)
            if "keyword argument 'probes'" in str(known):
                hint = "a scripted policy plays in Memory Maze, which tells it the maze"
                raise UserError(f"{known}: {hint}") from error
            raise known from error
        prefix = "" if isinstance(self.vector, Told) else "single_"
        self.observation_space = getattr(self.vector, f"{prefix}observation_space")
        space = getattr(self.vector, f"{prefix}action_space")
        if not isinstance(space, gym.spaces.Discrete):
            self.close()
            raise UserError(f"{env} has actions {space}: scripted policies choose one of several, as in Memory Maze")
        self.actions = int(space.n)
        self.began = time.perf_counter()
        self.printed_at = 0.0
        self.steps = 0

    def play(self, start: int, limit: int | None = None, watch: Watch | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Play episode `start` and the following ones, one per copy, to their ends or to `limit` steps.

        Returns:
            return and length of each episode, both (n,).
        """
        numbers = [self.offset + start + i for i in range(self.n)]
        obs, info = self._reset([derive_seed(self.seed, 0, number) for number in numbers])
        rng = np.random.default_rng((self.seed, numbers[0]))
        policy: policies.Policy = policies.Oracle()
        if self.name != "oracle":
            policy = policies.Navigator(rng) if self.name == "navigator" else policies.Random(rng, self.actions)
        policy.reset(self.n)
        total = np.zeros(self.n)
        length = np.zeros(self.n)
        running = np.ones(self.n, np.bool_)
        reward = np.zeros(self.n)
        action = None
        while True:
            if watch is not None:
                watch(obs, action, reward, info)
            if not running.any() or (limit is not None and length.max() >= limit):
                return total, length
            if limit is None and length[running].max() >= self.most_steps:
                raise endless(self.env, self.most_steps)
            action = policy.act(info)
            obs, reward, terminated, truncated, info = self._step(action)
            total += np.where(running, reward, 0.0)  # copies that have ended are still stepped, but not counted
            length += running
            running &= ~(terminated | truncated)
            self.steps += self.n
            self._print_progress(numbers, int(length.max()))

    def close(self) -> None:
        with environments_turn():
            self.vector.close()

    def _reset(self, seeds: list[int]) -> tuple[Any, dict[str, Any]]:
        """Observations and infos of new episodes with these seeds. Raises EnvError."""
        if isinstance(self.vector, VectorEnv) and not isinstance(self.vector, Workers):
            return self._guarded("reset", lambda: self.vector.reset(seed=seeds))
        obs, infos = zip(*self._each("begin", [{"seed": seed} for seed in seeds]), strict=True)
        return obs, self._stack(infos)

    def _step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As a step of a vector environment. Raises EnvError."""
        if isinstance(self.vector, VectorEnv) and not isinstance(self.vector, Workers):
            return self._guarded("step", lambda: self.vector.step(actions))
        answers = self._each("step", [{"action": action} for action in actions])
        obs, reward, terminated, truncated, infos = zip(*answers, strict=True)
        return obs, np.array(reward), np.array(terminated), np.array(truncated), self._stack(infos)

    def _each(self, name: str, arguments: list[dict[str, Any]]) -> list[Any]:
        """Call a method of every copy."""
        if not isinstance(self.vector, Workers):
            with environments_turn():
                return [getattr(self.vector, name)(**arguments[0])]
        try:
            return self.vector.ask(name, TIMEOUT_S, arguments)
        except EnvError:
            self.vector.kill()
            raise

    def _stack(self, infos: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The probes of all copies; none where none were asked for."""
        return {key: np.stack([info[key] for info in infos]) for key in infos[0]} if self.probing else {}

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            with environments_turn():
                return call()
        except BaseException as error:
            if stops_the_program(error):
                raise
            message = f"environment {self.env} raised in {name}: {one_line(error)}"
            raise EnvError(message, trace=traceback.format_exc()) from None

    def _print_progress(self, numbers: list[int], step: int) -> None:
        """Print a line of progress: on a terminal every 0.5 s, updated in place; elsewhere every 10 s."""
        live = sys.stderr.isatty()
        now = time.perf_counter()
        if now - self.printed_at < (0.5 if live else 10.0):
            return
        self.printed_at = now
        last = min(numbers[-1] + 1 - self.offset, self.episodes)
        rate = self.steps / (now - self.began)
        line = f"{self.env}: episodes {numbers[0] + 1 - self.offset} to {last} of {self.episodes}, step {step:,}"
        print(f"{line}, {rate:,.0f} steps/s", end="\r" if live else "\n", file=sys.stderr, flush=True)
