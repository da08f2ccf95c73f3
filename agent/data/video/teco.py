"""NPZ files of a video and its actions, as TECO (Yan et al. 2022, arXiv 2210.02396) keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data.video import npz
from longdream.agent.data.video.actions import actions_only, discrete, one_hots
from longdream.agent.data.video.reader import Condition, Damaged, Recording
from longdream.envs.images import resize_area


class Teco:
    """`video` uint8 (T, H, W, 3) and `actions` (T,) whole numbers from 0 on; Minecraft has four of them.

    Assumed: `actions[t]` led to frame t, as TECO's own training uses it (it predicts frame t from `actions[t]` and the
    frames before), so that `actions[0]` means nothing. There are no rewards.
    """

    what: ClassVar[str] = "NPZ files with entries video and actions (TECO's)"
    rewarded: ClassVar[bool] = False

    def __init__(self, root: Path, files: list[Path], condition: Condition, choices: int, actions: str) -> None:
        actions_only(condition)
        self.action = discrete(choices or 4)

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        return npz.files_with(root, ("video", "actions"))

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        found = npz.entries(path)
        (video, kind), (actions, of) = (found.get(key, ((), np.dtype("V"))) for key in ("video", "actions"))
        if len(video) != 4 or video[3] != 3 or kind != np.uint8:
            raise Damaged(f"has 'video' of shape {video} and type {kind}, not (T, height, width, 3) uint8")
        if actions != video[:1] or of.kind not in "iu":
            raise Damaged(f"has 'actions' of shape {actions} and type {of}, not ({video[0]},) whole numbers")
        frames, height, width, _ = video
        return frames, (height, width)

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return resize_area(npz.rows(recording.path, "video", start, stop), size, size)

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        led = npz.rows(recording.path, "actions", start + 1, min(stop + 1, recording.length))
        hots = one_hots(recording.path, led, start + 1, self.action.size)
        return np.concatenate([hots, np.zeros((stop - start - len(led), self.action.size), np.float32)])

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)
