"""Rollouts of complete real episodes, and unbiased statistics of their returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from longdream.agent.core.agent import Agent
from longdream.agent.core.device import own_randomness
from longdream.agent.evaluation.limits import LONGEST_EPISODE, endless
from longdream.envs.make import World

EVALUATION_SEED = 1_000_003
"""Added to a run's seed, so that evaluation episodes differ from those of training."""


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


class Episodes(NamedTuple):
    """Returns and lengths of n episodes, each `(n,)`."""

    returns: np.ndarray
    lengths: np.ndarray


Who = Literal["agent", "random"]


def play_episodes(
    agent: Agent,
    world: World,
    episodes: int,
    seed: int,
    who: Who = "agent",
    greedy: bool = True,
    forget_every: int = 0,
    copies: int | None = None,
) -> Episodes:
    """Play complete episodes in a new world.

    The number of episodes of each copy is fixed in advance, so that short episodes are not overrepresented.

    Args:
        episodes: of all copies together. copies: how many these are, where the world has only some of them (None: the
            world's).
        who: the agent, or uniform random actions.
        greedy: whether the agent takes its most probable actions instead of sampling them.
        forget_every: M's long memory is erased before every so many steps, counted from the first row. 0: never.

    Raises:
        EnvError: the environment failed, or an episode does not end.
    """
    rng = np.random.default_rng((seed, world.first) if world.first else seed)
    copies = copies or world.num_envs
    numbers = world.first + np.arange(world.num_envs)
    quota = episodes // copies + (numbers < episodes % copies)
    done = np.zeros_like(quota)
    returns = []
    lengths = []
    total = np.zeros(world.num_envs)
    length = np.zeros(world.num_envs)
    most_steps = max(LONGEST_EPISODE, world.max_episode_steps)
    with own_randomness(seed, agent.device):
        row = world.reset()
        carry = agent.initial(world.num_envs)
        rows = 0
        while (done < quota).any():
            total += row.reward
            length += ~row.is_first
            for i in np.flatnonzero(row.terminated | row.truncated):
                if done[i] < quota[i]:
                    returns.append(total[i])
                    lengths.append(length[i])
                done[i] += 1
                total[i] = length[i] = 0
            if length[done < quota].max(initial=0) >= most_steps:
                raise endless(world.env_id, most_steps)
            if who == "random":
                action = world.random_action(rng)
            else:
                if forget_every and rows % forget_every == 0:
                    carry = carry._replace(state=carry.state.without_long_memory())
                carry, _ = agent.observe(carry, row, measure=False)
                action = agent.act(carry, greedy)
                carry = agent.acted(carry, action)
            row = world.step(action)
            rows += 1
    return Episodes(np.array(returns), np.array(lengths))
