"""NPZ files of a video and its actions, in the format of TECO (Yan et al. 2022, arXiv 2210.02396)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data.video import npz
from longdream.agent.data.video.actions import actions_only, discrete, one_hots
from longdream.agent.data.video.reader import Condition, Damaged, Recording
from longdream.envs.images import resize_area


class Teco:
    """`video` uint8 (T, H, W, 3) and `actions` (T,) integers from 0 on; Minecraft has four actions.

    We assume that `actions[t]` led to frame t, and that `actions[0]` has no meaning: TECO's own training predicts frame
    t from `actions[t]` and the frames before it. There are no rewards.
    """

    what: ClassVar[str] = "NPZ files with entries video and actions (TECO's)"
    rewarded: ClassVar[bool] = False

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None:
        actions_only(condition)
        self.action = discrete(4)

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        return npz.files_with(root, ("video", "actions"))

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        entries = npz.entries(path)
        missing = ((), np.dtype("V"))
        video, video_type = entries.get("video", missing)
        actions, actions_type = entries.get("actions", missing)
        if len(video) != 4 or video[3] != 3 or video_type != np.uint8 or not all(video[1:]):
            raise Damaged(f"has 'video' of shape {video} and type {video_type}, not (T, height, width, 3) uint8")
        if actions != video[:1] or actions_type.kind not in "iu":
            raise Damaged(f"has 'actions' of shape {actions} and type {actions_type}, not ({video[0]},) whole numbers")
        frames, height, width, _ = video
        return frames, (height, width)

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return resize_area(npz.rows(recording.path, "video", start, stop), size, size)

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        numbers = npz.rows(recording.path, "actions", start + 1, min(stop + 1, recording.length))
        actions = one_hots(numbers, start + 1, self.action.size)
        return np.concatenate([actions, np.zeros((stop - start - len(actions), self.action.size), np.float32)])

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)
