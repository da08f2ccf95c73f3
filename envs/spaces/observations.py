"""Nested observations, read as a flat dict whose keys are the paths to its entries, joined by `/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate

from longdream.envs.contract import UserError
from longdream.envs.spaces.leaves import Leaf, converted, read_leaf
from longdream.envs.spaces.values import Misfit, described, shown_space


class Node(Protocol):
    """A space, nested or not.

    leaves: what is read of it, by name. plain: whether values arrive as they are.
    """

    leaves: dict[str, Leaf]
    plain: bool

    def put(self, value: Any, into: dict[str, Any]) -> None:
        """Put a value's entries into a flat dict. Raises Misfit for a value that is none of the space."""


def read(space: spaces.Space, name: str, read_as: dict[str, Any]) -> Node:
    """How a space is read.

    Args:
        name: of its entry; empty for the observation itself.
        read_as: what the user said, by name; what is used is taken out.

    Raises:
        UserError: it cannot be read, or not as the user said.
    """
    if isinstance(space, spaces.Dict):
        return _Entries(space, {key: key for key in space.spaces}, name, read_as)
    if isinstance(space, spaces.Tuple):
        return _Entries(space, {str(i): i for i in range(len(space.spaces))}, name, read_as)
    if isinstance(space, spaces.Sequence):
        return _Sequence(space, name or "obs", read_as)
    if isinstance(space, spaces.OneOf):
        return _OneOf(space, name or "obs", read_as)
    return One(space, name or "obs", read_as)


def join(prefix: str, key: str) -> str:
    return f"{prefix}/{key}" if prefix else key


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of several nodes. Raises UserError where two have the same name."""
    together: dict[str, Any] = {}
    for part in parts:
        for name, leaf in part.items():
            if name in together:
                raise UserError(f"two entries of the observation are called {name!r}: name one of them otherwise")
            together[name] = leaf
    return together


class One:
    """A space that is not nested."""

    def __init__(self, space: spaces.Space, name: str, read_as: dict[str, Any]) -> None:
        self.space = space
        self.name = name
        self.leaf = read_leaf(name, space, read_as.pop(name, None))
        self.leaves = {name: self.leaf}
        self.plain = self.leaf.convert is None

    def put(self, value: Any, into: dict[str, Any]) -> None:
        into[self.name] = converted(self.name, value, self.space, self.leaf)


class _Entries:
    """A Dict, or a Tuple, whose entries are called 0, 1, ...; names: each with its key in the space."""

    def __init__(
        self, space: spaces.Dict | spaces.Tuple, names: dict[Any, Any], prefix: str, read_as: dict[str, Any]
    ) -> None:
        self.space = space
        self.prefix = prefix
        for key in names:
            if not isinstance(key, str):
                raise UserError(
                    f"the observation Dict has the key {key!r}, a {type(key).__name__}: name its entries by strings,"
                    f" such as {str(key)!r}"
                )
        self.nodes = [(key, read(space[key], join(prefix, name), read_as)) for name, key in names.items()]
        self.leaves = merged(node.leaves for _, node in self.nodes)
        flat = isinstance(space, spaces.Dict) and not prefix
        self.plain = flat and all(isinstance(node, One) and node.plain for _, node in self.nodes)

    def put(self, value: Any, into: dict[str, Any]) -> None:
        wanted = dict if isinstance(self.space, spaces.Dict) else tuple
        which = f" {self.prefix!r}" if self.prefix else ""
        keys = [key for key, _ in self.nodes]
        kind = dict if wanted is dict else (tuple, list)
        if not isinstance(value, kind):
            raise Misfit(
                f"the observation{which} {described(value)}, its space is a {wanted.__name__.title()}: return a"
                f" {wanted.__name__} with {', '.join(map(repr, keys)) if wanted is dict else f'{len(keys)} entries'}"
            )
        if wanted is tuple and len(value) != len(keys):
            raise Misfit(f"the observation{which} with {len(value)} entries, its space has {len(keys)}: return all")
        for key, node in self.nodes:
            if wanted is dict and key not in value:
                raise Misfit(
                    f"an observation without {join(self.prefix, key)!r}: return a dict with"
                    f" {', '.join(map(repr, keys))}"
                )
            node.put(value[key], into)


class _Sequence:
    """Up to `most` members of a space. NAME/length says how many there are, and the leaves of NAME/entry hold all of
    them: images side by side in their channels, vectors and categories along a new first axis. Behind the last there
    are zeros."""

    def __init__(self, space: spaces.Sequence, name: str, read_as: dict[str, Any]) -> None:
        self.space = space
        self.name = name
        self.most = most_entries(name, space, read_as.pop(name, None), "read_as")
        self.entry = read(space.feature_space, join(name, "entry"), read_as)
        length = Leaf(spaces.Discrete(self.most + 1), f"0 to {self.most} entries")
        held = {key: _stacked(leaf, self.most) for key, leaf in self.entry.leaves.items()}
        self.leaves = merged([{join(name, "length"): length}, held])
        self.plain = False

    def put(self, value: Any, into: dict[str, Any]) -> None:
        entries = self._entries(value)
        if len(entries) > self.most:
            raise Misfit(
                f"the observation {self.name!r} with {len(entries)} entries, of which {self.most} are read:"
                f" --env.kwargs.read_as.{self.name} takes a larger number"
            )
        into[join(self.name, "length")] = np.int64(len(entries))
        rows: list[dict[str, Any]] = [{} for _ in entries]
        for entry, row in zip(entries, rows, strict=True):
            self.entry.put(entry, row)
        for key, leaf in self.entry.leaves.items():
            empty = zeros(leaf.flat)
            values = [row[key] for row in rows] + [empty] * (self.most - len(rows))
            if _is_image(leaf.flat):
                depth = [np.reshape(each, (*empty.shape[:2], -1)) for each in values]
                into[key] = np.concatenate(depth, -1)
            else:
                kept = self.leaves[key].flat
                into[key] = np.stack(values).reshape(kept.shape or ()).astype(kept.dtype)

    def _entries(self, value: Any) -> list[Any]:
        if not self.space.stack:
            if isinstance(value, tuple | list):
                return list(value)
        else:
            try:
                count = _count(self.space.feature_space, value)
                return list(iterate(batch_space(self.space.feature_space, count), value)) if count else []
            except Exception:
                pass  # it is no batch of these
        raise Misfit(f"the observation {self.name!r} = {described(value)}, its space is {shown_space(self.space)}")


class _OneOf:
    """One of several spaces. NAME/which says which, and NAME/0, NAME/1, ... hold its value; all others are zeros."""

    def __init__(self, space: spaces.OneOf, name: str, read_as: dict[str, Any]) -> None:
        self.space = space
        self.name = name
        self.nodes = [read(each, join(name, str(i)), read_as) for i, each in enumerate(space.spaces)]
        which = Leaf(spaces.Discrete(len(self.nodes)), f"which of {len(self.nodes)} follows")
        self.leaves = merged([{join(name, "which"): which}, *(node.leaves for node in self.nodes)])
        self.plain = False

    def put(self, value: Any, into: dict[str, Any]) -> None:
        if not isinstance(value, tuple | list) or len(value) != 2 or not 0 <= int(value[0]) < len(self.nodes):
            raise Misfit(f"the observation {self.name!r} = {described(value)}, its space is {shown_space(self.space)}")
        into.update({key: zeros(leaf.flat) for key, leaf in self.leaves.items()})
        into[join(self.name, "which")] = np.int64(value[0])
        self.nodes[int(value[0])].put(value[1], into)


def most_entries(name: str, space: spaces.Space, given: Any, option: str) -> int:
    """The number of entries of a Sequence that `given` says. Raises UserError where it says none."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        said = "" if given is None else f", and {given!r} is no number of entries"
        raise UserError(
            f"{name!r} is a Sequence, of any length{said}: say how many entries it has at most, with"
            f" --env.kwargs.{option}.{name} 16"
        )
    return given


def zeros(space: spaces.Space) -> np.ndarray:
    """What stands where there is no entry: zeros, or the first of the choices."""
    start = getattr(space, "start", 0)
    return np.zeros(space.shape or (), space.dtype) + np.asarray(start, space.dtype)


def _is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1


def _stacked(leaf: Leaf, most: int) -> Leaf:
    """The leaf of `most` such values."""
    space = leaf.flat
    words = f"{most} of {leaf.words}"
    if isinstance(space, spaces.Discrete):
        choices = np.full(most, int(space.n))
        return Leaf(spaces.MultiDiscrete(choices, start=np.full(most, int(space.start))), words)
    if isinstance(space, spaces.MultiDiscrete):
        return Leaf(spaces.MultiDiscrete(np.stack([space.nvec] * most), start=np.stack([space.start] * most)), words)
    if isinstance(space, spaces.MultiBinary):
        return Leaf(spaces.MultiBinary((most, *space.shape)), words)
    assert isinstance(space, spaces.Box)
    if _is_image(space):
        channels = space.shape[2] if len(space.shape) == 3 else 1
        return Leaf(spaces.Box(0, 255, (*space.shape[:2], channels * most), np.uint8), words)
    size = most * int(np.prod(space.shape))
    return Leaf(spaces.Box(-np.inf, np.inf, (size,), np.float32), words)


def _count(space: spaces.Space, value: Any) -> int:
    """The length of a batch of members of a space, as Gymnasium makes it."""
    if isinstance(space, spaces.Dict):
        key = next(iter(space.spaces))
        return _count(space[key], value[key])
    return _count(space[0], value[0]) if isinstance(space, spaces.Tuple) else len(value)
