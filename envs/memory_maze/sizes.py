"""What the four sizes of Memory Maze are made of, and what is known to be reached in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longdream.envs.contract import UserError


@dataclass(frozen=True)
class Size:
    """One size: targets; seconds of an episode; labmaze's numbers of rooms and their sides; known mean returns.

    human and oracle are the paper's (its table of mazes: mean human score, mean maximal score); random is that of
    uniform random actions, measured (docs/memory-maze.md).
    """

    targets: int
    seconds: int
    rooms: int
    room_sides: tuple[int, int]
    random: float
    human: float
    oracle: float


SIZES: dict[int, Size] = {
    9: Size(3, 250, 6, (3, 5), 0.22, 26.4, 34.8),
    11: Size(4, 500, 6, (3, 5), 0.22, 44.3, 58.0),
    13: Size(5, 750, 6, (3, 5), 0.25, 55.5, 74.5),
    15: Size(6, 1000, 9, (3, 3), 0.19, 67.7, 87.7),
}
"""By cells along a side, outer walls left out."""

ACTIONS = ("noop", "forward", "left", "right", "forward left", "forward right")
ACTION_CONTROLS = ((0.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (-1.0, -1.0), (-1.0, 1.0))
"""Roll and steer of each action."""
RENDER_SIDE = 480
"""Pixels along a side of rendered frames; MuJoCo's buffer is that high."""
PHYSICS_HZ = 200


def check_options(size: int, camera_resolution: int, control_freq: float, render_mode: str | None) -> int:
    """Physics substeps per action, of arguments that the real environment and the twin share.

    Raises:
        UserError: one that cannot be.
    """
    if size not in SIZES:
        raise UserError(f"Memory Maze has size={size}: there are {', '.join(map(str, SIZES))}")
    if not 64 <= camera_resolution <= RENDER_SIDE:
        raise UserError(f"Memory Maze has camera_resolution={camera_resolution}: it must be 64 to {RENDER_SIDE}")
    substeps = PHYSICS_HZ / control_freq if control_freq > 0 else 0.0
    if substeps < 1 or abs(substeps - round(substeps)) > 1e-6:
        raise UserError(
            f"Memory Maze has control_freq={control_freq}: it must be {PHYSICS_HZ} divided by a whole number, like"
            " 4, 20 or 40"
        )
    if render_mode not in (None, "rgb_array", "top"):
        raise UserError(f"Memory Maze has render_mode={render_mode!r}: use None, 'rgb_array' or 'top'")
    return round(substeps)


def references(env_id: str, kwargs: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Mean returns known for the Memory Maze of that id, real or twin, by who reached them; empty for any other, and
    where its arguments make it another task."""
    match = re.fullmatch(r"(?:.*:)?longdream/(?:Fast)?MemoryMaze-(\d+)x\1-v\d+", env_id)
    size = SIZES.get(int(match[1])) if match else None
    if size is None or {"control_freq", "good_visibility", "top_camera"} & (kwargs or {}).keys():
        return {}
    return {"random": size.random, "human": size.human, "oracle": size.oracle}
