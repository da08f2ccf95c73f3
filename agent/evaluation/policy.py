"""What an agent is worth: its returns beside those of chance and of itself without memory."""

from __future__ import annotations

import sys
import time
from contextlib import closing, nullcontext
from typing import Any, TypeVar

import numpy as np

from longdream.agent.config.schema import EnvConfig, EvaluateConfig
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation.rollout import EVALUATION_SEED, Returns, Who, evaluate
from longdream.agent.run.signals import Signals
from longdream.envs.contract import EnvSpec, Row, UserError
from longdream.envs.make import World

W = TypeVar("W", bound=World)


USUAL = EvaluateConfig()

PATIENCE_S = 20.0
"""After so long without a word an evaluation says how far it is."""


class WatchedWorld(World):
    """A world that stops at the next step when a signal came, and says now and then how far it is."""

    signals: Signals | None = None
    playing = ""
    """What is said beside the numbers."""

    def reset(self) -> Row:
        self.steps, self.ended, self.said = 0, 0, time.monotonic()
        return super().reset()

    def step(self, action: np.ndarray) -> Row:
        if self.signals is not None:
            self.signals.check()
        row = super().step(action)
        self.steps += int((~row.is_first).sum())
        self.ended += int((row.terminated | row.truncated).sum())
        if time.monotonic() - self.said > PATIENCE_S:
            print(f"{self.playing}: {self.steps:,} steps, {self.ended} episodes ended", file=sys.stderr)
            self.said = time.monotonic()
        return row


WORDS: dict[Who, str] = {"agent": "the agent", "without_memory": "it without memory", "random": "random actions"}


def play(
    agent: Agent,
    env: EnvConfig,
    episodes: int,
    seed: int,
    who: Who = "agent",
    how: EvaluateConfig = USUAL,
    signals: Signals | None = None,
) -> Returns:
    """Play `episodes` in a world of their own; `how` says how many side by side and whether greedily, a run's `seed`
    gives its evaluation episodes.

    Raises:
        UserError: the environment cannot be made, or is not one that the agent can see and act in.
        EnvError: it failed. Interrupted: a signal came.
    """
    with closing(make_world(WatchedWorld, env, min(how.copies, episodes), seed + EVALUATION_SEED, signals)) as world:
        world.signals, world.playing = signals, f"evaluating {WORDS[who]}, {episodes} episodes"
        if world.spec != agent.spec:
            raise UserError(f"{env.id} does not fit this agent: {_difference(world.spec, agent.spec)}")
        return evaluate(agent, world, episodes, seed, who, how.greedy)


def make_world(kind: type[W], env: EnvConfig, copies: int, seed: int, signals: Signals | None = None) -> W:
    """A world whose processes end when we end them, not when Ctrl-C reaches the whole terminal."""
    with signals.hidden() if signals else nullcontext():
        return kind(env.id, copies, seed, env.kwargs, env.workers, env.timeout_s)


def judge(
    agent: Agent,
    env: EnvConfig,
    episodes: int,
    seed: int,
    how: EvaluateConfig = USUAL,
    signals: Signals | None = None,
) -> dict[str, Any]:
    """The returns of the agent as plain values, and the means of it without long memory and of random actions."""
    found, forgetful, random = (
        play(agent, env, episodes, seed, who, how, signals) for who in ("agent", "without_memory", "random")
    )
    means = {"random_mean": random.return_mean, "without_memory_mean": forgetful.return_mean}
    told = {"env": env.id, "seed": seed, "policy": "greedy" if how.greedy else "drawn"}
    return {**found.to_json(), **means, **told}


def _difference(found: EnvSpec, wanted: EnvSpec) -> str:
    if found.obs.keys() != wanted.obs.keys():
        return f"it shows {', '.join(found.obs)}, the agent knows {', '.join(wanted.obs)}"
    for key, spec in found.obs.items():
        known = wanted.obs[key]
        if spec != known:
            return (
                f"its {key!r} is a {spec.kind} of shape {spec.shape}, the agent knows a {known.kind} of {known.shape}"
            )
    return "its actions are others than those that the agent was trained with"
