"""Episodes of Memory Maze as NPZ files, in the layout of its published offline data (docs/memory-maze.md)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data import npz_episodes as offline
from longdream.agent.data.video import npz
from longdream.agent.data.video.actions import box, discrete
from longdream.agent.data.video.reader import Condition, Damaged, Recording
from longdream.envs.contract import UserError
from longdream.envs.images import resize_area

ACTIONS = 6
OCTAVES, TURNS = 5, 4


class MemoryMaze:
    """Files hold in row t what led there: `action[t]` was chosen from row t - 1.

    With `condition` "pose", row t holds as its action the pose of row t + 1, in the form of `pose_code`, so that M
    predicts each frame from the pose it was seen from, as the paper behind M does on this data (arXiv 2505.20171).
    """

    what: ClassVar[str] = "NPZ files with entries image, action, reward, agent_pos, ... (Memory Maze's offline data)"
    rewarded: ClassVar[bool] = True

    def __init__(self, root: Path, files: list[Path], condition: Condition, choices: int, actions: str) -> None:
        if choices not in (0, ACTIONS):
            raise UserError(f"video.choices = {choices}: Memory Maze has {ACTIONS} actions; leave it at 0")
        self.pose = condition == "pose"
        self.action = box(POSE) if self.pose else discrete(ACTIONS)

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        return npz.files_with(root, ("image", "action", "agent_pos"))

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        found = npz.entries(path)
        try:
            sizes = offline.check_shapes(found)
        except ValueError as error:
            raise Damaged(str(error)) from None
        _, height, width, _ = found["image"][0]
        return sizes["t"], (height, width)

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return resize_area(npz.rows(recording.path, "image", start, stop), size, size)

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        told = self._poses if self.pose else self._taken
        led = told(recording, start + 1, min(stop + 1, recording.length))
        return np.concatenate([led, np.zeros((stop - start - len(led), self.action.size), np.float32)])

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return npz.rows(recording.path, "reward", start, stop).astype(np.float32)

    def _taken(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        taken = npz.rows(recording.path, "action", start, stop).astype(np.float32)
        wrong = np.flatnonzero((np.sort(taken, 1) != [0, 0, 0, 0, 0, 1]).any(1))
        if len(wrong):
            raise UserError(f"{recording.path}: 'action' is no one-hot in row {start + wrong[0]}")
        return taken

    def _poses(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        width = _width(recording.path)
        place, look = (npz.rows(recording.path, key, start, stop) for key in ("agent_pos", "agent_dir"))
        place = 2 * place / width - 1
        if not (np.abs(np.concatenate([place, look], 1)) <= 1.01).all():  # not finite, too
            raise UserError(f"{recording.path}: a pose in rows {start} to {stop - 1} lies outside the maze")
        return pose_code(place, look)


def pose_code(place: np.ndarray, look: np.ndarray) -> np.ndarray:
    """Poses in -1 to 1, float32 `(n, POSE)`: place `(n, 2)` as it is (-1 to 1 across the maze) and as sines and cosines
    of OCTAVES periods from the maze's width down to a sixteenth of it, look `(n, 2)`, a unit vector, as those of its
    angle and of TURNS multiples of it in all. From the numbers alone a network is slow to learn what differs between
    places that are near each other (Tancik et al. 2020, arXiv 2006.10739)."""
    phase = place[:, :, None] * (np.pi * 2.0 ** np.arange(OCTAVES))
    angle = np.arctan2(look[:, 1], look[:, 0])[:, None] * np.arange(1, TURNS + 1)
    waves = [np.sin(phase).reshape(len(place), -1), np.cos(phase).reshape(len(place), -1), np.sin(angle), np.cos(angle)]
    return np.concatenate([place, *waves], 1).astype(np.float32)


POSE = 2 + 4 * OCTAVES + 2 * TURNS


@lru_cache(maxsize=4096)
def _width(path: Path) -> int:
    """Of the maze, in cells."""
    return npz.entries(path)["maze_layout"][0][1]
