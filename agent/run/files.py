"""Files of a run that may be anything: a run may come from a stranger, or from a disk that fails.

What is read is a regular file of bounded size, and opening it never waits, as opening a FIFO would. What is written
lies in the run's folder itself: a run that goes on appends to, cuts and deletes files, which a link would make foreign
ones.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from longdream.envs.contract import UserError

TEXT_BYTES = 1 << 20
"""Size of a configuration or summary, at most."""
FILES = ("config.yaml", "environment.txt", "metrics.jsonl", "summary.json", ".lock")
FOLDERS = ("checkpoints", "replay", "tensorboard", "videos")
"""What lies at the top of a run, by its kind; there may be other files."""
READ_ONLY = ("checkpoints",)
"""Folders whose content is read, replaced and deleted by name, but never written into."""
IN_PLACE = ("metrics.jsonl", ".lock", "replay")
"""Files, or folders of such, that are written in place: a second name of one (a hard link) would change with it."""
SPARSE_BYTES = 1 << 30
"""A larger file must fill its size on the disk at least to SPARSE_SHARE."""
SPARSE_SHARE = 1 / 16


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, open for reading, and its size in bytes.

    Raises:
        OSError: it is missing, cannot be read, or is something else, which its strerror says.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind_of(status.st_mode)}, not a file", str(path))
        if status.st_size > SPARSE_BYTES and 512 * status.st_blocks < SPARSE_SHARE * status.st_size:
            raise OSError(errno.EINVAL, f"it is empty for most of its {status.st_size:,} bytes", str(path))
        yield file, status.st_size


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """The text of a regular file, in UTF-8.

    Raises:
        OSError: as in `opened`, or the file is larger than `limit` bytes.
        UnicodeDecodeError: it is not UTF-8.
    """
    with opened(path) as (file, size):
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, at most {limit:,} are read", str(path))
        return file.read(limit).decode("utf-8")


def kind_of(mode: int) -> str:
    """What a file of that mode is, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFREG: "a file", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(mode), "a device or socket")


def check_own(folder: Path) -> None:
    """Check, before anything is written, that the run consists of regular files and folders of its own.

    The folder itself may be reached through a link: that is how the user names it.

    Raises:
        UserError: there is a link, something else, or a file in place of a folder. The message names it.
    """
    for path, status in _walk(folder, folder):
        _check(folder, path, status)


def check_own_path(folder: Path, path: Path) -> None:
    """As `check_own`, for one path in the folder and the folders that lead to it; they need not exist."""
    inside = path.relative_to(folder)
    for part in [*reversed(inside.parents), inside][1:]:
        try:
            _check(folder, folder / part, os.lstat(folder / part))
        except FileNotFoundError:
            return


def _check(folder: Path, path: Path, status: os.stat_result) -> None:
    inside = path.relative_to(folder)
    top = re.sub(r"^replay-\d+$", "replay", inside.parts[0])  # of another rank
    kind = kind_of(status.st_mode)
    expected = ("a file", "a folder")
    if len(inside.parts) == 1 and top in FILES + FOLDERS:
        expected = ("a folder",) if top in FOLDERS else ("a file",)
    elif top == "replay":
        expected = ("a file",)
    if kind not in expected:
        target = f" to {os.readlink(path)}" if kind == "a link" else ""
        raise UserError(
            f"{path} is {kind}{target}, not {' or '.join(expected)} of the run: nothing is written through it; put "
            f"back what belongs there, or remove it"
        )
    if kind == "a file" and status.st_nlink > 1 and top in IN_PLACE:
        raise UserError(
            f"{path} has {status.st_nlink} names (hard links), and writing would change all of them: put a copy of it "
            f"in its place"
        )


def _walk(folder: Path, root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below a folder, without following links."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # the process that trains this run has just removed it
                continue
            yield path, status
            if entry.is_dir(follow_symlinks=False) and not (folder == root and entry.name in READ_ONLY):
                yield from _walk(path, root)


def to_json(values: Any, indent: int | None = None) -> str:
    """Standard JSON: numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), indent=indent, allow_nan=False)
