"""Collecting experience where M learns, from an environment that makes tensors: see agent/data/device_replay.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longdream.agent.config.schema import Config, EnvConfig
from longdream.agent.core.actor import Actor, Carry
from longdream.agent.core.agent import Agent
from longdream.agent.core.cuda_graphs import Graphed
from longdream.agent.core.device import HostCopy, resolve_device
from longdream.agent.data.device_replay import DeviceReplay, DeviceRow
from longdream.agent.train.collector import SURPRISES, carry_from_tree, carry_to_tree, stickiness
from longdream.controller.types import Planning
from longdream.envs.contract import UserError
from longdream.envs.make import World, derive_seed, makes_tensors, vector_takes


class DeviceCollector:
    """A `RowCollector` for an environment that makes tensors.

    On CUDA a copy of the agent acts, in a stream of its own, while the update that follows runs: it has the weights
    that the agent had when the step began, and its row is sampled from the next update on. Per step the host sees
    nothing but the flags of episodes that ended.
    """

    def __init__(self, world: World, agent: Agent, replay: DeviceReplay, rng: np.random.Generator, seed: int):
        self.vector: Any = world.vector
        self.world = world
        self.agent = agent
        self.replay = replay
        n = world.num_envs
        device = agent.device
        self.random = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        obs = self.vector.reset_tensors([derive_seed(seed, world.first + i, 0) for i in range(n)])
        no = torch.zeros(n, dtype=torch.bool, device=device)
        self.row = DeviceRow(self._pack(obs), ~no, no.float(), no, no)
        self.sticky = torch.from_numpy(stickiness(agent.config.learn.sticky, n)).float().to(device)
        self.over = HostCopy(no)
        """Whether an episode ended with the row, on its way to the host."""
        self.carry: Carry = agent.initial(n)
        # return, length and the parts of surprise of the running episodes
        self.running = torch.zeros(2 + len(SURPRISES), n, device=device)
        self.env_steps = 0
        self.episodes = 0
        self.reward = torch.zeros((), dtype=torch.float64, device=device)
        self.actor: Actor = agent
        self.stream: torch.cuda.Stream | None = None
        self.take_in: Callable[[Carry, DeviceRow], tuple[Carry, Tensor, Tensor]] = self._take_in
        if agent.capturable and not isinstance(agent.controller, Planning):  # plans branch on values
            self.actor = agent.copy()
            self.stream = torch.cuda.Stream(device, priority=-1)
            self.take_in = Graphed(self._take_in)
            replay.adding = 1

    def take_reward(self) -> float:
        with self._in_stream():
            reward = float(self.reward)
            self.reward.zero_()
        return reward

    def take_metrics(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def step(self, random: bool) -> list[dict[str, float]]:
        over = self.over.read().numpy()
        self._keep_apart(random)
        with self._in_stream():
            self._step(random)
            ended = self._ended(over)
        self.env_steps += int((~over).sum())  # the row after an end is a reset
        return ended

    def _step(self, random: bool) -> None:
        row = self.row
        if random:  # M has learned nothing yet: it need not look, and its surprise is no priority
            surprises = torch.zeros_like(self.running[2:])
            chosen = torch.zeros_like(row.reward, dtype=torch.long)
        else:
            self.carry, surprises, chosen = self.take_in(self.carry, row)
        account = torch.cat([torch.stack([row.reward, (~row.is_first).float()]), surprises])
        account = torch.nan_to_num(account, 0.0, 0.0, 0.0)
        self.running += account
        self.reward += account[0].sum()
        choice = self._choice(row, chosen, random)
        action = torch.nn.functional.one_hot(choice, self.agent.spec.action.parts[0]).float()
        self.carry = self.carry._replace(action=action)
        self.replay.add(row, action, account[-1])
        over = row.terminated | row.truncated
        obs, reward, terminated, truncated = self.vector.step_tensors(choice)
        self.row = DeviceRow(self._pack(obs), over, reward, terminated, truncated)
        self.over = HostCopy(terminated | truncated)

    def _keep_apart(self, random: bool) -> None:
        """The copy acts with the weights of now, and neither they nor rows that are being sampled change meanwhile."""
        if self.stream is not None:
            learning = torch.cuda.current_stream()
            learning.wait_stream(self.stream)
            if not random:
                self.actor.follow()
            self.stream.wait_stream(learning)

    def _in_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _choice(self, row: DeviceRow, chosen: Tensor, random: bool) -> Tensor:
        """Actions `(n,)`: random ones, or the agent's with `learn.explore` random ones among them."""
        learn = self.agent.config.learn
        n = self.world.num_envs
        device = self.agent.device
        choice = torch.randint(self.agent.spec.action.parts[0], (n,), device=device, generator=self.random)
        if learn.sticky:
            again = torch.rand(n, device=device, generator=self.random) < self.sticky
            choice = torch.where(again & ~row.is_first, self.carry.action.argmax(-1), choice)
        if not random:
            explore = torch.rand(n, device=device, generator=self.random) < learn.explore
            choice = torch.where(explore, choice, chosen)
        return choice

    def _take_in(self, carry: Carry, row: DeviceRow) -> tuple[Carry, Tensor, Tensor]:
        """The carry after the row; its surprises `(parts, n)`; the agent's actions `(n,)`."""
        carry, surprise = self.actor.observe(carry, row)
        assert surprise is not None
        return carry, torch.stack([*surprise, surprise.total()]), self.actor.choose(carry, False).argmax(-1)

    def _pack(self, obs: Any) -> dict[str, Tensor]:
        return dict(obs) if isinstance(obs, dict) else {next(iter(self.agent.spec.obs)): obs}

    def _ended(self, over: np.ndarray) -> list[dict[str, float]]:
        which = np.flatnonzero(over)
        if not which.size:
            return []
        at = torch.from_numpy(which).to(self.agent.device)
        total, length, *surprises = self.running[:, at].cpu().numpy()
        self.running[:, at] = 0
        self.episodes += len(which)
        means = dict(zip(SURPRISES, surprises / np.maximum(length, 1), strict=True))
        columns = {"return": total, "length": length, **means}
        return [{f"episode/{key}": float(value[i]) for key, value in columns.items()} for i in range(len(which))]

    def get_state(self) -> dict[str, Any]:
        if self.stream is not None:
            self.stream.synchronize()
        return {
            "world": self.vector.get_state(),
            "row": {"obs": dict(self.row.obs), **{key: getattr(self.row, key) for key in DeviceRow._fields[1:]}},
            "carry": carry_to_tree(self.carry),
            "running": self.running,
            "random": self.random.get_state(),
            "counters": [self.env_steps, self.episodes],
            "reward": float(self.reward),
        }

    def set_state(self, tree: dict[str, Any]) -> None:
        device = self.agent.device
        self.vector.set_state(tree["world"])
        flags = {key: value.to(device) for key, value in tree["row"].items() if key != "obs"}
        self.row = DeviceRow({key: value.to(device) for key, value in tree["row"]["obs"].items()}, **flags)
        self.carry = carry_from_tree(tree["carry"], device)
        self.running = tree["running"].to(device)
        self.over = HostCopy(self.row.terminated | self.row.truncated)
        self.random.set_state(tree["random"].cpu())
        self.env_steps, self.episodes = tree["counters"]
        self.reward.fill_(tree["reward"])


def making_tensors(config: Config) -> EnvConfig:
    """The environment, told on which device to make its tensors and, if it can, to let episodes end at different times:
    where all copies are of one age, so is what is learned from.

    Raises:
        UserError: it makes none.
    """
    env = config.env
    if not makes_tensors(env.id):
        raise UserError(
            f"{env.id} makes no tensors: keep the replay on disk (replay.keep = disk), or train on an "
            f"environment that does, like longdream/FastMemoryMaze-9x9-v0"
        )
    kwargs: dict[str, Any] = {"device": resolve_device(config.device)}
    if vector_takes(env.id, "stagger"):
        kwargs["stagger"] = True
    return replace(env, kwargs=kwargs | env.kwargs)
