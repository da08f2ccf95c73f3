"""What is played: a run with its agent, environment and replay, or an environment alone."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longdream.agent.config.schema import Device, EnvConfig
from longdream.agent.core.agent import Agent
from longdream.agent.dream_env.starts import Moments, open_replay, replayed_moments
from longdream.agent.evaluation import probes
from longdream.agent.evaluation.policy import check_fit
from longdream.agent.play.keys import Keys
from longdream.agent.play.mind import Mind
from longdream.agent.play.session import Session
from longdream.agent.run.folder import PRETRAINED, Run, fill, fitting
from longdream.envs.contract import EnvError, EnvSpec, UserError
from longdream.envs.make import World
from longdream.envs.meaning import Meaning

RECORDINGS = Path("recordings")
"""Folder of what was recorded of an environment alone, or of an agent that comes with the program."""
STARTS = 64
"""Replayed moments that dreams begin from."""


@dataclass
class Source:
    """What sessions are made of.

    title: for the page. root: the folder that recordings go to. fps: steps per second that the environment means.
    real: whether its environment can be made here; else there are dreams alone. notes: what is missing, in words.
    """

    title: str
    root: Path
    spec: EnvSpec
    env: EnvConfig
    mind: Mind | None
    moments: Moments | None
    keys: Keys
    fps: float
    real: bool
    notes: list[str]
    seed: int = 0
    opened: int = 0

    def session(self) -> Session:
        """A new session, with an environment of its own.

        Raises:
            UserError: the environment cannot be made, or does not fit the agent. EnvError: it failed.
        """
        self.opened += 1
        world = None
        if self.real:
            world = _world(self.env, self.seed)
            if self.mind is not None:
                check_fit(world, self.spec)
        return Session(self.spec, world, self.mind, self.moments, self.seed + 1000 * (self.opened - 1))


def open_source(what: str, run: Run | None, env_kwargs: dict[str, Any] | None, device: Device | None) -> Source:
    """Load what is played: of a run the agent as last saved, moments of its replay, and its environment.

    Where the environment of a run cannot be made here, dreams alone are played; the same without the replay.

    Raises:
        UserError: it cannot be used.
    """
    if run is None:
        env = EnvConfig(id=what, kwargs=env_kwargs or {})
        with closing(_world(env, 0)) as world:
            root = RECORDINGS / re.sub(r"[^\w.-]+", "-", what)
            keys = Keys(world.spec.action, world.meaning())
            return Source(what, root, world.spec, env, None, None, keys, _fps(world), True, [])
    config = run.config
    device = device or ("auto" if config.device == "cuda" else config.device)
    torch.set_num_threads(1)  # a step of one stream is too small to share: threads would mostly wait for each other
    tree, step = run.saved
    with fitting(run.folder, tree):  # one step at a time is not worth compiling
        agent = Agent(replace(config, device=device, compiled=False, cuda_graphs=False), run.spec)
    fill(agent, tree, run.folder, weights_only=True)
    env = replace(config.env, kwargs={**config.env.kwargs, **(env_kwargs or {})})
    notes = []
    meaning = Meaning()
    fps = 8.0
    real = True
    try:
        with closing(_world(env, config.seed)) as world:
            check_fit(world, run.spec)
            meaning = world.meaning()
            fps = _fps(world)
    except (UserError, EnvError) as error:
        real = False
        notes.append(f"dreams only: {error}")
    try:
        replay = open_replay(run)
        with closing(replay):
            moments = replayed_moments(agent, replay, STARTS, min(config.replay.length, replay.longest_clip))
    except UserError as error:
        moments = None
        notes.append(f"no replayed moments: {error}")
    if moments is None and not real:
        raise UserError(f"{run.folder} has neither an environment nor a replay here: {notes[0]}")
    try:
        probe = probes.load(run.folder, agent.model.feature_size, step)
    except UserError as error:
        probe = None
        notes.append(f"no map read out of M's memory: {error}")
    graphed = config.cuda_graphs and agent.device.type == "cuda"
    mind = Mind(agent, probe, graphed)
    title = f"{run.folder.name} in {env.id}"
    keys = Keys(run.spec.action, meaning)
    root = RECORDINGS / run.folder.name if run.folder.parent == PRETRAINED else run.folder
    return Source(title, root, run.spec, env, mind, moments, keys, fps, real, notes, config.seed)


def _world(env: EnvConfig, seed: int) -> World:
    return World(env.id, 1, seed, env.kwargs, "sync", env.timeout_s)


def _fps(world: World) -> float:
    """Steps per second as the environment means them, or 8."""
    given = world.vector.metadata.get("render_fps")
    return float(given) if isinstance(given, int | float) and 0 < given <= 120 else 8.0
