"""Reinforcement-learning agents that learn inside a learned world model with long-term memory.

Importing it registers the project's environments with Gymnasium: `gym.make("longdream/Recall-v0")`.
`longdream.sb3_env(run, num_envs)` gives the dreams of a run to Stable-Baselines3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"

from longdream import envs

if TYPE_CHECKING:
    from longdream.agent.dream_env.sb3 import sb3_env

__all__ = ["__version__", "envs", "sb3_env"]


def __getattr__(name: str) -> Any:
    """`sb3_env`, imported when it is asked for: it brings torch, and importing the package stays quick."""
    if name == "sb3_env":
        from longdream.agent.dream_env.sb3 import sb3_env

        return sb3_env
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
