"""What an environment returns, against what its spaces announce."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces


class Misfit(Exception):
    """An observation that its space does not announce. The message names the key, the value and the space."""


def conform(obs: Any, space: spaces.Space, batch: tuple[int, ...] = ()) -> Any:
    """An observation as arrays of the shapes and types of its space: `Box`, `Discrete`, `MultiDiscrete`, `MultiBinary`,
    or a flat `Dict` of these.

    Types are converted within their kind, as numpy's "same_kind" does, where no integer changes.

    Args:
        batch: shape before that of the space: `(n,)` for observations of a vector environment.

    Raises:
        Misfit: a key is missing, a shape or type does not fit, or an integer is outside the space.
    """
    if not isinstance(space, spaces.Dict):
        return fitted("obs", obs, space, batch)
    if not isinstance(obs, dict):
        raise Misfit(f"an observation {described(obs)}, its space is a Dict: return a dict with {_names(space)}")
    missing = [key for key in space.spaces if key not in obs]
    if missing:
        raise Misfit(f"an observation without {missing[0]!r}: return a dict with {_names(space)}")
    return {key: fitted(key, obs[key], part, batch) for key, part in space.spaces.items()}


def fitted(key: str, value: Any, space: spaces.Space, batch: tuple[int, ...] = ()) -> np.ndarray:
    """One value in the shape and type of its space. Arguments, but for the value's name, and errors as `conform`."""
    shape = (*batch, *(space.shape or ()))
    dtype = space.dtype
    array = as_array(value)
    if array.shape != shape or dtype is None or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise Misfit(
            f"the observation {key!r} as {array.dtype} of shape {array.shape}, its space is {shown_space(space)}: make"
            " one fit the other"
        )
    limits = _limits(space)
    if limits is not None:
        lowest, highest = limits
        outside = (array < lowest) | (array > highest)
        if outside.any():
            raise Misfit(
                f"the observation {key!r} = {array[outside].flat[0].item()}, its space is {shown_space(space)}, which"
                f" has {np.min(lowest)} to {np.max(highest)}: make one fit the other"
            )
    if array.dtype == dtype:
        return array
    converted = array.astype(dtype)
    if array.dtype.kind in "iu" and converted.dtype.kind in "iu" and (converted != array).any():
        bounds = np.iinfo(converted.dtype)
        other = array[(array < bounds.min) | (array > bounds.max)].flat[0].item()
        raise Misfit(
            f"the observation {key!r} = {other} as {array.dtype}, its space is {shown_space(space)}: make one fit the"
            " other"
        )
    return converted


def _limits(space: spaces.Space) -> tuple[Any, Any] | None:
    """The lowest and the highest member of a space of integers that are choices; None of any other."""
    if isinstance(space, spaces.Discrete):
        return int(space.start), int(space.start) + int(space.n) - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return (0, 1) if isinstance(space, spaces.MultiBinary) else None


def as_array(value: Any) -> np.ndarray:
    """`value` as an array; one of objects where numpy cannot make another (lists of unequal lengths, tensors that
    need gradients)."""
    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(value)
    except Exception:
        array = np.empty((), object)
        array[()] = value
        return array


def shown_space(space: spaces.Space) -> str:
    """A space in one short line: the bounds of a Box may fill a page."""
    return (
        " ".join(str(space).split())
        if len(str(space)) < 200
        else f"{type(space).__name__}({space.shape}, {space.dtype})"
    )


def _names(space: spaces.Dict) -> str:
    return ", ".join(map(repr, space.spaces))


def described(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its __repr__ raises
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:120]}..."
