"""Nested actions, read as categorical factors or as numbers in bounds, and made again from these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array

from longdream.envs.contract import UserError
from longdream.envs.spaces.observations import join, most_entries

SCALE = 1.0
"""An unbounded number of an action reaches from -SCALE to SCALE, where nothing else is said."""
VALUES = 11
"""Values, evenly between its bounds, of a number beside choices: C takes choices or numbers, not both."""


MOST_NAMED = 8
"""Choices of one space that are named one by one."""


class Element(NamedTuple):
    """One of `n` choices; or, with n = 0, a number from low to high, which is whole where `whole`."""

    n: int = 0
    low: float = 0.0
    high: float = 0.0
    whole: bool = False


class Node(Protocol):
    """An action space, nested or not.

    parts: what an action consists of. words: how it was read.
    """

    parts: list[Element]
    words: str

    def build(self, values: Iterator[Any]) -> Any:
        """The action of one value of each part: the index of a choice, or a number."""


def read(space: spaces.Space, name: str, act_as: dict[str, Any]) -> Node:
    """How an action space is read.

    Args:
        name: of its entry; empty for the action itself.
        act_as: what the user said, by name; what is used is taken out.

    Raises:
        UserError: it cannot be read, or not as the user said.
    """
    if isinstance(space, spaces.Dict):
        return _Entries({key: read(each, join(name, str(key)), act_as) for key, each in space.spaces.items()}, dict)
    if isinstance(space, spaces.Tuple):
        return _Entries({i: read(each, join(name, str(i)), act_as) for i, each in enumerate(space.spaces)}, tuple)
    name = name or "action"
    if isinstance(space, spaces.OneOf):
        return _OneOf([read(each, join(name, str(i)), act_as) for i, each in enumerate(space.spaces)], name)
    if isinstance(space, spaces.Sequence):
        return _Sequence(space, name, act_as)
    if isinstance(space, spaces.Text):
        return _Text(space, name)
    if isinstance(space, spaces.Box):
        return _Numbers(space, name, act_as)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return _Choices(space, name)
    what = "an action" if name == "action" else f"the action {name!r}"
    raise UserError(f"{what} is a {type(space).__name__} space: use Discrete, MultiDiscrete, MultiBinary or Box")


class _Choices:
    """Discrete, MultiDiscrete or MultiBinary."""

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary, name: str) -> None:
        self.space = space
        binary = isinstance(space, spaces.MultiBinary)
        counts = np.full(space.shape, 2) if binary else np.asarray(getattr(space, "nvec", getattr(space, "n", 0)))
        self.start = np.asarray(getattr(space, "start", 0))
        self.parts = [Element(int(n)) for n in counts.ravel()]
        each = [f"one of {part.n}" for part in self.parts]
        what = " and ".join(each) if len(each) <= MOST_NAMED else f"{len(each)} choices"
        self.words = f"{name}: {len(self.parts)} bits" if binary else f"{name}: {what}"

    def build(self, values: Iterator[Any]) -> Any:
        chosen = np.array([next(values) for _ in self.parts], np.int64).reshape(self.space.shape or ())
        return (chosen + self.start).astype(self.space.dtype)[()]


class _Numbers:
    """A Box. Entries without a bound get one that is twice the stated scale away from the other, or from the scale
    below zero to that above."""

    def __init__(self, space: spaces.Box, name: str, act_as: dict[str, Any]) -> None:
        self.space = space
        dtype = space.dtype
        low = space.low.astype(np.float64).ravel()
        high = space.high.astype(np.float64).ravel()
        most = np.finfo(np.float32).max
        below = low <= -most
        above = high >= most
        self.words = f"{name}: {low.size} number{'s' if low.size > 1 else ''}"
        scale = act_as.pop(name, None)
        if (below | above).any():
            scale = SCALE if scale is None else scale
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < most:
                raise UserError(f"env.kwargs.act_as.{name} = {scale!r}: give the largest size of its numbers, as 2.0")
            centre = np.where(below & above, 0.0, np.where(below, high - scale, low + scale))
            low = np.where(below, centre - scale, low)
            high = np.where(above, centre + scale, high)
            self.words += f", unbounded, as -{scale:g} to {scale:g} (--env.kwargs.act_as.{name} SCALE)"
        elif scale is not None:
            raise UserError(f"env.kwargs.act_as.{name} = {scale!r}: {name!r} has bounds of its own; leave it out")
        self.low = low
        self.high = high
        whole = dtype.kind in "iu"
        binary = dtype.kind == "b"
        self.parts = [Element(2) if binary else Element(0, *pair, whole) for pair in zip(low, high, strict=True)]

    def build(self, values: Iterator[Any]) -> Any:
        numbers = np.array([next(values) for _ in self.parts], np.float64)
        numbers = np.clip(np.rint(numbers) if self.space.dtype.kind in "iu" else numbers, self.low, self.high)
        return numbers.reshape(self.space.shape).astype(self.space.dtype)


class _Text:
    """A text: its length, and a letter for each place."""

    def __init__(self, space: spaces.Text, name: str) -> None:
        self.space = space
        self.letters = space.character_list
        self.parts = [Element(space.max_length - space.min_length + 1)]
        self.parts += [Element(max(1, len(self.letters)))] * space.max_length
        self.words = f"{name}: a text of up to {space.max_length} letters"

    def build(self, values: Iterator[Any]) -> str:
        length = self.space.min_length + int(next(values))
        chosen = [int(next(values)) for _ in range(self.space.max_length)]
        return "".join(self.letters[i] for i in chosen[:length]) if self.letters else ""


class _Entries:
    """A Dict or a Tuple."""

    def __init__(self, nodes: dict[Any, Node], kind: type[dict] | type[tuple]) -> None:
        self.nodes = nodes
        self.kind = kind
        self.parts = [part for node in nodes.values() for part in node.parts]
        self.words = ", ".join(node.words for node in nodes.values())

    def build(self, values: Iterator[Any]) -> Any:
        built = {key: node.build(values) for key, node in self.nodes.items()}
        return built if self.kind is dict else tuple(built.values())


class _OneOf:
    """One of several spaces: which, and an action of each, of which all but one are dropped."""

    def __init__(self, nodes: list[Node], name: str) -> None:
        self.nodes = nodes
        self.parts = [Element(len(nodes)), *(part for node in nodes for part in node.parts)]
        self.words = f"{name}: one of ({', '.join(node.words for node in nodes)})"

    def build(self, values: Iterator[Any]) -> Any:
        which = int(next(values))
        built = [node.build(values) for node in self.nodes]
        return np.int64(which), built[which]


class _Sequence:
    """Up to `most` members of a space: how many, and each of them."""

    def __init__(self, space: spaces.Sequence, name: str, act_as: dict[str, Any]) -> None:
        self.space = space
        self.most = most_entries(name, space, act_as.pop(name, None), "act_as")
        self.entry = read(space.feature_space, join(name, "entry"), act_as)
        self.parts = [Element(self.most + 1), *(self.entry.parts * self.most)]
        self.words = f"{name}: up to {self.most} of ({self.entry.words})"

    def build(self, values: Iterator[Any]) -> Any:
        count = int(next(values))
        entries = tuple([self.entry.build(values) for _ in range(self.most)][:count])
        if not self.space.stack:
            return entries
        feature = self.space.feature_space
        return concatenate(feature, entries, create_empty_array(feature, count))


# -- the flat space ---------------------------------------------------------------------------------------------------


def flat_space(parts: list[Element]) -> spaces.Space:
    """The space of actions with these parts: Discrete or MultiDiscrete where any is a choice, else a Box.

    Raises:
        UserError: there are no parts.
    """
    if not parts:
        raise UserError("the action space is empty: give it at least one value")
    if any(part.n for part in parts):
        counts = [part.n or len(_values(part)) for part in parts]
        return spaces.Discrete(counts[0]) if len(counts) == 1 else spaces.MultiDiscrete(counts)
    low, high = (np.array([getattr(part, name) for part in parts], np.float32) for name in ("low", "high"))
    return spaces.Box(low, high, dtype=np.float32)


def values_of(parts: list[Element], action: Any) -> Iterator[Any]:
    """The value of each part in an action of `flat_space`."""
    choices = any(part.n for part in parts)
    for part, value in zip(parts, np.ravel(action), strict=True):
        yield _values(part)[int(value)] if choices and not part.n else value


def _values(part: Element) -> np.ndarray:
    """The values of a number beside choices."""
    if part.whole and part.high - part.low < VALUES:
        return np.arange(part.low, part.high + 1)
    return np.linspace(part.low, part.high, VALUES)


def is_mixed(parts: list[Element]) -> bool:
    """Whether there are choices and numbers."""
    return 0 < sum(part.n > 0 for part in parts) < len(parts)
