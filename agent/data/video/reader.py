"""What a layout of recordings has to tell, so that clips can be cut from them: one small interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np

from longdream.envs.contract import ActionSpec

Condition = Literal["actions", "pose"]


class Damaged(Exception):
    """A file that cannot be read. The message says what is wrong with it, without its name."""


@dataclass(frozen=True)
class Recording:
    """One recording as its header describes it: `length` rows of frames of `size` (height, width).

    path: the file that holds its frames. name: path below the folder of the data set, by which it is sorted and told.
    """

    path: Path
    name: str
    length: int
    size: tuple[int, int]


class Rows(Protocol):
    """What clips are cut from: the rows of recordings, by whatever way."""

    action: ActionSpec

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        """Rows `start` to `stop` as uint8 `(n, size, size, 3)`. Raises Damaged."""
        ...

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        """What is chosen from these rows, encoded: float32 `(n, A)`; zeros in the last row if nothing is known of it.

        Raises:
            Damaged: it cannot be read.
            UserError: an action that is none.
        """
        ...

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        """What arrives with these rows: float32 `(n,)`; zeros where the layout has none. Raises Damaged."""
        ...


class Reader(Rows, Protocol):
    """One layout. Built as `Class(root, files, condition, choices, actions)`.

    Args:
        root: folder of the data set. files: what `find` found there.
        condition: what rows hold as actions: those that were taken, or the pose that came of them.
        choices: number of different actions where they are numbers of a list; 0: what the layout or the files say.
        actions: the action set that ticks of Minecraft are encoded in.

    Raises:
        UserError: the layout knows no such condition, or no actions of that form.
    """

    what: ClassVar[str]
    """What makes a folder one of this layout, in a few words."""
    rewarded: ClassVar[bool]
    """Whether its recordings hold rewards."""

    def __init__(self, root: Path, files: list[Path], condition: Condition, choices: int, actions: str) -> None: ...

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        """The recordings below `root`, sorted; none where the folder is not of this layout."""
        ...

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        """Rows of a recording, and height and width of its frames, without decoding these.

        Raises:
            Damaged: it cannot be read.
        """
        ...


def one_line(error: BaseException) -> str:
    """An error of a library, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
