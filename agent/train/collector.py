"""Collecting experience: the agent acts in the real environment, and its rows go into the replay."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from longdream.agent.core.actor import Actor, Carry
from longdream.envs.contract import Row, check_form
from longdream.envs.make import World
from longdream.worldmodel.dynamics import State

SURPRISES = ("surprise_latent", "surprise_reward", "surprise_end", "surprise")
"""Metrics of an episode's mean surprise: its three parts and their sum."""
EPISODE = tuple(f"episode/{name}" for name in ("return", "length", *SURPRISES))
"""Metrics of an episode that ended."""


class RowCollector(Protocol):
    """What a trainer asks of whoever collects experience.

    env_steps: steps that the environment has simulated, over all copies. episodes: how many have ended.
    """

    env_steps: int
    episodes: int

    def step(self, random: bool) -> list[dict[str, float]]:
        """One step of every copy, by random actions or the agent's; metrics of each episode that ended.

        The row after the end of an episode is a reset and is not counted as a step.
        """
        ...

    def take_reward(self) -> float:
        """Rewards over all copies since the last call, without those that are not finite."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """What is to be said of collecting since the last call."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on, for a checkpoint."""
        ...

    def set_state(self, tree: dict[str, Any]) -> None: ...


class Rows(Protocol):
    """What rows are collected into: a `Replay`, or the process that has one."""

    def add(self, row: Row, action: np.ndarray, surprise: np.ndarray) -> None:
        """Append a row per copy, with the encoded action `(n, A)` that was chosen from it and its surprise `(n,)`."""
        ...


class Collector:
    """A `RowCollector` for any environment, whose rows are arrays on the host.

    Args:
        replay: takes the rows.
    """

    def __init__(self, world: World, agent: Actor, replay: Rows, rng: np.random.Generator):
        self.world = world
        self.agent = agent
        self.replay = replay
        self.rng = rng
        self.sticky = stickiness(agent.config.learn.sticky, world.num_envs)
        self.row = world.reset()
        self.carry: Carry = agent.initial(world.num_envs)
        self.running = {key: np.zeros(world.num_envs) for key in ("return", "length", *SURPRISES)}
        self.env_steps = 0
        self.episodes = 0
        self.reward = 0.0

    def take_reward(self) -> float:
        reward = self.reward
        self.reward = 0.0
        return reward

    def take_metrics(self) -> dict[str, float]:
        return {}

    def step(self, random: bool) -> list[dict[str, float]]:
        row = self.row
        self.carry, surprise = self.agent.observe(self.carry, row)
        assert surprise is not None
        surprises = torch.stack([*surprise, surprise.total()]).cpu().numpy()
        # a reward that is not finite gives a surprise that is not
        surprises = np.where(np.isfinite(surprises), surprises, 0.0).astype(np.float32)
        ended = self._account(row, surprises)
        action = self._action(row, random)
        self.carry = self.agent.acted(self.carry, action)
        # the surprise of an M that has not learned anything is no priority
        self.replay.add(row, action, np.zeros_like(surprises[-1]) if random else surprises[-1])
        self.row = self.world.step(action)
        self.env_steps += int((~self.row.is_first).sum())
        return ended

    def _action(self, row: Row, random: bool) -> np.ndarray:
        """Encoded actions `(n, A)`: random ones, or the agent's with `learn.explore` random ones among them."""
        learn = self.agent.config.learn
        action = self.world.random_action(self.rng)
        if learn.sticky:
            again = (self.rng.random(self.world.num_envs) < self.sticky) & ~row.is_first
            action = np.where(again[:, None], self.carry.action.cpu().numpy(), action)
        if not random:
            chosen = self.agent.act(self.carry, greedy=False)
            explore = self.rng.random(self.world.num_envs) < learn.explore
            action = np.where(explore[:, None], action, chosen)
        return action

    def _account(self, row: Row, surprises: np.ndarray) -> list[dict[str, float]]:
        """Add a row to the sums of the running episodes; metrics of those that ended with it."""
        ended = []
        self.reward += float(np.nan_to_num(row.reward, nan=0.0, posinf=0.0, neginf=0.0).sum())
        self.running["return"] += row.reward
        self.running["length"] += ~row.is_first
        for name, values in zip(SURPRISES, surprises, strict=True):
            self.running[name] += values
        for i in np.flatnonzero(row.terminated | row.truncated):
            length = max(self.running["length"][i], 1)
            episode = {"return": self.running["return"][i], "length": self.running["length"][i]}
            episode |= {name: self.running[name][i] / length for name in SURPRISES}
            ended.append({f"episode/{key}": float(value) for key, value in episode.items()})
            self.episodes += 1
            for values in self.running.values():
                values[i] = 0
        return ended

    def get_state(self) -> dict[str, Any]:
        return {
            "world": self.world.get_state(),
            "carry": carry_to_tree(self.carry),
            "running": dict(self.running),
            "counters": [self.env_steps, self.episodes],
            "reward": self.reward,
        }

    def set_state(self, tree: dict[str, Any]) -> None:
        mine = {key: value for key, value in self.get_state().items() if key != "world"}
        check_form({key: tree[key] for key in mine}, mine, "collector")
        self.world.set_state(tree["world"])
        assert self.world.row is not None
        self.row = self.world.row
        self.carry = carry_from_tree(tree["carry"], self.agent.device)
        self.running = {key: np.array(value) for key, value in tree["running"].items()}
        self.env_steps, self.episodes = tree["counters"]
        self.reward = tree["reward"]


def stickiness(most: float, copies: int) -> np.ndarray:
    """Probabilities `(copies,)` that a random action of each copy repeats the one before, evenly between 0 and `most`:
    some environments need long walks, and in others they end an episode at once."""
    return most * (0.5 + np.arange(copies)) / copies


def carry_to_tree(carry: Carry) -> dict[str, Any]:
    """The carry as a tree of tensors for a checkpoint."""
    return {"feat": carry.feat, "state": dict(carry.state._asdict()), "action": carry.action}


def carry_from_tree(tree: dict[str, Any], device: torch.device) -> Carry:
    """The carry that `carry_to_tree` made a tree of, on `device`."""
    state = State(**tree["state"]).map(lambda tensor: tensor.to(device))
    return Carry(tree["feat"].to(device), state, tree["action"].to(device))
