"""How one space that is not nested is read: as an image, as categories, as a vector, or as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from longdream.envs.contract import UserError
from longdream.envs.spaces.values import Misfit, described, fitted, shown_space
from longdream.envs.text import SIZE, embed, is_text

WAYS = ("image", "hwc", "chw", "categories", "vector")
"""What `read_as` takes for a key. image: the order of its axes by its shape; hwc, chw: channels last or first."""
SMALLEST_IMAGE = 8
"""Height and width under which an array is no image."""
MOST_CELLS = 1024
"""Cells of a small array of bytes that are read as categories; of more, as a vector."""
MOST_VALUES = 1 << 16
"""Values that an integer may have to be read as a category."""
LIKE_A_PICTURE = 16
"""Height and width from which an array of another type than uint8 is an image, if it has 1, 3 or 4 channels."""


class Leaf(NamedTuple):
    """One key of the flat observation.

    flat: its space: uint8 of shape (H, W, C), `Discrete`, `MultiDiscrete`, `MultiBinary`, or any other Box, a vector.
    convert: from a member of the environment's space, as an array, to one of `flat`; None where they are the same.
    words: how it was read.
    """

    flat: spaces.Space
    words: str
    convert: Callable[[Any], Any] | None = None


def read_leaf(name: str, space: spaces.Space, way: str | None) -> Leaf:
    """How a space is read: as `way` says, or by its type, shape and bounds.

    Raises:
        UserError: it cannot be read at all, or not in that way.
    """
    if way is not None and way not in WAYS:
        raise UserError(f"env.kwargs.read_as.{name} = {way!r}: use one of {', '.join(WAYS)}")
    if is_text(space):
        _refuse(name, space, way)
        return Leaf(_vector(SIZE), "text", embed)
    if isinstance(space, spaces.Discrete):
        if way == "vector":
            return _numbers(space, 1)
        _refuse(name, space, way)
        return Leaf(space, f"one of {space.n}")
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        if way == "vector":
            return _numbers(space, math.prod(space.shape))
        _refuse(name, space, None if way == "categories" else way)
        values = 2 if isinstance(space, spaces.MultiBinary) else int(space.nvec.max(initial=0))
        return Leaf(space, _cells(space.shape, values))
    if not isinstance(space, spaces.Box):
        raise UserError(f"observation {name!r} is a {type(space).__name__} space: {_fix(space)}")
    if 0 in space.shape:
        return Leaf(space, "nothing")  # which contract.py refuses
    way = way or _way(space)
    if way == "vector":
        return _as_vector(space)
    if way == "categories":
        return _as_categories(name, space)
    return _as_image(name, space, way)


def _fix(space: spaces.Space) -> str:
    if isinstance(space, spaces.Graph):
        return "give its nodes and edges as Boxes of a fixed size in a Dict"
    return "use a space of Gymnasium, such as Box or Discrete"


def _refuse(name: str, space: spaces.Space, way: str | None) -> None:
    if way is not None:
        raise UserError(f"env.kwargs.read_as.{name} = {way}: {shown_space(space)} cannot be read so; leave it out")


# -- boxes ------------------------------------------------------------------------------------------------------------


def _way(space: spaces.Box) -> str:
    """How a Box is read where nobody says it."""
    shape = space.shape
    if space.dtype == np.bool_:
        return "categories"
    if space.dtype == np.uint8 and len(shape) > 1:
        if min(_sides(shape)) >= SMALLEST_IMAGE:
            return "image"
        return "categories" if math.prod(shape) <= MOST_CELLS else "vector"
    # stacks of floats, and those of other channels, have always been vectors: runs know them so
    at = _rows_of(shape) if len(shape) == 3 else 0
    channels = shape[2 if at == 0 else 0] if len(shape) == 3 else 0
    picture = channels in (1, 3, 4) and min(_sides(shape)) >= LIKE_A_PICTURE
    return "image" if picture and _bounds(space) is not None else "vector"


def _as_vector(space: spaces.Box) -> Leaf:
    size = math.prod(space.shape)
    if space.dtype == np.bool_ or (space.dtype == np.uint8 and len(space.shape) > 1):
        return _numbers(space, size)
    return Leaf(space, f"a vector of {size}")


def _numbers(space: spaces.Space, size: int) -> Leaf:
    return Leaf(_vector(size), f"a vector of {size}", lambda value: np.asarray(value, np.float32).reshape(size))


def _vector(size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def _as_categories(name: str, space: spaces.Box) -> Leaf:
    shape = space.shape or (1,)
    if space.dtype == np.bool_:
        return Leaf(spaces.MultiBinary(shape), _cells(shape, 2), lambda value: value.astype(np.int8).reshape(shape))
    bounds = _bounds(space)
    values = bounds[1] - bounds[0] + 1 if bounds else math.inf
    if space.dtype.kind == "f" or values > MOST_VALUES:
        raise UserError(
            f"env.kwargs.read_as.{name} = categories: {shown_space(space)} has more than {MOST_VALUES:,} values or no"
            " integers; leave it out, or give the space narrower bounds"
        )
    assert bounds is not None
    lowest = int(bounds[0])
    flat = spaces.MultiDiscrete(np.full(shape, int(values)), start=np.full(shape, lowest))
    return Leaf(flat, _cells(shape, int(values)), lambda value: value.astype(np.int64).reshape(shape))


def _as_image(name: str, space: spaces.Box, way: str) -> Leaf:
    shape = space.shape
    if len(shape) < 2 or (len(shape) < 3 and way != "image"):
        raise UserError(f"env.kwargs.read_as.{name} = {way}: {shown_space(space)} has no two sides; leave it out")
    at = {"hwc": len(shape) - 3, "chw": len(shape) - 2}.get(way, _rows_of(shape))
    height, width = shape[at : at + 2]
    others = [*range(at), *range(at + 2, len(shape))]
    order = (at, at + 1, *others)
    flat_shape = (height, width, math.prod(shape[i] for i in others))
    first = "" if at == 0 or way == "hwc" else ", channels first"
    stack = f", a stack of {' x '.join(str(shape[i]) for i in others[:-1])}" if len(others) > 1 else ""
    words = f"an image of {' x '.join(map(str, flat_shape))}{first}{stack}"
    if space.dtype == np.uint8 and at == 0 and len(shape) <= 3:
        return Leaf(space, words)
    flat = spaces.Box(0, 255, flat_shape, np.uint8)
    bounds = _bounds(space)
    if space.dtype == np.uint8 or bounds == (0, 255):
        return Leaf(flat, words, lambda value: value.transpose(order).reshape(flat_shape).astype(np.uint8, copy=False))
    if bounds is None or bounds[0] >= bounds[1]:
        raise UserError(
            f"env.kwargs.read_as.{name} = {way}: {shown_space(space)} has no bounds that 0 and 255 could stand for;"
            " give it bounds, or read it as a vector"
        )
    low, high = bounds

    def convert(value: np.ndarray) -> np.ndarray:
        scaled = (value.transpose(order).reshape(flat_shape).astype(np.float32) - low) * (255 / (high - low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    return Leaf(flat, f"{words}, {low:g} to {high:g} as 0 to 255", convert)


def _rows_of(shape: tuple[int, ...]) -> int:
    """The axis of an image's rows, which that of its columns follows: those two of which the shorter is longest. Of
    equal ones the first, with channels behind them."""
    return max(range(len(shape) - 1), key=lambda i: (min(shape[i : i + 2]), -i))


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    at = _rows_of(shape)
    return shape[at : at + 2]


def _bounds(space: spaces.Box) -> tuple[float, float] | None:
    """The lowest and the highest bound; None unless both are finite."""
    low = float(space.low.min())
    high = float(space.high.max())
    return (low, high) if max(abs(low), abs(high)) < np.finfo(np.float32).max else None


def _cells(shape: tuple[int, ...], values: int) -> str:
    return f"{' x '.join(map(str, shape))} categories of {values}"


# -- values -----------------------------------------------------------------------------------------------------------


def converted(name: str, value: Any, space: spaces.Space, leaf: Leaf) -> Any:
    """A value of the environment as a member of `leaf.flat`.

    Raises:
        Misfit: it is none of the environment's space.
    """
    if is_text(space):
        if not isinstance(value, str):
            raise Misfit(f"the observation {name!r} = {described(value)}, its space is text: return a str")
        return embed(value)
    array = fitted(name, value, space)
    return array if leaf.convert is None else leaf.convert(array)
