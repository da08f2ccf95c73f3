"""Collecting: the agent acts in the real world, row by row, and what happened goes into replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longdream.agent.core.agent import Agent, Carry
from longdream.agent.data.replay import Replay
from longdream.envs.make import World
from longdream.worldmodel.dynamics import State


class Collector:
    """Steps a world with an agent, measures surprise at every row, fills the replay, and reports ended episodes."""

    def __init__(self, world: World, agent: Agent, replay: Replay, rng: np.random.Generator):
        self.world, self.agent, self.replay, self.rng = world, agent, replay, rng
        self.learn = agent.config.learn
        self.row = world.reset()
        self.carry: Carry = agent.initial(world.num_envs)
        self.running = {k: np.zeros(world.num_envs) for k in ("return", "length", *SURPRISES)}
        self.env_steps = 0
        self.episodes = 0
        self.earned = 0.0

    def take_earned(self) -> float:
        """Rewards over all copies since the last call; those that are not finite left out."""
        earned, self.earned = self.earned, 0.0
        return earned

    def step(self, random: bool) -> list[dict[str, float]]:
        """One step of every copy, by random actions or the agent's; metrics of each episode that ended.

        Steps count what the environment simulated: the row after an episode's end is a reset, not a step.
        """
        row = self.row
        self.carry, surprise = self.agent.observe(self.carry, row)
        assert surprise is not None
        parts = torch.stack([*surprise, surprise.total()]).cpu().numpy()
        parts = np.where(np.isfinite(parts), parts, 0.0).astype(np.float32)  # of a reward that is not finite
        ended = self._account(row, parts)
        action = self.world.random_action(self.rng)
        if self.learn.sticky:
            again = (self.rng.random(self.world.num_envs) < self.learn.sticky) & ~row.is_first
            action = np.where(again[:, None], self.carry.action.cpu().numpy(), action)
        if not random:
            chosen = self.agent.act(self.carry, greedy=False)
            dare = self.rng.random(self.world.num_envs) < self.learn.explore
            action = np.where(dare[:, None], action, chosen)
        self.carry = self.agent.acted(self.carry, action)
        # what an M that has learned nothing did not expect tells nothing
        self.replay.add(row, action, np.zeros_like(parts[-1]) if random else parts[-1])
        self.row = self.world.step(action)
        self.env_steps += int((~self.row.is_first).sum())
        return ended

    def _account(self, row: Any, parts: np.ndarray) -> list[dict[str, float]]:
        ended = []
        self.earned += float(np.nan_to_num(row.reward, nan=0.0, posinf=0.0, neginf=0.0).sum())
        self.running["return"] += row.reward
        self.running["length"] += ~row.is_first
        for name, values in zip(SURPRISES, parts, strict=True):
            self.running[name] += values
        for i in np.flatnonzero(row.terminated | row.truncated):
            length = max(self.running["length"][i], 1)
            episode = {"return": self.running["return"][i], "length": self.running["length"][i]}
            episode |= {name: self.running[name][i] / length for name in SURPRISES}
            ended.append({f"episode/{k}": float(v) for k, v in episode.items()})
            self.episodes += 1
            for values in self.running.values():
                values[i] = 0
        return ended

    def get_state(self) -> dict[str, Any]:
        """What set_state needs to go on exactly (a tree for the checkpoint)."""
        feat, state, action = self.carry
        return {
            "world": self.world.get_state(),
            "carry": {"feat": feat, "state": dict(state._asdict()), "action": action},
            "running": dict(self.running),
            "counters": [self.env_steps, self.episodes],
            "earned": self.earned,
        }

    def set_state(self, tree: dict[str, Any]) -> None:
        """Go on where get_state was called."""
        self.world.set_state(tree["world"])
        assert self.world.row is not None
        self.row = self.world.row
        carry, device = tree["carry"], self.agent.device
        state = State(**carry["state"]).map(lambda t: t.to(device))
        self.carry = Carry(carry["feat"].to(device), state, carry["action"].to(device))
        self.running = {k: np.array(v) for k, v in tree["running"].items()}
        self.env_steps, self.episodes = tree["counters"]
        self.earned = tree.get("earned", 0.0)


SURPRISES = ("surprise_latent", "surprise_reward", "surprise_end", "surprise")
