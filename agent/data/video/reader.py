"""The interface of readers, one for each layout of recordings."""

from __future__ import annotations

import stat
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

    path: the file that holds its frames. name: path below the folder of the data set, for sorting and for messages.
    """

    path: Path
    name: str
    length: int
    size: tuple[int, int]


class Rows(Protocol):
    """Access to the rows of recordings, from which clips are cut."""

    action: ActionSpec

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        """Frames of rows `start` to `stop`, uint8 `(n, size, size, 3)`. Raises Damaged."""
        ...

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        """Encoded actions chosen from these rows, float32 `(n, A)`; zeros in the last row if its action is unknown.

        Raises:
            Damaged: the file cannot be read, or an action is invalid.
        """
        ...

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        """Rewards that arrive with these rows, float32 `(n,)`; zeros if the layout has none. Raises Damaged."""
        ...


class Reader(Rows, Protocol):
    """One layout of recordings.

    Args:
        root: folder of the data set. files: the result of `find`.
        condition: the content of a row's action: the action that was taken, or the pose that it led to.
        actions: the action set for ticks of Minecraft.

    Raises:
        UserError: the layout does not have this condition or these actions.
    """

    what: ClassVar[str]
    """The files of this layout in a few words, for messages."""
    rewarded: ClassVar[bool]
    """Whether its recordings hold rewards."""

    def __init__(self, root: Path, files: list[Path], condition: Condition, actions: str) -> None: ...

    @classmethod
    def find(cls, root: Path) -> list[Path]:
        """The recordings below `root`, sorted; none if the folder does not have this layout."""
        ...

    def head(self, path: Path) -> tuple[int, tuple[int, int]]:
        """Number of rows of a recording, and height and width of its frames, which are not decoded.

        Raises:
            Damaged: the file cannot be read.
        """
        ...


def version(path: Path) -> tuple[int, int]:
    """Time of the last change and size of a file: what is cached of it holds for these.

    Raises:
        Damaged: it cannot be read, or is a FIFO, folder or device, which reading might wait for.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged("is no file but a FIFO, folder or device")
    return status.st_mtime_ns, status.st_size


def one_line(error: BaseException) -> str:
    """Type and message of an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
