"""What an environment says of its actions: their names, and the keys that people press for them."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple


class Meaning(NamedTuple):
    """What an environment tells of its discrete actions, which count from 0 here; empty where it tells nothing.

    names: of each action, in order. keys: each action by the keys that are pressed together for it, as Gymnasium's
    `get_keys_to_action` has them: one letter per key.
    """

    names: tuple[str, ...] = ()
    keys: tuple[tuple[tuple[str, ...], int], ...] = ()


def meaning_of(env: Any) -> Meaning:
    """The meaning of the actions of an environment or vector environment.

    Names are its `action_names` (this project's and Crafter's), `get_action_meanings()` (Atari) or the members of its
    enum `actions` (MiniGrid). Keys are those of `get_keys_to_action()`. What is there and is of another form counts as
    not there: environments may use these names for something else.
    """
    return Meaning(_names(env), _keys(env))


def _names(env: Any) -> tuple[str, ...]:
    names = _attribute(env, "action_names")
    if names is None and callable(method := _attribute(env, "get_action_meanings")):
        names = _called(method)
    if names is None and isinstance(kind := _attribute(env, "actions"), type) and issubclass(kind, Enum):
        names = [member.name for member in sorted(kind, key=lambda member: member.value)]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(name.replace("_", " ").lower() for name in names)


def _keys(env: Any) -> tuple[tuple[tuple[str, ...], int], ...]:
    method = _attribute(env, "get_keys_to_action")
    table = _called(method) if callable(method) else None
    if not isinstance(table, dict):
        return ()
    entries = []
    for pressed, action in table.items():
        parts = tuple(pressed) if isinstance(pressed, str | tuple | list | frozenset) else (pressed,)
        letters = tuple(chr(part) if isinstance(part, int) and 0 < part < 0x110000 else part for part in parts)
        if not all(isinstance(letter, str) for letter in letters):
            return ()
        try:
            entries.append((letters, int(action)))
        except (TypeError, ValueError):
            return ()
    return tuple(entries)


def _attribute(env: Any, name: str) -> Any:
    """Of the environment itself or of one that it wraps; None where there is none."""
    for holder in (env, getattr(env, "unwrapped", None)):
        try:
            if holder is not None and (value := getattr(holder, name, None)) is not None:
                return value
        except Exception:  # a property that raises
            continue
    return None


def _called(method: Any) -> Any:
    try:
        return method()
    except Exception:  # it needs arguments, or is about something else
        return None
