"""A folder of recordings: its layout, the recordings that can be read, and those that are held out."""

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
"""Layouts by name, the most specific first. A folder has the first layout that finds recordings in it."""
THREADS = 8
"""Reading threads. Decompression and decoding release Python's lock."""


@dataclass
class Library:
    """The recordings of a folder, sorted by name.

    rewarded: whether they hold rewards.
    damaged: unreadable files by name, and what is wrong with each. More are added as they are found.
    """

    root: Path
    layout: str
    reader: Rows
    recordings: list[Recording]
    rewarded: bool
    damaged: dict[str, str] = field(default_factory=dict)

    def held_out(self, share: float) -> tuple[list[Recording], list[Recording]]:
        """Split into recordings to learn from and held-out ones: `share` of all, at least one unless `share` is 0.

        The split depends on their names alone.

        Raises:
            UserError: there is only one recording, and some are to be held out.
        """
        if not share:
            return self.recordings, []
        if len(self.recordings) < 2:
            raise UserError(
                f"{self.root} holds one recording: give more, or hold none out with --video.held_out_clips 0"
            )
        count = min(max(1, round(share * len(self.recordings))), len(self.recordings) - 1)
        held_out = sorted(self.recordings, key=lambda r: hashlib.sha256(r.name.encode()).digest())[:count]
        return [r for r in self.recordings if r not in held_out], sorted(held_out, key=lambda r: r.name)


def open_library(root: Path, layout: str = "auto", condition: Condition = "actions", actions: str = "flat") -> Library:
    """Read the header of every recording below `root`.

    Raises:
        UserError: there is no such folder or layout, no recording can be read, or frames differ in size.
    """
    if root.is_file():
        raise UserError(f"{root} is a file: --data names the folder of recordings, such as {root.parent}")
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; --data names a folder of recordings")
    name, files = _recognise(root, layout)
    reader = LAYOUTS[name](root, files, condition, actions)
    recordings: list[Recording] = []
    damaged: dict[str, str] = {}

    def head(path: Path) -> Recording | str:
        try:
            return Recording(path, str(path.relative_to(root)), *reader.head(path))
        except Damaged as error:
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        for path, recording in zip(files, pool.map(head, files), strict=True):
            if isinstance(recording, str):
                damaged[str(path.relative_to(root))] = recording
            else:
                recordings.append(recording)
    if not recordings:
        first, why = next(iter(damaged.items()))
        raise UserError(f"none of the {len(files)} recordings in {root} can be read: {first} {why}")
    for recording in recordings:
        if recording.size != recordings[0].size:
            h, w = recordings[0].size
            height, width = recording.size
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
