"""Functions as commands: parameters without a default are words, the others flags, and the docstring is the help."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from longdream.agent.config import flags
from longdream.envs.contract import UserError

WORDS = {
    "run_folder": "the folder of a run, runs/NAME",
    "out": "a new folder",
    "env": "the name of an environment, ID or module:ID",
    "what": "the folder of a run, runs/NAME, or what --help says",
}
"""What words mean, for the message that one is missing."""


def call(program: str, function: Callable[..., dict[str, Any]], arguments: list[str]) -> dict[str, Any] | None:
    """Call a function with parameters from the command line; None where help was asked for and given.

    A last parameter without a default that is a tuple takes any number of words.

    A parameter `env_kwargs` is the flag `--env.kwargs`, and as it is a dict, `--env.kwargs.corridor 24` is an entry. A
    flag may also be written with the group of settings that it belongs to, as in `longdream train`: `--env.workers`.
    `--no-open` is short for `--open false`.

    Raises:
        UserError: an unknown flag, a missing word, or a value of another type.
    """
    hints = get_type_hints(function)
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if k != "console"}
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    optional = [name for name in parameters if name not in needed]

    def split(flag: str) -> tuple[str, str]:
        """The parameter behind a flag, and the key where it is an entry of a dict."""
        group, _, last = flag.rpartition(".")
        short = group if last == "id" else last  # --env.id is --env, and --env.workers --workers
        for name in (_parameter(flag), _parameter(short)):
            if name in optional:
                return name, ""
        for name in optional:
            if flags.holds(hints[name], dict) and _parameter(flag).startswith(f"{name}_"):
                return name, flag[len(name) + 1 :]
        known = [flag_name(name) for name in optional]
        raise UserError(f"unknown flag --{flag}" + flags.suggest(f"--{flag}", known, f"see {program} --help"))

    def hint(flag: str) -> Any:
        name, key = split(flag)
        return dict[str, Any] if key else hints[name]

    switches = {f"--no-{name}": f"--{name}=false" for name in optional if hints[name] is bool}
    words, given_flags = flags.split([switches.get(argument, argument) for argument in arguments], hint)
    if given_flags is None:
        _help(program, function, parameters)
        return None
    given: dict[str, Any] = {}
    if needed and flags.holds(hints[needed[-1]], tuple):  # takes all words that are left
        name = needed[-1]
        given[name] = flags.read(name, words[len(needed) - 1 :], hints[name])
        words = words[: len(needed) - 1]
        needed = needed[:-1]
    if len(words) < len(needed):
        word = needed[len(words)]
        raise UserError(f"{program} needs {WORDS.get(word, word)}")
    if len(words) > len(needed):
        raise UserError(f"unexpected {words[len(needed)]!r}: see {program} --help")
    given |= {name: flags.read(name, word, hints[name]) for name, word in zip(needed, words, strict=True)}
    for flag, value in given_flags.items():
        name, key = split(flag)
        if key:
            given[name] = {**(given.get(name) or {}), key: value}
        else:
            given[name] = flags.read(f"--{flag}", value, hints[name])
    if not 0 <= (given.get("seed") or 0) < 2**31:  # as Config.seed
        raise UserError(f"--seed {given['seed']}: must be at least 0 and less than 2147483648")
    return function(**given)


def declared(module: str, name: str) -> Callable[..., Any]:
    """A function of a module as its source declares it: signature and docstring. The module is imported when the
    function is called, so that help and mistakes are quick where it imports what takes seconds.

    Names in the signature must be assigned before the function, or be imported from modules that are quick to import.
    """
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    function = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    function.body = function.body[:1]  # the docstring
    needed = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    statements: list[ast.stmt] = [function]
    for statement in reversed(body[: body.index(function)]):
        if isinstance(statement, ast.ImportFrom):  # (the first: annotations are text)
            statement.names = [n for n in statement.names if (n.asname or n.name) in needed or n.name == "annotations"]
            kept = bool(statement.names)
        else:
            assigned = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            kept = any(isinstance(target, ast.Name) and target.id in needed for target in assigned)
        if kept:
            statements.insert(0, statement)
            needed |= _names(statement)
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module(statements, []), spec.origin, "exec"), namespace)

    @functools.wraps(namespace[name])
    def real(**given: Any) -> Any:
        return getattr(import_module(module), name)(**given)

    return real


def _names(statement: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _parameter(flag: str) -> str:
    return flag.replace("-", "_").replace(".", "_")


def flag_name(parameter: str) -> str:
    """The flag of a parameter, with its dashes."""
    return "--" + ("env.kwargs" if parameter == "env_kwargs" else parameter)


def _help(program: str, function: Callable, parameters: dict[str, inspect.Parameter]) -> None:
    """Help from a docstring: what stands before its sections, and its Args beside the flags."""
    about, _, rest = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    descriptions: dict[str, str] = {}
    entry = ""
    for line in rest.partition("\n\n")[0].splitlines():
        if not line.startswith("     "):
            entry, _, line = line.strip().partition(": ")
        for name in entry.split(", "):
            descriptions[name] = f"{descriptions.get(name, '')} {line.strip()}".strip()
    hints = get_type_hints(function)
    words = [
        f"{name.upper()} ..." if flags.holds(hints[name], tuple) else name.upper()
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
    ]
    usage = " ".join(["usage:", program, *words, "[--json] [options]"])
    print(f"{usage}\n\n{about.partition('Returns:')[0].strip()}\n")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty
        flag = name.upper() if required else f"{flag_name(name)} {_kind(hints[name])}"
        default = "" if required or parameter.default in (None, ()) else f" (default: {parameter.default})"
        text = f"  {flag:24} {descriptions.get(name, '')}{default}".rstrip()
        print(textwrap.fill(text, 110, subsequent_indent=" " * 27))


def _kind(hint: Any) -> str:
    """A type in one word."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    inner = [part for part in get_args(hint) if part not in (type(None), ...)]
    if get_origin(hint) is tuple:
        return f"{_kind(inner[0])},..."
    if inner and get_origin(hint) is not dict:
        return _kind(inner[0])
    return getattr(hint, "__name__", "JSON").upper()
