"""A folder of video files, with or without actions."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data.video import mp4, npz
from longdream.agent.data.video.actions import actions_only, box, discrete, one_hots
from longdream.agent.data.video.found import VIDEOS, beside, files_below
from longdream.agent.data.video.reader import Condition, Damaged, Recording, one_line
from longdream.envs.contract import UserError

MOST = 1 << 16
"""Discrete actions that are accepted: a larger number is a mistake, or another code than one action per number."""


class Folder:
    """`NAME.mp4` (or .mov, .mkv) and, beside all or none, `NAME.npy`: row t is the action that was taken at frame t.

    Integers `(T,)` from 0 on are discrete actions, as many as the largest number in all files says. Floats `(T,)` or
    `(T, A)` in [-1, 1] are a box. T may be one less than the number of frames, since the last action has no outcome.
    Without actions, every row's action is a single 0, and M predicts without knowing the actions.

    A file of actions that is missing, cannot be read or is of another kind than most is a damaged recording.
    """

    what: ClassVar[str] = "mp4, mov or mkv files, with NAME.npy for their actions beside all or none"
    rewarded: ClassVar[bool] = False

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None:
        actions_only(condition)
        missing = [path for path in files if beside(path, ".npy") is None]
        self.without = len(missing) == len(files)
        self.action = box(1)
        self.width: int | None = None
        """Numbers of a row of a box; None for discrete actions."""
        if self.without:
            return
        if 2 * len(missing) >= len(files):
            some = next(path for path in files if path not in missing)
            raise UserError(
                f"{missing[0].with_suffix('.npy')} is missing, {beside(some, '.npy')} is there: give actions with "
                f"every video, or with none"
            )
        kinds: dict[Path, int | None] = {}
        largest = 0
        for path in files:
            try:
                taken = load(path)
            except Damaged:
                continue  # its head says why
            kinds[path] = _width(taken)
            if kinds[path] is None:
                largest = max(largest, int(taken.max(initial=0)))
        if not kinds:
            return
        (self.width, most), *others = Counter(kinds.values()).most_common()
        if others and others[0][1] == most:
            one, other = (next(path for path in kinds if kinds[path] == kind) for kind in (self.width, others[0][0]))
            raise UserError(f"the actions of {other} are not of the same kind as those of {one}")
        self.action = discrete(largest + 1) if self.width is None else box(self.width)

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        return files_below(root, *VIDEOS)

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        frames, size = mp4.measure(path)
        if self.without:
            return frames, size
        taken = load(path)
        if _width(taken) != self.width:
            raise Damaged(f"lies beside actions {_kind(_width(taken))}, others have {_kind(self.width)}")
        if len(taken) not in (frames, frames - 1):
            raise Damaged(f"has {frames} frames and {len(taken)} actions: give one per frame; the last may lack")
        return frames, size

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return mp4.decode(recording.path, start, stop, size)

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        actions = np.zeros((stop - start, self.action.size), np.float32)
        if self.without:
            return actions
        taken = load(recording.path)[start:stop]
        if self.action.parts:
            actions[: len(taken)] = one_hots(taken, start, self.action.size)
        else:
            actions[: len(taken)] = taken.reshape(len(taken), -1)
        return actions

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)


def load(path: Path) -> np.ndarray:
    """The actions of a video, memory-mapped: integers `(T,)`, or floats `(T,)` or `(T, A)` in -1 to 1.

    Raises:
        Damaged: there is no such file, it does not hold actions, or one is out of range.
    """
    file = beside(path, ".npy")
    if file is None:
        raise Damaged(f"has no {path.with_suffix('.npy').name} beside it, as others have")
    try:
        status = file.stat()
        _check(file, status.st_mtime_ns, status.st_size)
        return _read(file)
    except OSError as error:
        raise Damaged(f"lies beside {file.name}, which cannot be read ({one_line(error)})") from None


def _read(file: Path) -> np.ndarray:
    try:
        with open(file, "rb") as stream:
            shape, dtype, fortran = npz.read_header(stream)
            begin = stream.tell()
        if dtype.hasobject:
            raise ValueError("it holds pickled objects")
        # (an empty file or array cannot be mapped)
        actions = np.memmap(file, dtype, "r", begin, shape, "F" if fortran else "C") if 0 not in shape else None
    except Exception as error:  # numpy raises several kinds for bytes that are no array, or too large a one
        raise Damaged(f"lies beside {file.name}, which is no NPY file of actions ({one_line(error)})") from None
    if actions is None:
        actions = np.empty(shape, dtype)
    if actions.dtype.kind == "b":
        actions = actions.astype(np.int64)
    if actions.dtype.kind in "iu" and actions.ndim == 2 and actions.shape[1] == 1:
        actions = actions[:, 0]
    return actions


@lru_cache(maxsize=1 << 14)
def _check(file: Path, changed: int, size: int) -> None:
    """Raise Damaged for a file that does not hold actions."""
    actions = _read(file)
    floats = actions.dtype.kind == "f"
    shaped = actions.ndim in ((1, 2) if floats else (1,)) and 0 not in actions.shape[1:]
    if actions.dtype.kind not in "iuf" or not shaped:
        raise Damaged(
            f"lies beside {file.name}, which holds {actions.dtype} of shape {actions.shape}: actions are whole numbers "
            f"(T,), or float numbers (T,) or (T, A) in -1 to 1"
        )
    if floats:
        fits = np.abs(actions) <= 1  # also False for NaN
        known = "numbers must lie in -1 to 1; save whole numbers as integers"
    else:
        fits = (actions >= 0) & (actions < MOST)
        known = f"discrete actions count from 0, up to {MOST - 1}"
    wrong = np.flatnonzero(~fits.reshape(len(actions), _width(actions) or 1).all(1))
    if len(wrong):
        raise Damaged(
            f"lies beside {file.name}, whose action {actions[wrong[0]]} in row {wrong[0]} is out of range: {known}"
        )


def _width(actions: np.ndarray) -> int | None:
    """Numbers of an action of a box; None for discrete actions."""
    return None if actions.dtype.kind != "f" else int(np.prod(actions.shape[1:], dtype=int))


def _kind(width: int | None) -> str:
    return "of whole numbers" if width is None else f"of {width} float numbers each"
