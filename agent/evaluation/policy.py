"""Evaluation of an agent in the real environment: its returns, those without memory, and those of random actions."""

from __future__ import annotations

import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np

from longdream.agent.config.schema import EnvConfig, EvaluateConfig
from longdream.agent.core.agent import Agent
from longdream.agent.core.ranks import here
from longdream.agent.dream_env.spaces import action_space
from longdream.agent.evaluation.rollout import EVALUATION_SEED, Episodes, Returns, Who, play_episodes
from longdream.agent.run.signals import Signals
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, Row, UserError
from longdream.envs.make import World, makes_tensors

W = TypeVar("W", bound=World)

DEFAULTS = EvaluateConfig()
QUIET_S = 20.0
"""Seconds after which an evaluation prints its progress."""
LONG = 200
"""Steps of a copy without an end after which that line names the fix."""
ENDLESS = " (if none ever does: --env.kwargs.max_episode_steps N)"
LABELS: dict[Who, str] = {"agent": "the agent", "random": "random actions"}


class WatchedWorld(World):
    """A world that stops at the next step after a signal, and prints its progress every QUIET_S seconds."""

    signals: Signals | None = None
    label = "evaluating"
    """Printed before the numbers. Without one nothing is printed, as where a logger shows the progress."""

    def reset(self) -> Row:
        self.steps = 0
        self.ended = 0
        self.printed_at = time.monotonic()
        return super().reset()

    def step(self, action: np.ndarray) -> Row:
        if self.signals is not None:
            self.signals.check()
        row = super().step(action)
        self.steps += int((~row.is_first).sum())
        self.ended += int((row.terminated | row.truncated).sum())
        if self.label and time.monotonic() - self.printed_at > QUIET_S:
            long = self.steps > LONG * self.num_envs and not self.ended and not self.max_episode_steps
            hint = ENDLESS if long else ""
            print(f"{self.label}: {self.steps:,} steps, {self.ended} episodes ended{hint}", file=sys.stderr)
            self.printed_at = time.monotonic()
        return row


def play(
    agent: Agent,
    env: EnvConfig,
    episodes: int,
    seed: int,
    who: Who = "agent",
    settings: EvaluateConfig = DEFAULTS,
    signals: Signals | None = None,
    forget_every: int = 0,
) -> Returns:
    """Play `episodes` in a new environment. Ranks share its copies, and each has the returns of all.

    Args:
        seed: of the run; it selects the evaluation episodes.
        settings: number of copies in parallel, and whether actions are greedy.
        forget_every: see `play_episodes`.

    Raises:
        UserError: the environment cannot be made, or its observations or actions are not those of the agent.
        EnvError: the environment failed. Interrupted: a signal was received.
    """
    copies = min(settings.copies, episodes)
    mine = here().span(copies)
    played = Episodes(np.empty(0), np.empty(0))
    with here().together():
        if mine:
            env = drawn_beside(agent, env)
            world = make_world(WatchedWorld, env, len(mine), seed + EVALUATION_SEED, signals, first=mine.start)
            with closing(world):
                world.signals = signals
                forgetting = f", its memory erased every {forget_every} steps" if forget_every > 1 else ""
                forgetting = " without memory" if forget_every == 1 else forgetting
                label = f"evaluating {LABELS[who]}{forgetting}, {episodes} episodes"
                world.label = label if mine.start == 0 else ""
                check_fit(world, agent.spec)
                played = play_episodes(agent, world, episodes, seed, who, settings.greedy, forget_every, copies)
    parts = here().gather([played.returns.tolist(), played.lengths.tolist()])
    returns, lengths = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Returns.of(returns, lengths)


def drawn_beside(agent: Agent, env: EnvConfig) -> EnvConfig:
    """The environment, told to make its observations on the agent's GPU, if it can and was told nothing else."""
    if agent.device.type != "cuda" or not makes_tensors(env.id):
        return env
    return replace(env, kwargs={"device": str(agent.device)} | env.kwargs)


def make_world(
    kind: type[W],
    env: EnvConfig,
    copies: int,
    seed: int,
    signals: Signals | None = None,
    saved: dict[str, Any] | None = None,
    first: int = 0,
) -> W:
    """A world whose worker processes ignore Ctrl-C, so that they end when the program ends them.

    Args:
        saved: the checkpoint whose agent goes on in it, if any.
        first: number of its first copy.

    Raises:
        UserError: the environment cannot be made, or is not as it was when the checkpoint was saved; the message has
            its name as it was given.
    """
    try:
        with signals.hidden() if signals else nullcontext():
            world = kind(env.id, copies, seed, env.kwargs, env.mode, env.timeout_s, first)
    except UserError as error:
        if env.id in str(error):
            raise
        named = UserError(f"{env.id}: {error}")
        for note in getattr(error, "__notes__", ()):  # what the environment's process printed
            named.add_note(note)
        raise named from error
    if saved is not None:
        check_fit(world, EnvSpec.from_json(saved["spec"]))
    return world


class Shown(Protocol):
    """An environment by what it shows: a `World`, or what stands in for one."""

    env_id: str
    spec: EnvSpec

    def close(self) -> None: ...


def check_fit(world: Shown, known: EnvSpec) -> None:
    """Close a world whose observations and actions are not those that an agent knows.

    Raises:
        UserError: they are not; it says which differs and how.
    """
    if world.spec != known:
        world.close()
        raise UserError(f"{world.env_id} does not fit this agent: {_difference(world.spec, known)}")


def evaluate_agent(
    agent: Agent,
    env: EnvConfig,
    episodes: int,
    seed: int,
    settings: EvaluateConfig = DEFAULTS,
    signals: Signals | None = None,
    forget_every: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The returns of the agent as JSON values, with the mean returns without long memory and of random actions.

    Args:
        forget_every: numbers of steps. For each, the same episodes are also played with M's long memory erased every so
            many steps; `erased` holds what they return. The other arguments, and errors, are those of `play`.
    """
    returns = play(agent, env, episodes, seed, "agent", settings, signals)
    without_memory = play(agent, env, episodes, seed, "agent", settings, signals, forget_every=1)
    random = play(agent, env, episodes, seed, "random", settings, signals)
    erased = {}
    for steps in forget_every:
        forgetting = play(agent, env, episodes, seed, "agent", settings, signals, forget_every=steps).to_json()
        erased[str(steps)] = {key: forgetting[key] for key in ("return_mean", "return_ci95")}
    means = {"random_mean": random.return_mean, "without_memory_mean": without_memory.return_mean}
    policy = "greedy" if settings.greedy else "drawn"
    means |= {"erased": erased} if erased else {}
    return {**returns.to_json(), **means, "env": env.id, "seed": seed, "policy": policy}


def _difference(spec: EnvSpec, known: EnvSpec) -> str:
    if spec.obs.keys() != known.obs.keys():
        return f"it shows {', '.join(spec.obs)}, the agent knows {', '.join(known.obs)}"
    for key, obs in spec.obs.items():
        if obs != (other := known.obs[key]):
            return f"its {key!r} is {_shown(obs)}, the agent knows {_shown(other)}{_fix(key, obs, other)}"
    return f"its actions are {_space(spec.action)}, the agent was trained with {_space(known.action)}"


def _fix(key: str, obs: ObsSpec, known: ObsSpec) -> str:
    """The flag that reads an observation as the agent knows it, where there may be one."""
    ways = ("image", "vector", "categories")
    return f" (--env.kwargs.read_as.{key} {known.kind})" if obs.kind != known.kind and known.kind in ways else ""


def _shown(obs: ObsSpec) -> str:
    """An observation in words; values that distinguish it from others of its kind are among them."""
    if obs.kind == "discrete":
        return f"one of {obs.n} values from {obs.start} on"
    if obs.kind == "categories":
        return f"{' x '.join(map(str, obs.shape))} categories of {obs.n} values from {obs.start} on"
    return f"{'an' if obs.kind[0] in 'aeiou' else 'a'} {obs.kind} of shape {obs.shape}"


def _space(action: ActionSpec) -> str:
    """Actions as Gymnasium writes their space."""
    return str(action_space(action))
