"""A folder of mp4 files, with or without the actions that were taken in them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data.video import mp4
from longdream.agent.data.video.actions import actions_only, box, discrete, one_hots
from longdream.agent.data.video.reader import Condition, Recording, one_line
from longdream.envs.contract import UserError


class Folder:
    """`NAME.mp4` and, beside all of them or none, `NAME.npy`: row t is the action that was taken at frame t.

    Whole numbers `(T,)` from 0 on are one of several choices, `video.choices` or one more than the largest of all
    files; float numbers `(T,)` or `(T, A)` in [-1, 1] are a box. T may be one less than there are frames, since nothing
    is known of what came of the last action. Without actions, rows hold one number that is always 0: M then predicts
    what usually comes next.
    """

    what: ClassVar[str] = "mp4 files, with NAME.npy for their actions beside all or none"
    rewarded: ClassVar[bool] = False

    def __init__(self, root: Path, files: list[Path], condition: Condition, choices: int, actions: str) -> None:
        actions_only(condition)
        with_actions = [path for path in files if path.with_suffix(".npy").exists()]
        self.without, self.action = not with_actions, box(1)
        if self.without:
            return
        if without := next((path for path in files if path not in with_actions), None):
            raise UserError(
                f"{without.with_suffix('.npy')} is missing, {with_actions[0].with_suffix('.npy')} is there: give "
                f"actions with every video, or with none"
            )
        first, wide = with_actions[0], set()
        for path in with_actions:
            taken = _load(path)
            wide.add(taken.shape[1:] if taken.dtype.kind == "f" else "whole numbers")
            if len(wide) > 1:
                raise UserError(f"the actions of {path} are not of the same kind as those of {first}")
            if taken.dtype.kind != "f" and not choices:
                self.action = discrete(max(self.action.size, int(taken.max(initial=0)) + 1))
        (form,) = wide
        if form == "whole numbers":
            self.action = discrete(choices or self.action.size)
        else:
            self.action = box(form[0] if form else 1)

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        return sorted(root.rglob("*.mp4"))

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        frames, size = mp4.measure(path)
        if not self.without and len(actions := _load(path)) not in (frames, frames - 1):
            raise UserError(
                f"{path} has {frames} frames and {len(actions)} actions: give one per frame; the last may lack"
            )
        return frames, size

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return mp4.decode(recording.path, start, stop, size)

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        found = np.zeros((stop - start, self.action.size), np.float32)
        if self.without:
            return found
        taken, where = _load(recording.path)[start:stop], recording.path.with_suffix(".npy")
        if self.action.parts:
            found[: len(taken)] = one_hots(where, taken, start, self.action.size)
            return found
        if not (np.abs(taken) <= 1).all():  # not finite, too
            row = start + np.flatnonzero(~(np.abs(taken) <= 1).reshape(len(taken), -1).all(1))[0]
            raise UserError(f"{where}: the action in row {row} is out of range: numbers must lie in -1 to 1")
        found[: len(taken)] = taken.reshape(len(taken), -1)
        return found

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)


def _load(path: Path) -> np.ndarray:
    """The actions beside a video, read as they are asked for."""
    where = path.with_suffix(".npy")
    try:
        actions = np.load(where, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{where} is no NPY file of actions ({one_line(error)})") from None
    if actions.dtype.kind not in "iuf" or actions.ndim not in ((1, 2) if actions.dtype.kind == "f" else (1,)):
        raise UserError(
            f"{where} holds {actions.dtype} of shape {actions.shape}: actions are whole numbers (T,), or float numbers "
            f"(T,) or (T, A) in -1 to 1"
        )
    return actions
