"""From words to a Config: presets, YAML files and dotted flags, checked so that every mistake is one clear line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from longdream.agent.config.ranges import check
from longdream.agent.config.schema import Config
from longdream.envs.contract import UserError

PRESETS = Path(__file__).resolve().parents[2] / "runs" / "presets"
SHORT = {"env": "env.id", "steps": "learn.steps", "data": "video.data"}
"""Flags that are shorter than the field they set."""


# -- YAML --------------------------------------------------------------------------------------------------------------


def presets() -> dict[str, str]:
    """Name of each preset and its one-line description."""
    return {path.stem: describe(path) for path in sorted(PRESETS.glob("*.yaml"))}


def describe(path: Path) -> str:
    """The comment in the first line of a YAML file."""
    return path.read_text().partition("\n")[0].removeprefix("#").strip()


def load(source: str) -> Config:
    """The Config of a preset, or of a YAML file where `source` ends in .yaml or .yml.

    Raises:
        UserError: no such preset or file, or something in it that is no Config.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{source}: there is no such file" + suggest(source, [str(p) for p in _nearby(path)]))
    else:
        known = presets()
        if source not in known:
            raise UserError(f"unknown preset {source!r}" + suggest(source, known, f"there are {', '.join(known)}"))
        path = PRESETS / f"{source}.yaml"
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is no YAML file: {error}") from None
    if not isinstance(tree or {}, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}: it must map names of settings to values")
    try:
        config = update(Config(), dict(leaves(tree or {})))
        check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _nearby(path: Path) -> list[Path]:
    return [*path.parent.glob("*.y*ml")] if path.parent.is_dir() else []


def dump(config: Config) -> str:
    """YAML that `load` turns into an equal Config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in a nested dict; what a field of type dict holds is one value."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in fields():
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


# -- fields ------------------------------------------------------------------------------------------------------------


@cache
def fields(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name and type of everything that can be set."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        found |= fields(hint, f"{name}.") if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def update(config: Config, settings: dict[str, Any]) -> Config:
    """`config` with other values by dotted name, each checked for its type.

    Raises:
        UserError: an unknown name, or a value that cannot be read as the field's type.
    """
    for name, value in settings.items():
        if name not in fields():
            raise unknown(name)
        config = _replace(config, name.split("."), read(name, value, fields()[name]))
    return config


def _replace(node: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return dataclasses.replace(node, **{head: _replace(getattr(node, head), rest, value) if rest else value})


def read(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; text is read as what it says.

    Raises:
        UserError: it says something else; the message begins with `name`.
    """
    near = ""
    try:
        if isinstance(value, bool) and hint in (int, float):
            raise ValueError("should be a number")
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Input ").partition(", unable")[0]
        near = suggest(str(value), [choice for choice in _choices(hint) if isinstance(choice, str)])
    except ValueError as error:
        problem = str(error)
    raise UserError(f"{name} {value!r}: {problem[:1].lower()}{problem[1:]}{near}")


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


def unknown(name: str, dashes: str = "", also: tuple[str, ...] = ()) -> UserError:
    """The error that says `name` can't be set, with the closest names that can."""
    known = [*fields(), *also]
    same_end = [known_name for known_name in known if known_name.split(".")[-1] == name.split(".")[-1]]
    close = [f"{dashes}{match}" for match in (same_end or difflib.get_close_matches(name, known, n=2, cutoff=0.6))[:3]]
    what = "flag" if dashes else "setting"
    sections = {key.split(".")[0] for key in fields() if "." in key}
    if name in sections:
        inside = ", ".join(f"{dashes}{key}" for key in fields() if key.startswith(f"{name}."))
        return UserError(f"{dashes}{name} is a group of settings: name one of {inside}")
    hint = f"did you mean {' or '.join(close)}?" if close else "longdream train --help lists them all"
    return UserError(f"unknown {what} {dashes}{name}: {hint}")


def suggest(word: str, known: Any, otherwise: str = "") -> str:
    """': did you mean ...?' with the closest of `known`, else ': otherwise'."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else f": {otherwise}" if otherwise else ""


# -- flags -------------------------------------------------------------------------------------------------------------


def split(arguments: list[str], hint: Callable[[str], Any]) -> tuple[list[str], dict[str, Any] | None]:
    """Words, and values by flag: `--flag value` or `--flag=value`; None for the flags where help is asked for.

    Args:
        hint: the type behind a flag (without its dashes), or a UserError for an unknown one.

    Raises:
        UserError: an unknown flag, one without value, or a value that cannot be read as YAML where that is needed.
    """
    words: list[str] = []
    flags: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return [*words, *(word for word in rest if not word.startswith("-"))], None
        if not token.startswith("-"):
            words.append(token)
            continue
        if not token.startswith("--"):
            raise UserError(f"unknown flag {token}: flags have two dashes, such as --seed 3")
        flag, equals, text = token[2:].partition("=")
        kind = hint(flag)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{flag} needs a value")
            text = rest.pop(0)
        if _holds(kind, tuple):  # 2,1 or [2, 1] or several words
            while rest and not rest[0].startswith("--") and not equals:
                text += f",{rest.pop(0)}"
            flags[flag] = [part for part in text.strip("[]()").replace(",", " ").split()]
        else:
            flags[flag] = _yaml(flag, text) if _holds(kind, dict) else text
    return words, flags


def _holds(hint: Any, kind: type) -> bool:
    return get_origin(hint) is kind or any(get_origin(part) is kind for part in get_args(hint))


def hint(flag: str) -> Any:
    """The type behind a flag of `longdream train`, without its dashes.

    Raises:
        UserError: an unknown flag, with the closest ones.
    """
    name, key = _field(flag)
    return Any if key else fields()[name]


def _field(flag: str) -> tuple[str, str]:
    """Dotted name of the field behind a flag, and the key for one entry of a dict (--env.kwargs.corridor)."""
    name = SHORT.get(flag, flag)
    if name in fields():
        return name, ""
    if (plain := name.replace("-", "_")) in fields():
        return plain, ""
    head, _, key = name.rpartition(".")
    if get_origin(fields().get(head)) is not dict:
        raise unknown(flag, "--", tuple(SHORT))
    return head, key


def from_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name from those by flag, checked for their types.

    Raises:
        UserError: a value that cannot be read as the field's type.
    """
    settings: dict[str, Any] = {}
    for flag, value in flags.items():
        name, key = _field(flag)
        value = {**settings.get(name, {}), key: _yaml(flag, value)} if key else value
        settings[name] = read(f"--{flag}", value, fields()[name])
    return settings


def _yaml(flag: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--{flag} {text}: cannot be read; write it like '{{\"corridor\": 36}}'") from None
