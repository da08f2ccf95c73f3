"""Measurements that the docs rest on: `longdream bench NAME` makes one and prints what it found.

One file each, with a function `measure`: its parameters are the flags, its docstring the help, its value the JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longdream.agent.bench.agents import act, controllers, dream, loop, temperature
from longdream.agent.bench.envs import fidelity, maze, memory_maze, remote
from longdream.agent.bench.model import attention, objectives, scan, update, world_model
from longdream.agent.config import options
from longdream.envs.contract import UserError

BENCHES: dict[str, Callable[..., dict[str, Any]]] = {
    "act": act.measure,
    "attention": attention.measure,
    "controllers": controllers.measure,
    "dream": dream.measure,
    "fidelity": fidelity.measure,
    "loop": loop.measure,
    "maze": maze.measure,
    "memory-maze": memory_maze.measure,
    "objectives": objectives.measure,
    "remote": remote.measure,
    "scan": scan.measure,
    "temperature": temperature.measure,
    "update": update.measure,
    "world-model": world_model.measure,
}
"""Name and function of each measurement: prints what it found, and returns it as JSON values."""


def find(name: str) -> Callable[..., dict[str, Any]]:
    """The measurement of that name.

    Raises:
        UserError: there is none.
    """
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}" + options.suggest(name, BENCHES, f"there are {', '.join(BENCHES)}"))
    return BENCHES[name]
