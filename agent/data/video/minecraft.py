"""Human play in Minecraft: recordings of MineRL 0.4 and of Video PreTraining (VPT), their ticks encoded as actions.

The action sets are those of the MineRL environments (docs/minerl.md), so that an action means the same in recordings
and in the game.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data.video import mp4, npz
from longdream.agent.data.video.actions import actions_only, finite, of_space
from longdream.agent.data.video.found import VIDEOS, beside, files_below
from longdream.agent.data.video.reader import Condition, Damaged, Recording, one_line
from longdream.envs.contract import UserError
from longdream.envs.minerl.actions import ActionSet, action_set
from longdream.envs.minerl.controls import CONTROLS, HUMAN
from longdream.envs.minerl.recordings import ticks_of_jsonl, ticks_of_rendered

# whatever a file of foreign origin makes of numbers and tables (UserError and UnicodeDecodeError are ValueErrors)
FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, RecursionError)
TICK = re.compile(r'"tick"\s*:\s*(\d+)')


class Ticks:
    """What both layouts share: frames in an mp4 file, and a file of ticks beside it, which is encoded once."""

    set: ActionSet

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return mp4.decode(recording.path, start, stop, size)

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        taken = self.numbers(recording.path)[start:stop]
        actions = np.zeros((stop - start, self.action.size), np.float32)
        actions[: len(taken)] = self.action.encode(taken)
        return actions

    def _use(self, chosen: ActionSet) -> None:
        self.set = chosen
        self.action = of_space(chosen.space)
        self.numbers = lru_cache(maxsize=256)(self._numbers)

    def encoded(self, ticks: dict[str, np.ndarray]) -> np.ndarray:
        """Ticks as actions of the set, `(N,)` or `(N, factors)`. Raises UserError where the camera is not finite."""
        wrong = np.flatnonzero(~np.isfinite(ticks["camera"]).reshape(len(ticks["camera"]), -1).all(1))
        if len(wrong):
            raise UserError(f"the camera of tick {wrong[0]} is not finite")
        return self.set.encode(ticks)

    def _numbers(self, path: Path) -> np.ndarray:
        """The actions `(N,)` or `(N, factors)` of a recording. Raises Damaged."""
        raise NotImplementedError


class MineRL(Ticks):
    """`TASK/STREAM/recording.mp4` beside `rendered.npz`, of MineRL 0.4.

    N ticks have N + 1 frames: one before each tick, and one after the last. Row t + 1 has the reward of tick t; the
    last row has no action. If a video has more frames, the first ones are skipped, as MineRL's own reader does."""

    what: ClassVar[str] = "TASK/STREAM/recording.mp4, each beside a rendered.npz (MineRL 0.4)"
    rewarded: ClassVar[bool] = True

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None:
        actions_only(condition)
        names = sorted({path.resolve().parent.parent.name for path in files})
        tasks = {name.removeprefix("MineRL").partition("-")[0] for name in names}
        if len(tasks) > 1 or not tasks <= CONTROLS.keys():
            raise UserError(
                f"{root} holds recordings of {', '.join(names)}: give those of one task, one of {', '.join(CONTROLS)}"
            )
        (task,) = tasks
        self._use(action_set(actions, CONTROLS[task], task))

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        files = [path for path in files_below(root, ".mp4") if path.name.lower() == "recording.mp4"]
        return files if any(path.with_name("rendered.npz").exists() for path in files) else []

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        frames, size = mp4.measure(path)
        rendered = path.with_name("rendered.npz")
        if not rendered.exists():
            raise Damaged("has no rendered.npz beside it, as others have")
        try:
            entries = npz.entries(rendered)
        except Damaged as error:
            raise Damaged(f"lies beside a rendered.npz that {error}") from None
        if "action$camera" not in entries or "reward" not in entries:
            raise Damaged("lies beside a rendered.npz without action$camera or reward")
        camera, _ = entries["action$camera"]
        rewards, kind = entries["reward"]
        if len(camera) != 2 or camera[1] != 2 or rewards != camera[:1] or kind.kind not in "buif":
            raise Damaged(
                f"lies beside a rendered.npz with action$camera of shape {camera} and reward of shape {rewards} and "
                f"type {kind}, not (N, 2) and (N,) numbers"
            )
        ticks = camera[0]
        if frames <= ticks:
            raise Damaged(f"has {frames} frames and {ticks} actions: there must be one frame more")
        return ticks + 1, size

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        before = mp4.measure(recording.path)[0] - recording.length
        return mp4.decode(recording.path, before + start, before + stop, size)

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        rewards = npz.rows(recording.path.with_name("rendered.npz"), "reward", max(start - 1, 0), stop - 1)
        return np.concatenate([np.zeros(stop - start - len(rewards), np.float32), finite(rewards, max(start, 1))])

    def _numbers(self, path: Path) -> np.ndarray:
        rendered = path.with_name("rendered.npz")
        keys = [key for key in npz.entries(rendered) if key.startswith("action$")]
        try:
            return self.encoded(ticks_of_rendered({key: npz.rows(rendered, key) for key in keys}))
        except Damaged as error:
            raise Damaged(f"lies beside a rendered.npz that {error}") from None
        except FAULTS as error:
            raise Damaged(f"lies beside a rendered.npz that cannot be used ({_why(error)})") from None


class Vpt(Ticks):
    """`ID.mp4` (or .mov, .mkv) beside `ID.jsonl`, of Video PreTraining (Baker et al. 2022, arXiv 2206.11795).

    Each line is the action at one frame. Surplus frames or lines at the end are ignored. There are no rewards."""

    what: ClassVar[str] = "ID.mp4, each beside an ID.jsonl (Video PreTraining)"
    rewarded: ClassVar[bool] = False

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None:
        actions_only(condition)
        self._use(action_set(actions, HUMAN, "ObtainDiamondShovel"))

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        files = files_below(root, *VIDEOS)
        return files if any(beside(path, ".jsonl") for path in files) else []

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        frames, size = mp4.measure(path)
        try:
            with open(_ticks_of(path), "rb") as file:
                lines = sum(bool(line.strip()) for line in file)
        except OSError as error:
            raise Damaged(f"lies beside a jsonl file that cannot be read ({error.strerror})") from None
        if not lines:
            raise Damaged("lies beside an empty jsonl file")
        return min(frames, lines), size

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)

    def _numbers(self, path: Path) -> np.ndarray:
        frames, _ = mp4.measure(path)
        try:
            with open(_ticks_of(path), encoding="utf-8-sig") as file:  # (some editors begin a file with a mark)
                lines = [line for line in file if line.strip()]
            if len(lines) < frames:
                _check_ticks(lines)
            return self.encoded(ticks_of_jsonl(lines))
        except FAULTS as error:
            raise Damaged(f"lies beside a jsonl file that cannot be used ({_why(error)})") from None


def _ticks_of(path: Path) -> Path:
    """The jsonl file of a video. Raises Damaged if there is none."""
    file = beside(path, ".jsonl")
    if file is None:
        raise Damaged(f"has no {path.with_suffix('.jsonl').name} beside it, as others have")
    return file


def _check_ticks(lines: list[str]) -> None:
    """Raise UserError if lines are missing between others, as their tick numbers say: later actions would be shifted.

    Only asked where there are fewer lines than frames.
    """
    before: int | None = None
    for number, line in enumerate(lines):
        match = TICK.search(line)
        tick = int(match[1]) if match else None
        if tick is not None and before is not None and tick > before + 1:
            raise UserError(f"line {number + 1} is tick {tick}, after tick {before}: lines are missing between them")
        before = tick


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else one_line(error)
