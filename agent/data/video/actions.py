"""Action encodings that several layouts share."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from longdream.agent.data.video.reader import Condition, Damaged
from longdream.envs.contract import ActionSpec, UserError, env_spec


def discrete(n: int) -> ActionSpec:
    """A choice among n actions, encoded as a one-hot vector."""
    return ActionSpec((n,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"})


def box(n: int) -> ActionSpec:
    """n numbers in [-1, 1]."""
    return ActionSpec((), (-1.0,) * n, (1.0,) * n, {"kind": "box", "start": 0, "shape": [n], "dtype": "float32"})


def one_hots(actions: np.ndarray, row: int, n: int) -> np.ndarray:
    """Encode integer actions `(rows,)` as one-hot vectors, float32 `(rows, n)`.

    Args:
        row: number of the first row in the file, for the error message.

    Raises:
        Damaged: an action is not in 0 to n - 1.
    """
    wrong = np.flatnonzero((actions < 0) | (actions >= n))
    if len(wrong):
        raise Damaged(
            f"has action {actions[wrong[0]]} in row {row + wrong[0]}, which is out of range: there are {n}, 0 to "
            f"{n - 1}"
        )
    return np.eye(n, dtype=np.float32)[actions]


def finite(rewards: np.ndarray, row: int) -> np.ndarray:
    """The rewards of the rows from `row` on, `(n,)`, as float32. Raises Damaged where one is not finite."""
    wrong = np.flatnonzero(~np.isfinite(rewards.astype(np.float32)))
    if len(wrong):
        raise Damaged(f"has reward {rewards[wrong[0]]} in row {row + wrong[0]}")
    return rewards.astype(np.float32)


def of_space(space: spaces.Space) -> ActionSpec:
    """The encoding of an environment's action space."""
    return env_spec(spaces.Discrete(1), space).action


def actions_only(condition: Condition) -> None:
    """Raise UserError if poses are requested from a layout that has none."""
    if condition == "pose":
        raise UserError("video.condition = pose: this layout has no poses; use actions")
