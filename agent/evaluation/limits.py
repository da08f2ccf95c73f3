"""How long an evaluation waits for the end of an episode; without torch."""

from __future__ import annotations

from longdream.envs.contract import EnvError

LONGEST_EPISODE = 20_000
"""Steps after which an episode counts as endless, where the environment has no longer time limit."""


def endless(env_id: str, steps: int) -> EnvError:
    """The error of an evaluation that waits for the end of an episode which has gone on for so many steps."""
    return EnvError(
        f"an episode of {env_id} has not ended within {steps:,} steps, and an evaluation plays whole episodes: limit"
        " them with --env.kwargs.max_episode_steps N (a larger N, if they are meant to be longer)"
    )
