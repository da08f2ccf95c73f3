"""Reinforcement-learning agents that learn inside a learned world model with long-term memory.

Importing it registers the project's environments with Gymnasium: `gym.make("longdream/Recall-v0")`.
"""

__version__ = "0.3.0.dev0"

from longdream import envs

__all__ = ["__version__", "envs"]
