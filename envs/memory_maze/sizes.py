"""The four sizes of Memory Maze: their parameters, and the mean returns known for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longdream.envs.contract import UserError


@dataclass(frozen=True)
class Size:
    """Parameters of one size, and known mean returns.

    Attributes:
        targets: number of targets.
        seconds: length of an episode in seconds of simulated time.
        rooms: labmaze's maximum number of rooms.
        room_sides: labmaze's minimum and maximum side of a room, in cells.
        random: mean return of uniform random actions, measured (docs/memory-maze.md).
        human, oracle: mean human score and mean maximal score (Pasukonis et al. 2022, arXiv 2210.13383, table of
            mazes).
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
"""The sizes by their number of cells along a side, without the outer walls."""

ACTIONS = ("noop", "forward", "left", "right", "forward left", "forward right")
ACTION_CONTROLS = ((0.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (-1.0, -1.0), (-1.0, 1.0))
"""Roll and steer of each action."""
RENDER_SIDE = 480
"""Side of rendered frames in pixels: the height of MuJoCo's offscreen buffer."""
PHYSICS_HZ = 200


def check_options(size: int, camera_resolution: int, control_freq: float, render_mode: str | None) -> int:
    """Check the arguments that the original and the fast Memory Maze share; returns the physics substeps per action.

    Raises:
        UserError: an argument is invalid.
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
    """Known mean returns for a Memory Maze, original or fast, by policy: "random", "human" and "oracle".

    Empty for any other environment, and for arguments that change the task."""
    match = re.fullmatch(r"(?:.*:)?longdream/(?:Fast)?MemoryMaze-(\d+)x\1-v\d+", env_id)
    size = SIZES.get(int(match[1])) if match else None
    if size is None or {"control_freq", "good_visibility", "top_camera"} & (kwargs or {}).keys():
        return {}
    return {"random": size.random, "human": size.human, "oracle": size.oracle}
