"""Human play in Minecraft: recordings of MineRL 0.4 and of Video PreTraining (VPT), their ticks encoded as actions.

The action sets are those of the MineRL environments (docs/minerl.md), so that an action means the same in recordings
and in the game.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from longdream.agent.data.video import mp4, npz
from longdream.agent.data.video.actions import actions_only, of_space
from longdream.agent.data.video.reader import Condition, Damaged, Recording
from longdream.envs.contract import UserError
from longdream.envs.minerl.actions import ActionSet, action_set
from longdream.envs.minerl.controls import CONTROLS, HUMAN
from longdream.envs.minerl.recordings import ticks_of_jsonl, ticks_of_rendered


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

    def _numbers(self, path: Path) -> np.ndarray:
        """The actions `(N,)` or `(N, factors)` of a recording."""
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
        return sorted(path for path in root.rglob("recording.mp4") if path.with_name("rendered.npz").exists())

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        frames, size = mp4.measure(path)
        entries = npz.entries(path.with_name("rendered.npz"))
        if "action$camera" not in entries or "reward" not in entries:
            raise Damaged("lies beside a rendered.npz without action$camera or reward")
        (ticks, *_), _ = entries["action$camera"]
        if frames <= ticks:
            raise Damaged(f"has {frames} frames and {ticks} actions: there must be one frame more")
        return ticks + 1, size

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        before = mp4.measure(recording.path)[0] - recording.length
        return mp4.decode(recording.path, before + start, before + stop, size)

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        rewards = npz.rows(recording.path.with_name("rendered.npz"), "reward", max(start - 1, 0), stop - 1)
        return np.concatenate([np.zeros(stop - start - len(rewards)), rewards]).astype(np.float32)

    def _numbers(self, path: Path) -> np.ndarray:
        rendered = path.with_name("rendered.npz")
        keys = [key for key in npz.entries(rendered) if key.startswith("action$")]
        try:
            return self.set.encode(ticks_of_rendered({key: npz.rows(rendered, key) for key in keys}))
        except UserError as error:
            raise Damaged(f"lies beside a rendered.npz that cannot be used ({error})") from None


class Vpt(Ticks):
    """`ID.mp4` beside `ID.jsonl`, of the contractors of Video PreTraining (Baker et al. 2022, arXiv 2206.11795).

    Each line is the action at one frame. Surplus frames or lines are ignored. There are no rewards."""

    what: ClassVar[str] = "ID.mp4, each beside an ID.jsonl (Video PreTraining)"
    rewarded: ClassVar[bool] = False

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None:
        actions_only(condition)
        self._use(action_set(actions, HUMAN, "ObtainDiamondShovel"))

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        return sorted(path for path in root.rglob("*.mp4") if path.with_suffix(".jsonl").exists())

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        frames, size = mp4.measure(path)
        with open(path.with_suffix(".jsonl"), "rb") as file:
            lines = sum(bool(line.strip()) for line in file)
        if not lines:
            raise Damaged("lies beside an empty jsonl file")
        return min(frames, lines), size

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)

    def _numbers(self, path: Path) -> np.ndarray:
        try:
            with open(path.with_suffix(".jsonl"), encoding="utf-8") as file:
                return self.set.encode(ticks_of_jsonl(file))
        except (UserError, UnicodeDecodeError, OSError) as error:
            raise Damaged(f"lies beside a jsonl file that cannot be used ({error})") from None
