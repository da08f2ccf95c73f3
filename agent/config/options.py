"""From settings to a Config: presets, YAML files and dotted names, checked so that every mistake is one clear line."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import yaml

from longdream import __version__ as VERSION
from longdream.agent.config.flags import holds, parse_yaml, read, read_yaml, shown, suggest
from longdream.agent.config.schema import Config, Kind, is_general
from longdream.agent.config.sizes import NAME as SIZE
from longdream.agent.config.sizes import default_size, expanded
from longdream.agent.run.files import kind_of, read_text
from longdream.envs.contract import UserError
from longdream.worldmodel.fields import Mode, OnResume

PRESETS = Path(__file__).resolve().parents[2] / "runs" / "presets"
RECIPE = "recipe"
"""The preset for environments without one of their own."""
SHORT = {"env": "env.id", "steps": "learn.steps", "data": "video.data"}
"""Flags that are shorter than the field they set."""
BARE = {"collect.async": {"env.workers": "beside"}}
"""Flags without a value, and the settings that they stand for."""


# -- YAML --------------------------------------------------------------------------------------------------------------


def presets() -> dict[str, str]:
    """Name of each preset and its one-line description."""
    return {path.stem: describe(path) for path in sorted(PRESETS.glob("*.yaml"))}


def describe(path: Path) -> str:
    """The comment in the first line of a YAML file."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def load(source: str) -> Config:
    """The Config of a preset, or of a YAML file where `source` ends in .yaml or .yml.

    A file may begin with `preset: NAME`: it then changes the settings of that preset instead of the defaults. `size:
    NAME` stands for the settings of a size.

    Raises:
        UserError: no such preset or file, or something in it that is no Config.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            if os.path.lexists(path):
                raise UserError(f"{source} is {kind_of(os.lstat(path).st_mode)}, not a file that can be read")
            raise UserError(f"{source}: there is no such file" + suggest(source, [str(p) for p in _nearby(path)]))
    else:
        known = presets()
        if source not in known:
            raise UserError(f"unknown preset {source!r}" + suggest(source, known, f"there are {', '.join(known)}"))
        path = PRESETS / f"{source}.yaml"
    try:
        tree = parse_yaml(read_text(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {shown(error, 400)}") from None
    if not isinstance(tree or {}, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}: it must map names of settings to values")
    tree = dict(tree or {})
    written_by = tree.pop("version", None)
    if written_by is not None and _minor(str(written_by)) != _minor(VERSION):
        raise UserError(f"{path} was written by longdream {written_by}, this is {VERSION}: use that version to read it")
    base = tree.pop("preset", None)
    if base is not None and base not in presets():
        raise UserError(f"{path}: unknown preset {base!r}" + suggest(str(base), presets()))
    start = Config() if base is None else load(base)
    settings = expanded(dict(leaves(tree)))
    unknown_names = [name for name in settings if entry(name)[0] not in fields()]
    try:
        return update(start, settings)
    except UserError as error:
        old = written_by is None and unknown_names  # files of 0.1 do not say their version
        hint = f"; longdream 0.1 reads the files that it wrote, this is {VERSION}" if old else ""
        raise UserError(f"{path}: {error}{hint}") from None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _nearby(path: Path) -> list[Path]:
    return [*path.parent.glob("*.y*ml")] if path.parent.is_dir() else []


def dump(config: Config) -> str:
    """YAML that `load` turns into an equal Config."""
    return yaml.safe_dump({"version": VERSION} | _plain(dataclasses.asdict(config)), sort_keys=False, width=120)


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


@dataclass(frozen=True)
class Setting:
    """What a field of the Config says of itself. hint: its type and range. kinds: the kinds of runs that it concerns.
    on_resume: whether a run that is resumed may change it."""

    hint: Any
    kinds: tuple[str, ...]
    on_resume: bool


@cache
def fields() -> dict[str, Setting]:
    """Everything that can be set, by dotted name."""
    return dict(_fields(Config, "", get_args(Kind), False))


def _fields(group: type, prefix: str, kinds: tuple[str, ...], on_resume: bool) -> Iterator[tuple[str, Setting]]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        hint = hints[field.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        mine = next((note.kinds for note in notes if isinstance(note, Mode)), kinds)
        mine = tuple(kind for kind in mine if kind in kinds)
        changes = on_resume or any(isinstance(note, OnResume) for note in notes)
        kind = get_args(hint)[0] if notes else hint
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from _fields(cast(type, kind), f"{name}.", mine, changes)
        else:
            yield name, Setting(hint, mine, changes)


def field_value(config: Config, name: str) -> Any:
    """The value of the field with this dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def update(config: Config, settings: dict[str, Any]) -> Config:
    """`config` with other values by dotted name, each checked for its type and range. An entry of a dict may be named
    too (`env.kwargs.corridor`); the others stay. `size` stands for the settings of a size.

    Raises:
        UserError: an unknown name, or a value that cannot be read as the field's type or is out of its range.
    """
    for name, value in expanded(settings).items():
        field, key = entry(name)
        if field not in fields():
            raise unknown(name)
        if key:  # an entry of a dict
            value = {**field_value(config, field), key: value}
        config = _replace(config, field.split("."), read(name, value, fields()[field].hint))
    return config


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """As `update`, for a preset or another run as a start: arguments of an environment or settings of a controller that
    `config` has for another one than `settings` name are dropped."""
    for chosen, kwargs in (("env.id", "env.kwargs"), ("controller.kind", "controller.kwargs")):
        if settings.get(chosen, field_value(config, chosen)) != field_value(config, chosen):
            config = update(config, {kwargs: {}})
    return update(config, settings)


def sized(source: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Where a new run begins and its settings, with those of a size in its place. An environment alone is trained by
    the preset RECIPE, at a size that its observations and the device allow, unless one is named.

    Raises:
        UserError: there is no such size, or the environment cannot be made.
    """
    if source is None and "env.id" in settings and not {"world", "init"} & settings.keys():
        source = RECIPE
    if source == RECIPE and not {SIZE, "worldmodel.width"} & settings.keys():
        settings = {SIZE: default_size(changed(load(RECIPE), settings))} | settings
    return source, expanded(settings)


def setting(name: str) -> Setting:
    """What the field of this dotted name, or the dict field of which it names an entry, says of itself."""
    if name == SIZE:
        return Setting(str, ("online", "video"), on_resume=False)
    field, key = entry(name)
    # a time limit is no part of what the environment shows: it may change, above all where a run has shown the need.
    # How its spaces are read may be said, so that they are read as when the run began, which is checked
    general = field == "env.kwargs" and is_general(key)
    return dataclasses.replace(fields()[field], on_resume=True) if general else fields()[field]


def entry(name: str) -> tuple[str, str]:
    """The field of a dotted name, and the key where that names an entry of a dict: `env.kwargs.corridor`. A key may
    have dots of its own: `env.kwargs.read_as.board`."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        head = ".".join(parts[:i])
        if head in fields() and holds(fields()[head].hint, dict):
            return head, ".".join(parts[i:])
    return name, ""


def _replace(node: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return dataclasses.replace(node, **{head: _replace(getattr(node, head), rest, value) if rest else value})


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


# -- flags -------------------------------------------------------------------------------------------------------------


def hint(flag: str) -> Any:
    """The type behind a flag of `longdream train`, without its dashes; None for one that takes no value.

    Raises:
        UserError: an unknown flag, with the closest ones.
    """
    if flag in BARE:
        return None
    field, key = entry(full_name(flag, "--"))
    return str if field == SIZE else Any if key else fields()[field].hint


def full_name(flag: str, dashes: str = "") -> str:
    """The dotted name behind a flag without its dashes, which may be a short one.

    Raises:
        UserError: an unknown flag, with the closest ones, written with `dashes`.
    """
    name = SHORT.get(flag, flag)
    for candidate in (name, name.replace("-", "_")):
        if entry(candidate)[0] in fields() or candidate == SIZE:
            return candidate
    raise unknown(flag, dashes, (*SHORT, *BARE, SIZE))


def from_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name from those by flag, checked for their types.

    Raises:
        UserError: a value that cannot be read as the field's type.
    """
    settings: dict[str, Any] = {}
    for flag, value in flags.items():
        if flag in BARE:
            settings |= BARE[flag]
            continue
        name = full_name(flag, "--")
        field, key = entry(name)
        hint = str if name == SIZE else fields()[field].hint
        settings[name] = read_yaml(flag, value) if key else read(f"--{flag}", value, hint)
    return settings
