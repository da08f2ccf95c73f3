"""Episodes of Memory Maze in NPZ files, in the format of its published offline data (docs/memory-maze.md)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data import npz_episodes as offline
from longdream.agent.data.video import npz
from longdream.agent.data.video.actions import box, discrete, finite
from longdream.agent.data.video.reader import Condition, Damaged, Recording
from longdream.envs.images import resize_area

ACTIONS = 6
OCTAVES = 5
"""Frequencies per coordinate in the code of a pose."""
TURNS = 4
"""Frequencies of the heading in the code of a pose."""


class MemoryMaze:
    """In the files, `action[t]` led to row t: it was chosen from row t - 1.

    With `condition` "pose", the action of row t is the pose of row t + 1, encoded by `pose_code`. M then predicts each
    frame from the pose from which it was seen, as Po et al. (2025, arXiv 2505.20171) do on this data.
    """

    what: ClassVar[str] = "NPZ files with entries image, action, reward, agent_pos, ... (Memory Maze's offline data)"
    rewarded: ClassVar[bool] = True

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None:
        self.pose = condition == "pose"
        self.action = box(POSE) if self.pose else discrete(ACTIONS)

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        return npz.files_with(root, ("image", "action", "agent_pos"))

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        entries = npz.entries(path)
        try:
            sizes = offline.check_shapes(entries)
        except ValueError as error:
            raise Damaged(str(error)) from None
        _, height, width, _ = entries["image"][0]
        return sizes["t"], (height, width)

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return resize_area(npz.rows(recording.path, "image", start, stop), size, size)

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        read = self._poses if self.pose else self._taken
        actions = read(recording, start + 1, min(stop + 1, recording.length))
        return np.concatenate([actions, np.zeros((stop - start - len(actions), self.action.size), np.float32)])

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return finite(npz.rows(recording.path, "reward", start, stop), start)

    def _taken(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        taken = npz.rows(recording.path, "action", start, stop).astype(np.float32)
        wrong = np.flatnonzero((np.sort(taken, 1) != [0, 0, 0, 0, 0, 1]).any(1))
        if len(wrong):
            raise Damaged(f"has an 'action' that is no one-hot, in row {start + wrong[0]}")
        return taken

    def _poses(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        width = _width(recording.path)
        position = 2 * npz.rows(recording.path, "agent_pos", start, stop) / width - 1
        heading = npz.rows(recording.path, "agent_dir", start, stop)
        if not (np.abs(np.concatenate([position, heading], 1)) <= 1.01).all():  # also true of NaN
            raise Damaged(f"has a pose in rows {start} to {stop - 1} that lies outside the maze")
        return pose_code(position, heading)


def pose_code(position: np.ndarray, heading: np.ndarray) -> np.ndarray:
    """Fourier features of poses in [-1, 1], float32 `(n, POSE)`.

    From raw coordinates a network is slow to learn differences between places near each other (Tancik et al. 2020,
    arXiv 2006.10739).

    Args:
        position: `(n, 2)`, -1 to 1 across the maze. It is encoded as it is, and as sines and cosines of OCTAVES periods
            from the maze's width down to a sixteenth of it.
        heading: `(n, 2)`, unit vectors. Encoded as sines and cosines of 1 to TURNS times their angle.
    """
    phase = position[:, :, None] * (np.pi * 2.0 ** np.arange(OCTAVES))
    angle = np.arctan2(heading[:, 1], heading[:, 0])[:, None] * np.arange(1, TURNS + 1)
    n = len(position)
    waves = [np.sin(phase).reshape(n, -1), np.cos(phase).reshape(n, -1), np.sin(angle), np.cos(angle)]
    return np.concatenate([position, *waves], 1).astype(np.float32)


POSE = 2 + 4 * OCTAVES + 2 * TURNS
"""Length of the code of a pose."""


@lru_cache(maxsize=4096)
def _width(path: Path) -> int:
    """Width of the maze, in cells."""
    return npz.entries(path)["maze_layout"][0][1]
