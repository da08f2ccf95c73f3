"""Rollouts of complete real episodes, and unbiased statistics of their returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from longdream.agent.core.agent import Agent
from longdream.agent.core.device import own_randomness
from longdream.envs.contract import EnvError
from longdream.envs.make import World

EVALUATION_SEED = 1_000_003
"""Added to a run's seed, so that evaluation episodes differ from those of training."""
LONGEST_EPISODE = 20_000
"""Steps after which an episode counts as endless, where the environment has no longer time limit."""


@dataclass(frozen=True)
class Returns:
    """Returns of n episodes: mean, standard deviation, and the 95% confidence interval of the mean (normal
    approximation)."""

    return_mean: float
    return_std: float
    return_ci95: tuple[float, float]
    episodes: int
    length_mean: float
    env_steps: int

    @classmethod
    def of(cls, returns: np.ndarray, lengths: np.ndarray) -> Returns:
        mean = float(returns.mean())
        std = float(returns.std(ddof=1)) if len(returns) > 1 else 0.0
        half = 1.96 * std / len(returns) ** 0.5
        steps = int(lengths.sum())
        return cls(mean, std, (mean - half, mean + half), len(returns), float(lengths.mean()), steps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"return_ci95": list(self.return_ci95)}


def endless(env_id: str, steps: int) -> EnvError:
    """The error of an evaluation that waits for the end of an episode which has gone on for so many steps."""
    return EnvError(
        f"an episode of {env_id} has not ended within {steps:,} steps, and an evaluation plays whole episodes: limit"
        " them with --env.kwargs.max_episode_steps N (a larger N, if they are meant to be longer)"
    )


Who = Literal["agent", "without_memory", "random"]


def rollout(agent: Agent, world: World, episodes: int, seed: int, who: Who = "agent", greedy: bool = True) -> Returns:
    """Play `episodes` complete episodes in a new world, and compute statistics of their returns.

    The number of episodes of each copy is fixed in advance, so that short episodes are not overrepresented.

    Args:
        who: the agent; the agent with M's long memory erased before every step; or uniform random actions.
        greedy: whether the agent takes its most probable actions instead of sampling them.

    Raises:
        EnvError: the environment failed, or an episode does not end.
    """
    rng = np.random.default_rng(seed)
    quota = np.array([episodes // world.num_envs + (i < episodes % world.num_envs) for i in range(world.num_envs)])
    done = np.zeros_like(quota)
    returns = []
    lengths = []
    total = np.zeros(world.num_envs)
    length = np.zeros(world.num_envs)
    patience = max(LONGEST_EPISODE, world.max_episode_steps)
    with own_randomness(seed, agent.device):
        row = world.reset()
        carry = agent.initial(world.num_envs)
        while (done < quota).any():
            total += row.reward
            length += ~row.is_first
            for i in np.flatnonzero(row.terminated | row.truncated):
                if done[i] < quota[i]:
                    returns.append(total[i])
                    lengths.append(length[i])
                done[i] += 1
                total[i] = length[i] = 0
            if length[done < quota].max(initial=0) >= patience:
                raise endless(world.env_id, patience)
            if who == "random":
                action = world.random_action(rng)
            else:
                if who == "without_memory":
                    carry = carry._replace(state=carry.state.without_long_memory())
                carry, _ = agent.observe(carry, row, measure=False)
                action = agent.act(carry, greedy)
                carry = agent.acted(carry, action)
            row = world.step(action)
    return Returns.of(np.array(returns), np.array(lengths))
