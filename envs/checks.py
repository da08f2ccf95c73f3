"""What is wrong with an environment, and how to mend it: `longdream check-env`.

Beside Gymnasium's own checker: whether the project can store what the environment shows, whether rows in time hold
what they should (envs/contract.py), and whether it depends on seed and actions alone, which resuming rests on.
"""

from __future__ import annotations

import copy
import math
import time
import traceback
import warnings
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec as Registration
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.utils.env_checker import data_equivalence

from longdream.envs.contract import EnvError, UserError, env_spec
from longdream.envs.make import World, find
from longdream.envs.text import without_text

SEED = 7


class Report:
    """What a check found: problems, each with a way to mend it, and notes on what may be meant."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.passed: list[str] = []
        self.steps_per_s: float | None = None

    def problem(self, message: str) -> None:
        if message not in self.problems:
            self.problems.append(message)


def check(env_id: str, kwargs: dict[str, Any] | None = None, steps: int = 300) -> Report:
    """Make the environment and try it for `steps` steps of random actions in each of several ways.

    Raises:
        UserError: it is not registered, or cannot be made.
    """
    registration, kwargs, report = find(env_id), kwargs or {}, Report()
    if registration.entry_point is None:
        report.notes.append("it has a vector form only: the checks of single environments are left out")
    else:
        try:
            envs = [without_text(gym.make(registration, disable_env_checker=True, **kwargs)) for _ in range(2)]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{env_id} cannot be made with {kwargs or 'no arguments'}: {_one_line(error)}") from error
        try:
            if _spaces(envs[0], report):
                seen, done = copy.deepcopy((envs[0].observation_space, envs[0].action_space))
                _gymnasium(envs[0], report)
                if _rows(envs[0], steps, report):
                    _determinism(envs[0], envs[1], steps, report)
                _constant(envs[0], seen, done, report)
                if not report.problems:
                    _infos(registration, kwargs, min(steps, 60), report)
        except Exception as error:  # it is the environment that raised: what it does is what is asked for
            report.problem(f"reset or step raised {_one_line(error)} ({_where(error)})")
        finally:
            for env in envs:
                env.close()
    if not report.problems:
        _world(env_id, kwargs, min(steps, 60), report)
    return report


def _spaces(env: gym.Env, report: Report) -> bool:
    """Whether the project can store what is seen and done."""
    try:
        env_spec(env.observation_space, env.action_space)
    except UserError as error:
        report.problem(str(error))
        return False
    report.passed.append("observations and actions can be stored")
    return True


def _gymnasium(env: gym.Env, report: Report) -> None:
    """Gymnasium's checker; what it asserts is a problem, what it warns of a note."""
    before = len(report.problems)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            gymnasium_check(env.unwrapped, skip_render_check=True)
        except Exception as error:
            report.problem(f"Gymnasium's check_env: {_one_line(error)}; see gymnasium.farama.org, 'Make your own env'")
    for warning in caught:
        text = " ".join(str(warning.message).replace("\x1b[33m", "").replace("\x1b[0m", "").split())
        if "WARN" in text and "unwrapped" not in text:
            report.notes.append(f"Gymnasium: {text.replace('WARN: ', '')}")
    if len(report.problems) == before:
        report.passed.append("Gymnasium's check_env")


def _rows(env: gym.Env, steps: int, report: Report) -> bool:
    """Whether observations, rewards and flags of whole episodes are what rows need."""
    before, ended, length, at_limit = len(report.problems), 0, 0, 0
    limit = env.spec.max_episode_steps if env.spec else None
    env.action_space.seed(SEED)
    obs, _ = env.reset(seed=SEED)
    _observed(env, obs, "reset", report)
    began = time.perf_counter()
    for t in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        _observed(env, obs, f"step {t + 1}", report)
        value = np.asarray(reward)
        if value.shape != () or value.dtype.kind not in "fiub":
            report.problem(f"step {t + 1} returned the reward {reward!r}: return one number, float(reward)")
        elif not math.isfinite(float(value)):
            report.problem(f"step {t + 1} returned the reward {reward}: it must be finite")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                report.problem(f"step {t + 1} returned {name} = {flag!r}: return a bool, bool({name})")
        if terminated and truncated:
            report.notes.append("an end was both terminated and truncated: it counts as terminated, a real end")
        if len(report.problems) > before:
            return False
        length += 1
        if terminated or truncated:
            at_limit += bool(terminated) and length == limit
            ended, length = ended + 1, 0
            obs, _ = env.reset()
            _observed(env, obs, "reset after an episode", report)
    report.steps_per_s = round(steps / (time.perf_counter() - began), 1)
    if at_limit and at_limit == ended:
        report.problem(
            f"every episode ended as terminated at its time limit of {limit} steps: M would learn that the world ends"
            " there; leave the limit to max_episode_steps, which truncates, and terminate at real ends alone"
        )
        return False
    if not ended:
        report.notes.append(
            f"no episode ended within {steps} steps: if none ever does, give it a time limit (register with"
            " max_episode_steps, or wrap it in gymnasium.wrappers.TimeLimit), which truncates and does not terminate"
        )
    report.passed.append(f"{steps} rows, {ended} ends of episodes")
    return True


def _observed(env: gym.Env, obs: Any, where: str, report: Report) -> None:
    if env.observation_space.contains(obs):
        parts = obs.items() if isinstance(obs, dict) else [("obs", obs)]
        for name, value in parts:
            if np.asarray(value).dtype.kind == "f" and not np.isfinite(value).all():
                report.problem(f"{where} returned an observation {name!r} that is not finite: M would keep it")
        return
    spaces = env.observation_space.spaces if isinstance(env.observation_space, gym.spaces.Dict) else None
    pairs = [("obs", obs, env.observation_space)]
    if spaces is not None and isinstance(obs, dict) and obs.keys() == spaces.keys():
        pairs = [(name, obs[name], space) for name, space in spaces.items()]
    for name, value, space in pairs:
        if not space.contains(value):
            told = f"{getattr(value, 'dtype', type(value).__name__)} of shape {np.shape(value)}"
            if isinstance(value, np.ndarray) and value.shape == space.shape and value.dtype == space.dtype:
                told += f" with values from {value.min()} to {value.max()}"
            report.problem(f"{where} returned {name!r} as {told}, its space is {space}: make one fit the other")


def _determinism(one: gym.Env, two: gym.Env, steps: int, report: Report) -> None:
    """Equal seeds and actions give equal rows: in two copies, and in one that has played before."""
    before, steps = len(report.problems), min(steps, 100)
    first, second = _played(one, SEED, steps), _played(two, SEED, steps)
    mend = "draw everything random from self.np_random, which super().reset(seed=seed) seeds, and use no clock"
    for t, (a, b) in enumerate(zip(first, second, strict=False)):
        if not data_equivalence(a, b):
            report.problem(f"two copies with the same seed and actions differ at row {t}: {mend}")
            break
    else:
        for t, (a, b) in enumerate(zip(first, _played(one, SEED, steps), strict=False)):
            if not data_equivalence(a, b):
                report.problem(f"the same seed and actions differ, at row {t}, after an episode was played: {mend}")
                break
    if all(data_equivalence(first, _played(two, SEED + i, steps)) for i in range(1, 6)):
        report.notes.append(
            "another seed changes nothing: if something is meant to be random, the seed does not reach it"
        )
    if len(report.problems) == before:
        report.passed.append("same seed and actions, same rows")


def _constant(env: gym.Env, seen: gym.Space, done: gym.Space, report: Report) -> None:
    """Spaces are those that training was begun with."""
    for name, before, now in (("observation", seen, env.observation_space), ("action", done, env.action_space)):
        if now != before:
            report.problem(
                f"{name}_space changed from {before} to {now} while it was played: set it once, in __init__, as large"
                " as it can become"
            )


def _infos(registration: Registration, kwargs: dict[str, Any], steps: int, report: Report) -> None:
    """Whether Gymnasium's vector environments can put the infos of two copies together; training reads none."""

    def make() -> gym.Env:
        return without_text(gym.make(registration, disable_env_checker=True, **kwargs))

    try:
        with closing(gym.vector.SyncVectorEnv([make, make])) as both:
            both.action_space.seed(SEED)
            both.reset(seed=SEED)
            for _ in range(steps):
                both.step(both.action_space.sample())
    except Exception as error:
        report.notes.append(
            f"two copies in Gymnasium's SyncVectorEnv raised {_one_line(error)} (training here is not touched): give"
            " every entry of info one type and shape that never change, and leave out what is not known"
        )


def _played(env: gym.Env, seed: int, steps: int) -> list[Any]:
    """Rows (obs, reward, terminated, truncated) of one episode, its first `steps` at most; the actions are the same."""
    env.action_space.seed(SEED)
    obs, _ = env.reset(seed=seed)
    rows: list[Any] = [(np.copy(obs) if isinstance(obs, np.ndarray) else obs, 0.0, False, False)]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        obs = np.copy(obs) if isinstance(obs, np.ndarray) else obs
        rows.append((obs, float(reward), bool(terminated), bool(truncated)))
        if terminated or truncated:
            break
    return rows


def _world(env_id: str, kwargs: dict[str, Any], steps: int, report: Report) -> None:
    """Two copies as training has them: each its own stream, and continued exactly where its state was taken."""
    rng = np.random.default_rng(SEED)
    try:
        with closing(World(env_id, 2, SEED, kwargs)) as world, closing(World(env_id, 2, SEED, kwargs)) as again:
            world.reset()
            actions = [world.random_action(rng) for _ in range(2 * steps)]
            for action in actions[:steps]:
                world.step(action)
            again.set_state(world.get_state())
            for t, action in enumerate(actions[steps:]):
                a, b = world.step(action), again.step(action)
                if not data_equivalence(vars(a), vars(b)):
                    report.problem(
                        f"continued from a saved state, row {t} differs: resumed runs will not be exact; the"
                        " environment must depend on nothing but its seed and actions"
                    )
                    return
    except (EnvError, UserError) as error:
        report.problem(" ".join(str(error).splitlines()[0].split()))
        return
    report.passed.append("two copies side by side, continued exactly from a saved state")


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
