"""Checks of an environment, each problem with a way to fix it: `longdream check-env`.

In addition to Gymnasium's checker, they test whether the project supports the environment's spaces, whether its rows
are valid (envs/contract.py), and whether it depends only on its seed and actions, as resuming requires.
"""

from __future__ import annotations

import copy
import math
import sys
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
from longdream.envs.copies import for_gym_make, one_line
from longdream.envs.make import World, find
from longdream.envs.process import environments_turn, stops_the_program
from longdream.envs.spaces.flat import make_flat, reading_of
from longdream.envs.spaces.values import Misfit

SEED = 7


class Report:
    """The result of a check: problems, each with a way to fix it; notes on what may be intended; and checks passed."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.passed: list[str] = []
        self.steps_per_s: float | None = None

    def problem(self, message: str) -> None:
        if message not in self.problems:
            self.problems.append(message)


def check(env_id: str, kwargs: dict[str, Any] | None = None, steps: int = 300) -> Report:
    """Make the environment and run several checks, each for up to `steps` steps of random actions.

    Raises:
        UserError: the environment is not registered, or cannot be made.
    """
    registration = find(env_id)
    with environments_turn():
        return _check(env_id, registration, for_gym_make(registration, kwargs or {}), steps)


def _check(env_id: str, registration: Registration, kwargs: dict[str, Any], steps: int) -> Report:
    report = Report()
    if registration.entry_point is None:
        report.notes.append("it has a vector form only: the checks of single environments are left out")
    else:
        try:
            envs = [make_flat(registration, kwargs, disable_env_checker=True) for _ in range(2)]
        except UserError:
            raise
        except BaseException as error:
            if stops_the_program(error):
                raise
            raise UserError(f"{env_id} cannot be made with {kwargs or 'no arguments'}: {one_line(error)}") from error
        try:
            if _spaces(envs[0], report):
                initial_spaces = copy.deepcopy((envs[0].observation_space, envs[0].action_space))
                _gymnasium(envs[0], report)
                if _rows(envs[0], steps, report):
                    _determinism(envs[0], envs[1], steps, report)
                _constant(envs[0], initial_spaces, report)
                if not report.problems:
                    _infos(registration, kwargs, min(steps, 60), report)
        except Misfit as misfit:
            report.problem(f"reset or step returned {misfit}")
        except BaseException as error:  # (SystemExit too) it is a finding of the check, not a failure of it
            if stops_the_program(error):
                raise
            report.problem(f"reset or step raised {one_line(error)} ({_where(error, envs[0])})")
        finally:
            _close(envs, report)
    if not report.problems:
        _world(env_id, kwargs, min(steps, 60), report)
    return report


def _spaces(env: gym.Env, report: Report) -> bool:
    """Whether the project supports the observation and action spaces."""
    try:
        env_spec(env.observation_space, env.action_space)
    except UserError as error:
        report.problem(str(error))
        return False
    report.passed.append(f"observations and actions can be stored: it {reading_of(env).line()}")
    return True


def _gymnasium(env: gym.Env, report: Report) -> None:
    """Run Gymnasium's checker. A failed assertion is reported as a problem, a warning as a note."""
    before = len(report.problems)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            gymnasium_check(env.unwrapped, skip_render_check=True)
        except BaseException as error:
            if stops_the_program(error):
                raise
            report.problem(f"Gymnasium's check_env: {one_line(error)}; see gymnasium.farama.org, 'Make your own env'")
    for warning in caught:
        text = " ".join(str(warning.message).replace("\x1b[33m", "").replace("\x1b[0m", "").split())
        if "WARN" in text and "unwrapped" not in text:
            report.notes.append(f"Gymnasium: {text.replace('WARN: ', '')}")
    if len(report.problems) == before:
        report.passed.append("Gymnasium's check_env")


def _rows(env: gym.Env, steps: int, report: Report) -> bool:
    """Whether the observations, rewards and flags of whole episodes are valid in rows."""
    before = len(report.problems)
    ended = 0
    length = 0
    at_limit = 0
    limit = env.spec.max_episode_steps if env.spec else None
    env.action_space.seed(SEED)
    obs, _ = env.reset(seed=SEED)
    _check_observation(env, obs, "reset", report)
    start = time.perf_counter()
    for t in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        _check_observation(env, obs, f"step {t + 1}", report)
        value = np.asarray(reward)
        if value.shape != () or value.dtype.kind not in "fiub":
            report.problem(f"step {t + 1} returned the reward {reward!r}: return one number, float(reward)")
        elif not math.isfinite(float(value)):
            report.problem(f"step {t + 1} returned the reward {reward}: it must be finite")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                report.problem(f"step {t + 1} returned {name} = {flag!r}: return a bool, bool({name})")
        if terminated and truncated:
            report.notes.append("an episode was both terminated and truncated: it counts as terminated, a real end")
        if len(report.problems) > before:
            return False
        length += 1
        if terminated or truncated:
            at_limit += bool(terminated) and length == limit
            ended = ended + 1
            length = 0
            obs, _ = env.reset()
            _check_observation(env, obs, "reset after an episode", report)
    report.steps_per_s = round(steps / (time.perf_counter() - start), 1)
    if at_limit and at_limit == ended:
        report.problem(
            f"every episode ended as terminated at its time limit of {limit} steps: M would learn that the task ends"
            " there; leave the limit to max_episode_steps, which truncates, and terminate only at real ends of the task"
        )
        return False
    if not ended:
        report.notes.append(
            f"no episode ended within {steps} steps: if none ever does, give it a time limit, which truncates and does"
            " not terminate: register it with max_episode_steps, or set --env.kwargs.max_episode_steps"
        )
    report.passed.append(f"{steps} rows, {ended} ends of episodes")
    return True


def _check_observation(env: gym.Env, obs: Any, where: str, report: Report) -> None:
    """Report an observation that is not finite or not in its space; `where` names the call that returned it."""
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
            description = f"{getattr(value, 'dtype', type(value).__name__)} of shape {np.shape(value)}"
            if isinstance(value, np.ndarray) and value.shape == space.shape and value.dtype == space.dtype:
                description += f" with values from {value.min()} to {value.max()}"
            report.problem(f"{where} returned {name!r} as {description}, its space is {space}: make one fit the other")


def _determinism(one: gym.Env, two: gym.Env, steps: int, report: Report) -> None:
    """Whether equal seeds and actions give equal rows: in two copies, and in one copy before and after an episode."""
    before = len(report.problems)
    steps = min(steps, 100)
    first = _play(one, SEED, steps)
    second = _play(two, SEED, steps)
    fix = "draw everything random from self.np_random, which super().reset(seed=seed) seeds, and use no clock"
    for t, (a, b) in enumerate(zip(first, second, strict=False)):
        if not data_equivalence(a, b):
            report.problem(f"two copies with the same seed and actions differ at row {t}: {fix}")
            break
    else:
        for t, (a, b) in enumerate(zip(first, _play(one, SEED, steps), strict=False)):
            if not data_equivalence(a, b):
                report.problem(f"with the same seed and actions, row {t} differs after an episode was played: {fix}")
                break
    if all(data_equivalence(first, _play(two, SEED + i, steps)) for i in range(1, 6)):
        report.notes.append(
            "another seed changes nothing: if the environment is meant to be random, it does not use the seed"
        )
    if len(report.problems) == before:
        report.passed.append("same seed and actions, same rows")


def _constant(env: gym.Env, initial: tuple[gym.Space, gym.Space], report: Report) -> None:
    """Whether the observation and action spaces are still the initial ones."""
    for name, before, now in zip(
        ("observation", "action"), initial, (env.observation_space, env.action_space), strict=True
    ):
        if now != before:
            report.problem(
                f"{name}_space changed from {before} to {now} while it was played: set it once, in __init__, as"
                " large as it can become"
            )


def _infos(registration: Registration, kwargs: dict[str, Any], steps: int, report: Report) -> None:
    """Whether Gymnasium's vector environments can combine the infos of two copies. Training does not use infos."""

    def make() -> gym.Env:
        return make_flat(registration, kwargs, disable_env_checker=True)

    try:
        with closing(gym.vector.SyncVectorEnv([make, make])) as both:
            both.action_space.seed(SEED)
            both.reset(seed=SEED)
            for _ in range(steps):
                both.step(both.action_space.sample())
    except BaseException as error:
        if stops_the_program(error):
            raise
        report.notes.append(
            f"two copies in Gymnasium's SyncVectorEnv raised {one_line(error)} (training here is not affected): give"
            " every entry of info one type and shape that never change, and leave out entries without a value"
        )


def _play(env: gym.Env, seed: int, steps: int) -> list[Any]:
    """Rows (obs, reward, terminated, truncated) of one episode of up to `steps` steps. The actions are fixed."""
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
    """Whether two copies run as in training, and continue exactly from a saved state."""
    rng = np.random.default_rng(SEED)
    try:
        with closing(World(env_id, 2, SEED, kwargs)) as world, closing(World(env_id, 2, SEED, kwargs)) as restored:
            world.reset()
            actions = [world.random_action(rng) for _ in range(2 * steps)]
            for action in actions[:steps]:
                world.step(action)
            restored.set_state(world.get_state())
            for t, action in enumerate(actions[steps:]):
                a = world.step(action)
                b = restored.step(action)
                if not data_equivalence(vars(a), vars(b)):
                    report.problem(
                        f"after restoring a saved state, row {t} differs: resumed runs will not be exact; the"
                        " environment must depend on nothing but its seed and actions"
                    )
                    return
    except (EnvError, UserError) as error:
        report.problem(" ".join(str(error).splitlines()[0].split()))
        return
    report.passed.append("two copies side by side, continued exactly from a saved state")


def _close(envs: list[gym.Env], report: Report) -> None:
    for env in envs:
        try:
            env.close()
        except BaseException as error:
            if stops_the_program(error):
                raise
            report.problem(f"close raised {one_line(error)} ({_where(error, env)})")


def _where(error: BaseException, env: gym.Env) -> str:
    """The innermost line of the environment's own file that an error passed, if any, and not one of a package that it
    calls. (Some packages put a function of theirs in place of sys.exit.)"""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(sys.modules.get(type(env.unwrapped).__module__), "__file__", None)
    last = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
    return f"{last.filename}, line {last.lineno}"
