"""Reinforcement-learning agents that learn inside a learned world model with long-term memory.

    import longdream as ld

    agent = ld.load("runs/demo")
    obs, _ = agent.make_env().reset(seed=0)
    action, memory = agent.act(obs, agent.reset())
    dream = agent.imagine(memory, horizon=20)

Importing it registers the project's environments with Gymnasium: `gym.make("longdream/Recall-v0")`. It takes a fifth of
a second: what needs torch is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"

from longdream import envs

if TYPE_CHECKING:
    from longdream.agent.dream_env.sb3 import sb3_env
    from longdream.agent.library.export import export_parts
    from longdream.agent.library.functions import config, evaluate, load, train
    from longdream.agent.library.trained import TrainedAgent
    from longdream.agent.library.values import Dream, Memory
    from longdream.envs.contract import UserError

__all__ = [
    "Dream",
    "Memory",
    "TrainedAgent",
    "UserError",
    "__version__",
    "config",
    "envs",
    "evaluate",
    "export_parts",
    "load",
    "sb3_env",
    "train",
]

_HOMES = {
    "Dream": "agent.library.values",
    "Memory": "agent.library.values",
    "TrainedAgent": "agent.library.trained",
    "UserError": "envs.contract",
    "config": "agent.library.functions",
    "evaluate": "agent.library.functions",
    "export_parts": "agent.library.export",
    "load": "agent.library.functions",
    "sb3_env": "agent.dream_env.sb3",
    "train": "agent.library.functions",
}
"""Module of each name that is imported when it is asked for (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"longdream.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
