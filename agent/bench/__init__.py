"""Benchmarks: `longdream bench NAME` runs one and prints its results, as quoted in docs/.

Each is a module with a function `measure`. Its parameters are the flags, its docstring the help, and its result the
JSON.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from longdream.agent.config import flags
from longdream.envs.contract import UserError

BENCHES = {
    "act": "agents.act",
    "attention": "model.attention",
    "controllers": "agents.controllers",
    "dream": "agents.dream",
    "fidelity": "envs.fidelity",
    "loop": "agents.loop",
    "maze": "envs.maze",
    "memory-maze": "envs.memory_maze",
    "objectives": "model.objectives",
    "remote": "envs.remote",
    "scale": "agents.scale",
    "scan": "model.scan",
    "temperature": "agents.temperature",
    "update": "model.update",
    "world-model": "model.world_model",
}
"""Module of each benchmark by name; imported when it is run."""


def find(name: str) -> Callable[..., dict[str, Any]]:
    """The benchmark of that name, a function that prints its results and returns them as JSON values.

    Raises:
        UserError: there is no such benchmark.
    """
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}" + flags.suggest(name, BENCHES, f"there are {', '.join(BENCHES)}"))
    return import_module(f"longdream.agent.bench.{BENCHES[name]}").measure


def _about(name: str) -> str:
    """The first line of a benchmark's help, from its source: importing all of them takes seconds."""
    source = Path(__file__).parent.joinpath(*BENCHES[name].split(".")).with_suffix(".py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    return inspect.cleandoc(ast.get_docstring(functions["measure"]) or "").partition("\n")[0]


def run(arguments: list[str]) -> dict[str, Any] | None:
    """Run `longdream bench NAME ...`. Returns the benchmark's result, or None if help was printed.

    Raises:
        UserError: the name is missing or unknown, or the benchmark does not take these flags.
    """
    from longdream.agent.cli.functions import call

    if not arguments or arguments[0].startswith("-"):
        print(f"usage: longdream bench {'|'.join(BENCHES)} [--json] [options]\n")
        for name in BENCHES:
            print(f"  {name:12} {_about(name)}")
        if not arguments or arguments[0] not in ("-h", "--help"):
            raise UserError(f"bench what? Name one of {', '.join(BENCHES)}")
        return None
    return call(f"longdream bench {arguments[0]}", find(arguments[0]), arguments[1:])
