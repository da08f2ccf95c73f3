"""Benchmarks: `longdream bench NAME` runs one and prints its results, as quoted in docs/.

Each is a module with a function `measure`. Its parameters are the flags, its docstring the help, and its result the
JSON.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from longdream.agent.cli.functions import call, declared
from longdream.agent.config import flags
from longdream.envs.contract import UserError

BENCHES = {
    "act": "agents.act",
    "attention": "model.attention",
    "controllers": "agents.controllers",
    "dream": "agents.dream",
    "faults": "faults.faults",
    "fidelity": "envs.fidelity",
    "loop": "agents.loop",
    "maze": "envs.maze",
    "memory-maze": "envs.memory_maze",
    "motion": "model.motion",
    "objectives": "model.objectives",
    "play": "agents.play",
    "probe": "model.probe",
    "remote": "envs.remote",
    "scale": "agents.scale",
    "scan": "model.scan",
    "temperature": "agents.temperature",
    "update": "model.update",
    "world-model": "model.world_model",
}
"""Module of each benchmark by name; it is imported when the benchmark is run."""


def find(name: str) -> Callable[..., dict[str, Any]]:
    """The benchmark of that name, a function that prints its results and returns them as JSON values.

    Raises:
        UserError: there is no such benchmark.
    """
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}" + flags.suggest(name, BENCHES, f"there are {', '.join(BENCHES)}"))
    return declared(f"longdream.agent.bench.{BENCHES[name]}", "measure")


def run(arguments: list[str]) -> dict[str, Any] | None:
    """Run `longdream bench NAME ...`. Returns the benchmark's result, or None if help was printed.

    Raises:
        UserError: the name is missing or unknown, or the benchmark does not take these flags.
    """
    if not arguments or arguments[0].startswith("-"):
        print(f"usage: longdream bench {'|'.join(BENCHES)} [--json] [options]\n")
        for name in BENCHES:
            about, *_ = (inspect.getdoc(find(name)) or "").splitlines()
            print(f"  {name:12} {about}")
        if not arguments or arguments[0] not in ("-h", "--help"):
            raise UserError(f"bench what? Name one of {', '.join(BENCHES)}")
        return None
    return call(f"longdream bench {arguments[0]}", find(arguments[0]), arguments[1:])
