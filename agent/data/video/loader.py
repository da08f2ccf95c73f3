"""Batches of clips, read by other threads while the one before is learned from, in an order that they do not change."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from longdream.agent.data.video.library import THREADS, Library
from longdream.agent.data.video.order import epoch_order
from longdream.agent.data.video.reader import Damaged, Recording
from longdream.envs.contract import UserError

AHEAD = 2
"""Batches that are read before they are asked for."""


@dataclass(frozen=True)
class Place:
    """Where reading stands: all that the next batch depends on, beside the seed and which files are known as damaged.

    clip: rows of the clips of this epoch. position: its batches so far. line: of each clip of the last batch, the
    number of its recording and the row behind it.
    """

    epoch: int = -1
    position: int = 0
    clip: int = 0
    line: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A batch: rows as `Batch.of` takes them, or what was made of these; where reading stands after it; and files that
    it found damaged."""

    rows: Any
    place: Place
    damaged: dict[str, str] = field(default_factory=dict)


class Loader:
    """Draws batches of clips from recordings.

    Args:
        recordings: those to draw from. plan: rows of a clip, and clips, of the batch of each update.
        size: side of the images. carry: whether clip b of a batch goes on where clip b of the batch before ended.
        update, place: from which update on, and where reading stood then.
        retrace: share of clips whose second half is the way back (`retraced`).
        bring: what the reading thread does with a batch's rows before they are handed out.

    Raises:
        UserError: no recording is as long as a clip.
    """

    def __init__(
        self,
        library: Library,
        recordings: list[Recording],
        plan: Callable[[int], tuple[int, int]],
        size: int,
        seed: int,
        carry: bool,
        update: int = 0,
        place: Place | None = None,
        retrace: float = 0.0,
        bring: Callable[[dict[str, Any]], Any] = lambda rows: rows,
    ):
        self.library, self.recordings, self.plan = library, recordings, plan
        self.size, self.seed, self.carry, self.update = size, seed, carry, update
        self.retrace, self.bring = retrace, bring
        self.lengths = [recording.length for recording in recordings]
        self.place = place or Place()
        self._damaged = set(library.damaged)  # of the reading thread, which is ahead
        self._orders: tuple[tuple[int, int, int], np.ndarray] = ((-1, 0, 0), np.empty(0))
        self._queue: queue.Queue[Loaded | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def next(self) -> Loaded:
        """The next batch; what it found damaged is in the library from now on.

        Raises:
            UserError: a file of another form than its layout says, or nothing left that can be read.
        """
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        self.place = found.place
        self.library.damaged.update(found.damaged)
        return found

    def too_short(self, clip: int) -> int:
        """How many recordings are shorter than a clip."""
        return sum(length < clip for length in self.lengths)

    def close(self) -> None:
        """End the threads."""
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    # -- in the reading thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        place, update = self.place, self.update
        try:
            while not self._stop.is_set():
                loaded = self._load(place, *self.plan(update))
                place, update = loaded.place, update + 1
                self._put(loaded)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Loaded | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _load(self, place: Place, clip: int, batch: int) -> Loaded:
        if place.clip != clip:
            place = Place(place.epoch + 1, 0, clip)
        order = self._order(place.epoch, clip, batch)
        if place.position >= len(order):
            place = replace(place, epoch=place.epoch + 1, position=0)
            order = self._order(place.epoch, clip, batch)
        slots = [(int(recording), int(start)) for recording, start in order[place.position]]
        clips, line, damaged = [], [], {}
        for i, found in enumerate(list(self._pool.map(lambda slot: self._try(slot[0], slot[1], clip), slots))):
            (recording, start), tries = slots[i], 0
            while isinstance(found, str):  # another clip of the epoch takes its place
                if (name := self.recordings[recording].name) not in self._damaged:
                    damaged[name] = found
                    self._damaged.add(name)
                if tries == order.size // 2:
                    raise UserError(f"{self.library.root}: no recording of {clip} rows is left that can be read")
                tries += 1
                later = ((place.position + 1) * batch + i + tries) % (order.size // 2)
                recording, start = map(int, order.reshape(-1, 2)[later])
                found = self._try(recording, start, clip)
            follows = self.carry and i < len(place.line) and place.line[i] == (recording, start)
            found["is_first"][0] = not follows
            number = place.position * batch + i
            back = int((number + 1) * self.retrace) > int(number * self.retrace)
            clips.append(retraced(found) if back else found)
            line.append((recording, start + clip))
        rows: dict[str, Any] = {key: np.stack([each[key] for each in clips]) for key in clips[0]}
        rows["obs"] = {"image": rows.pop("image")}
        return Loaded(self.bring(rows), replace(place, position=place.position + 1, line=tuple(line)), damaged)

    def _order(self, epoch: int, clip: int, batch: int) -> np.ndarray:
        if self._orders[0] != (epoch, clip, batch):
            order = epoch_order(self.lengths, clip, batch, self.seed, epoch, self.carry)
            self._orders = ((epoch, clip, batch), order)
        return self._orders[1]

    def _try(self, number: int, start: int, clip: int) -> dict[str, np.ndarray] | str:
        """The clip, or what is wrong with its file."""
        recording = self.recordings[number]
        if recording.name in self._damaged:
            return self.library.damaged.get(recording.name, "")
        try:
            return read_clip(self.library, recording, start, clip, self.size)
        except Damaged as error:
            return str(error)


def check_lengths(recordings: list[Recording], root: Any, clip: int) -> None:
    """Raise UserError where every recording is shorter than `clip` rows."""
    longest = max(recordings, key=lambda recording: recording.length)
    if longest.length < clip:
        raise UserError(
            f"clips of {clip} rows are asked for, and the longest recording to learn from in {root}, {longest.name}, "
            f"has {longest.length}: lower video.lengths"
        )


def read_clip(library: Library, recording: Recording, start: int, clip: int, size: int) -> dict[str, np.ndarray]:
    """Rows of a recording, each `(clip, ...)`, as docs/conventions.md has them; `before` `(A,)` is the action before
    the first. A recording that ends is cut off: truncated.

    Raises:
        Damaged: it cannot be read.
        UserError: it is of another form than its layout says.
    """
    reader, stop = library.reader, start + clip
    back = min(start, 1)
    actions = reader.actions(recording, start - back, stop)
    flags = np.zeros((3, clip), bool)
    flags[0, 0], flags[2, -1] = start == 0, stop == recording.length
    return {
        "image": reader.frames(recording, start, stop, size),
        "action": actions[back:],
        "before": actions[0] * back,
        "reward": reader.rewards(recording, start, stop),
        "surprise": np.zeros(clip, np.float32),
        **dict(zip(("is_first", "terminated", "truncated"), flags, strict=True)),
    }


def retraced(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A clip that is told by poses, out along its first half and back again: row t shows the frame of row `way[t]`, and
    the row before holds that frame's pose. Nothing is rewarded and nothing ends."""
    length = len(rows["image"])
    out = length // 2 + 1
    way = np.concatenate([np.arange(out), np.arange(out - 2, out - 2 - (length - out), -1)])
    poses = np.concatenate([rows["before"][None], rows["action"]])  # of row t at t
    last = np.zeros_like(poses[:1])
    calm = {key: np.zeros_like(rows[key]) for key in ("reward", "surprise", "terminated", "truncated")}
    return rows | calm | {"image": rows["image"][way], "action": np.concatenate([poses[way[1:]], last])}
