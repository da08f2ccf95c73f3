"""Finding files in folders as people have them: links, names in capitals, and what an operating system leaves there."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

VIDEOS = (".mp4", ".mov", ".mkv")
"""Suffixes of the video files that are looked for; all are read in the same way."""


def files_below(root: Path, *suffixes: str) -> list[Path]:
    """All files below `root` whose names end in one of these suffixes, in capitals or not, sorted.

    Linked folders are searched as well, each folder once. Names that begin with a dot, such as the `._NAME` files that
    macOS writes, and folders named `__MACOSX` are passed over. Folders that cannot be listed are named in a warning.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_warn):
        status = os.stat(folder)
        key = (status.st_dev, status.st_ino)
        if key in seen:  # a link to a folder that has been searched, or a circle of links
            folders.clear()
            continue
        seen.add(key)
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".") and name != "__MACOSX"),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        here = Path(folder)
        files += [here / name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(files)


def beside(path: Path, suffix: str) -> Path | None:
    """The file of the same name with another suffix, in capitals or not; None if there is none."""
    for written in (suffix, suffix.upper(), suffix.capitalize()):
        other = path.with_suffix(written)
        if other.is_file():
            return other
    return None


def _warn(error: OSError) -> None:
    warnings.warn(f"{error.filename} cannot be searched ({error.strerror}): it is left out", stacklevel=2)
