"""Forms of actions that several layouts share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gymnasium import spaces

from longdream.agent.data.video.reader import Condition
from longdream.envs.contract import ActionSpec, UserError, env_spec


def discrete(n: int) -> ActionSpec:
    """One of n actions, encoded as a one-hot."""
    return ActionSpec((n,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"})


def box(n: int) -> ActionSpec:
    """n numbers in [-1, 1]."""
    return ActionSpec((), (-1.0,) * n, (1.0,) * n, {"kind": "box", "start": 0, "shape": [n], "dtype": "float32"})


def one_hots(path: Path, actions: np.ndarray, row: int, n: int) -> np.ndarray:
    """Whole numbers `(rows,)`, of which the first is that of `row`, as float32 `(rows, n)`.

    Raises:
        UserError: one of them is not in 0 to n - 1.
    """
    wrong = np.flatnonzero((actions < 0) | (actions >= n))
    if len(wrong):
        raise UserError(
            f"{path}: action {actions[wrong[0]]} in row {row + wrong[0]} is out of range: there are {n}, 0 to {n - 1} "
            f"(video.choices sets how many)"
        )
    return np.eye(n, dtype=np.float32)[actions]


def of_space(space: spaces.Space) -> ActionSpec:
    """What an environment with this action space has."""
    return env_spec(spaces.Discrete(1), space).action


def actions_only(condition: Condition, choices: int = 0) -> None:
    """Raise UserError where a layout that tells no poses is asked for them, or one that knows its actions is told how
    many there are."""
    if condition == "pose":
        raise UserError("video.condition = pose: this layout tells no poses; use actions")
    if choices:
        raise UserError(f"video.choices = {choices}: this layout knows its actions; leave it at 0")
