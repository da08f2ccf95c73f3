"""From the words of a command line to values: without the Config, so that help is quick."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from longdream.envs.contract import UserError
from longdream.worldmodel.fields import problem

NUMBER = re.compile(r"[-+.0-9][-+.0-9a-zA-Z]{0,38}")
"""What may be a number, of the words of a command line."""
MAX_INTEGER = 2**53
"""No setting is larger: nothing has so many steps, bytes or units."""


def split(arguments: list[str], hint: Callable[[str], Any]) -> tuple[list[str], dict[str, Any] | None]:
    """Words, and values by flag: `--flag value` or `--flag=value`; None for the flags where help is asked for.

    Args:
        hint: the type behind a flag (without its dashes), None for one that takes no value, or a UserError for an
            unknown one.

    Raises:
        UserError: an unknown flag, one without the value that it needs, or a value that cannot be read as YAML where
            that is needed.
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
        if kind is None:
            if equals:
                raise UserError(f"--{flag} takes no value")
            flags[flag] = None
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{flag} needs a value")
            text = rest.pop(0)
        if holds(kind, tuple):  # 2,1 or [2, 1] or several words
            while rest and not rest[0].startswith("--") and not equals:
                text += f",{rest.pop(0)}"
            flags[flag] = [part for part in text.strip("[]()").replace(",", " ").split()]
        else:
            flags[flag] = read_yaml(flag, text) if holds(kind, dict) else text
    return words, flags


def holds(hint: Any, kind: type) -> bool:
    """Whether a type is `kind` of something, or may be."""
    return get_origin(hint) is kind or any(holds(part, kind) for part in get_args(hint))


def read(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, within its range; text is read as what it says.

    Raises:
        UserError: it says something else; the message begins with `name`.
    """
    near = ""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    try:
        if isinstance(value, bool) and plain in (int, float):
            raise ValueError("should be a number")
        parsed = TypeAdapter(hint).validate_python(_numbers(value) if _is_numeric(hint) else value)
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise ValueError("should be a finite number")
        if isinstance(parsed, int) and abs(parsed) > MAX_INTEGER:
            raise ValueError(f"should be at most {MAX_INTEGER}")
        return parsed
    except ValidationError as error:
        message = problem(error)
        near = suggest(str(value), [choice for choice in _choices(hint) if isinstance(choice, str)])
    except ValueError as error:
        message = str(error)
    raise UserError(f"{name} {shown(repr(value))}: {message}{near}")


def _is_numeric(hint: Any) -> bool:
    """Whether a type is of numbers alone, or of tuples of these, or None."""
    parts = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    if parts:
        return all(part in (type(None), ...) or _is_numeric(part) for part in parts)
    return hint in (int, float)


def _numbers(value: Any) -> Any:
    """Words that are numbers in YAML as these, so that `1e3` and `0x1f` are numbers everywhere."""
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    if not isinstance(value, str) or not NUMBER.fullmatch(value):
        return value
    number = parse_yaml(value)
    return number if isinstance(number, int | float) and not isinstance(number, bool) else value


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are those of YAML 1.2 and JSON: `1e-3` is one, `12:30` is not."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$|0x[0-9a-fA-F]+$|0o[0-7]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$|[-+]?(inf|Infinity)$"
    ),
    list("-+.0123456789inI"),
)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_DIGITS:
        raise ValueError(f"a number of {len(node.value)} digits")
    return int(node.value, {"0x": 16, "0o": 8}.get(node.value[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


MAX_DIGITS = 40
MAX_DEPTH = 32
MAX_NODES = 20_000
"""The digits of an integer, how deep YAML may be nested, and of how many values it may consist, those that aliases
repeat included."""


class _Refused(yaml.YAMLError):
    """YAML that would take all time or memory to read, or that says nothing."""


def parse_yaml(text: str) -> Any:
    """What YAML text says.

    Raises:
        yaml.YAMLError: it is none, or it is nested too deeply, refers to itself, or consists of too much.
    """
    try:
        if "\t" in text and _is_json(text):  # in which tabs are spaces; YAML has none in indentation
            text = text.replace("\t", " ")
        _check_size(text)
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (ValueError, OverflowError, RecursionError, TypeError) as error:  # a date or a number that there is not
        raise _Refused(f"{type(error).__name__}: {error}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _check_size(text: str) -> None:
    """Raise YAMLError for text whose values are too many or too deep, before any is built: in one pass."""
    sizes: dict[str, int | None] = {}  # number of values behind an anchor; None while it is not complete
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and number of values before it
    count = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
            if event.anchor:
                sizes[event.anchor] = None
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)  # an unknown one is an error of its own
            if size is None:
                raise _Refused(f"{event.anchor} is part of itself")
            count += size
        if len(open_nodes) > MAX_DEPTH:
            raise _Refused(f"it is nested more than {MAX_DEPTH} deep")
        if count > MAX_NODES:
            raise _Refused(f"it consists of more than {MAX_NODES:,} values")


def read_yaml(flag: str, text: str) -> Any:
    """What the text of a flag says, as YAML.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"--{flag} {shown(text)}: cannot be read; write it like '{{\"corridor\": 36}}'") from None


def shown(text: Any, limit: int = 200) -> str:
    """Text of unknown origin as it may stand in a message: one line, without control characters, not long."""
    line = " ".join(str(text)[: 4 * limit].split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= limit else f"{line[:limit]}..."


def suggest(word: str, known: Any, otherwise: str = "") -> str:
    """': did you mean ...?' with the closest of `known`, else ': otherwise'."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else f": {otherwise}" if otherwise else ""
