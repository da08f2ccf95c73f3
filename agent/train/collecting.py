"""Which collector, replay and environment a run has, by its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.core.ranks import here
from longdream.agent.data.base import ReplayBuffer
from longdream.agent.data.device_replay import DeviceReplay
from longdream.agent.data.replay import Replay
from longdream.agent.evaluation.policy import check_fit, make_world
from longdream.agent.run import parts
from longdream.agent.run.signals import Signals
from longdream.agent.train.collector import Collector, RowCollector
from longdream.agent.train.collector_process import AsyncCollector, CollectorProcess
from longdream.agent.train.device_collector import DeviceCollector, making_tensors
from longdream.envs.contract import EnvSpec
from longdream.envs.make import World


def open_world(
    config: Config, seed: int, signals: Signals, saved: dict[str, Any] | None = None
) -> World | CollectorProcess:
    """The environment to train in: this rank's copies of it, here or in the process that collects.

    Args:
        config: this rank's share of the run's.
        saved: the checkpoint whose agent goes on in it, if any.

    Raises:
        UserError: it cannot be made, or is not as it was when the checkpoint was saved.
    """
    env = making_tensors(config) if config.replay.keep == "device" else config.env
    first = here().rank * env.copies
    if env.workers != "beside":
        return make_world(World, env, env.copies, seed, signals, saved, first)
    process = CollectorProcess(config, seed, first, here().seed(seed, 0), signals)
    if saved is not None:
        check_fit(process, EnvSpec.from_json(saved["spec"]))
    return process


def open_collector(
    world: World | CollectorProcess, agent: Agent, folder: Path, rng: np.random.Generator, seed: int
) -> tuple[ReplayBuffer, RowCollector]:
    """An empty replay, which the caller closes, and who fills it.

    Args:
        folder: of the run.
        rng: for acting.
        seed: root of the environment's seeds.

    Raises:
        EnvError: the environment failed.
    """
    config = agent.config
    settings = config.replay
    size = (world.spec, world.num_envs, settings.capacity)
    replay: ReplayBuffer
    if settings.keep == "device":
        assert isinstance(world, World)
        replay = DeviceReplay(agent.device, *size, settings.priority)
        collector = DeviceCollector(world, agent, replay, rng, seed)
    else:
        replay = Replay(parts.replay_folder(folder), *size, priority=settings.priority)
        here_or_there = isinstance(world, World)
        collector = Collector(world, agent, replay, rng) if here_or_there else AsyncCollector(world, agent, replay)
    return replay, collector
