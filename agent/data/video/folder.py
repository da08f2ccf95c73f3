"""A folder of mp4 files, with or without actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from longdream.agent.data.video import mp4
from longdream.agent.data.video.actions import actions_only, box, discrete, one_hots
from longdream.agent.data.video.reader import Condition, Recording, one_line
from longdream.envs.contract import UserError


class Folder:
    """`NAME.mp4` and, beside all of them or none, `NAME.npy`: row t is the action that was taken at frame t.

    Integers `(T,)` from 0 on are discrete actions, as many as the largest number in all files says. Floats `(T,)` or
    `(T, A)` in [-1, 1] are a box. T may be one less than the number of frames, since the last action has no outcome.
    Without actions, every row's action is a single 0, and M predicts without knowing the actions.
    """

    what: ClassVar[str] = "mp4 files, with NAME.npy for their actions beside all or none"
    rewarded: ClassVar[bool] = False

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None:
        actions_only(condition)
        with_actions = [path for path in files if path.with_suffix(".npy").exists()]
        self.without = not with_actions
        self.action = box(1)
        if self.without:
            return
        if without := next((path for path in files if path not in with_actions), None):
            raise UserError(
                f"{without.with_suffix('.npy')} is missing, {with_actions[0].with_suffix('.npy')} is there: give "
                f"actions with every video, or with none"
            )
        kinds: set[Any] = set()  # "discrete", or the shape of a row of a box
        for path in with_actions:
            taken = _load(path)
            kinds.add(taken.shape[1:] if taken.dtype.kind == "f" else "discrete")
            if len(kinds) > 1:
                raise UserError(f"the actions of {path} are not of the same kind as those of {with_actions[0]}")
            if taken.dtype.kind != "f":
                self.action = discrete(max(self.action.size, int(taken.max(initial=0)) + 1))
        (kind,) = kinds
        if kind == "discrete":
            self.action = discrete(self.action.size)
        else:
            self.action = box(kind[0] if kind else 1)

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
        actions = np.zeros((stop - start, self.action.size), np.float32)
        if self.without:
            return actions
        taken = _load(recording.path)[start:stop]
        file = recording.path.with_suffix(".npy")
        if self.action.parts:
            actions[: len(taken)] = one_hots(file, taken, start, self.action.size)
            return actions
        if not (np.abs(taken) <= 1).all():  # also true of NaN
            row = start + np.flatnonzero(~(np.abs(taken) <= 1).reshape(len(taken), -1).all(1))[0]
            raise UserError(f"{file}: the action in row {row} is out of range: numbers must lie in -1 to 1")
        actions[: len(taken)] = taken.reshape(len(taken), -1)
        return actions

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)


def _load(path: Path) -> np.ndarray:
    """The actions of a video, memory-mapped. Raises UserError for a file that does not hold actions."""
    file = path.with_suffix(".npy")
    try:
        actions = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file} is no NPY file of actions ({one_line(error)})") from None
    if actions.dtype.kind not in "iuf" or actions.ndim not in ((1, 2) if actions.dtype.kind == "f" else (1,)):
        raise UserError(
            f"{file} holds {actions.dtype} of shape {actions.shape}: actions are whole numbers (T,), or float numbers "
            f"(T,) or (T, A) in -1 to 1"
        )
    return actions
