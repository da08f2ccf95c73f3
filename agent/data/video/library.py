"""A folder of recordings: which layout it has, what of it can be read, and what is held out."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from longdream.agent.data.video.folder import Folder
from longdream.agent.data.video.memory_maze import MemoryMaze
from longdream.agent.data.video.minecraft import MineRL, Vpt
from longdream.agent.data.video.reader import Condition, Damaged, Reader, Recording, Rows
from longdream.agent.data.video.teco import Teco
from longdream.envs.contract import UserError

LAYOUTS: dict[str, type[Reader]] = {
    "minerl": MineRL,
    "vpt": Vpt,
    "memory-maze": MemoryMaze,
    "teco": Teco,
    "mp4": Folder,
}
"""By name, those that ask for more first: a folder is of the first that finds something in it."""
THREADS = 8
"""That read at once. Unpacking and decoding leave Python to the others."""


@dataclass
class Library:
    """The recordings of a folder, by name.

    rewarded: whether they hold rewards.
    damaged: files that cannot be read, and what is wrong with each; it grows as such are found.
    """

    root: Path
    layout: str
    reader: Rows
    recordings: list[Recording]
    rewarded: bool
    damaged: dict[str, str] = field(default_factory=dict)

    def held_out(self, share: float) -> tuple[list[Recording], list[Recording]]:
        """The recordings to learn from, and `share` of them, at least one, to judge by: a choice by their names alone.

        Raises:
            UserError: there is one only, and a share of it is to be held out.
        """
        if not share:
            return self.recordings, []
        if len(self.recordings) < 2:
            raise UserError(f"{self.root} holds one recording: give more, or hold none out with --video.held_out 0")
        count = min(max(1, round(share * len(self.recordings))), len(self.recordings) - 1)
        judged = sorted(self.recordings, key=lambda r: hashlib.sha256(r.name.encode()).digest())[:count]
        return [r for r in self.recordings if r not in judged], sorted(judged, key=lambda r: r.name)


def open_library(
    root: Path, layout: str = "auto", condition: Condition = "actions", choices: int = 0, actions: str = "flat"
) -> Library:
    """Look at every recording's header.

    Raises:
        UserError: no such folder or layout, nothing in it that can be read, or frames of different sizes.
    """
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; --data names a folder of recordings")
    name, files = _recognise(root, layout)
    reader = LAYOUTS[name](root, files, condition, choices, actions)
    recordings, damaged = [], {}

    def head(path: Path) -> Recording | str:
        try:
            return Recording(path, str(path.relative_to(root)), *reader.head(path))
        except Damaged as error:
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        for path, found in zip(files, pool.map(head, files), strict=True):
            if isinstance(found, str):
                damaged[str(path.relative_to(root))] = found
            else:
                recordings.append(found)
    if not recordings:
        first, why = next(iter(damaged.items()))
        raise UserError(f"none of the {len(files)} recordings in {root} can be read: {first} {why}")
    for recording in recordings:
        if recording.size != recordings[0].size:
            (h, w), (height, width) = recordings[0].size, recording.size
            raise UserError(
                f"{root}: frames of mixed size, {h} x {w} in {recordings[0].name} and {height} x {width} in "
                f"{recording.name}: put them into folders of their own"
            )
    return Library(root, name, reader, recordings, reader.rewarded, damaged)


def _recognise(root: Path, layout: str) -> tuple[str, list[Path]]:
    for name in LAYOUTS if layout == "auto" else [layout]:
        if files := LAYOUTS[name].find(root):
            return name, files
    if layout == "auto":
        looked_for = "; ".join(f"{name}: {kind.what}" for name, kind in LAYOUTS.items())
        raise UserError(f"{root} holds no recordings of a layout that is known, neither of {looked_for}")
    raise UserError(f"{root} holds no recordings of layout {layout}: {LAYOUTS[layout].what}")
