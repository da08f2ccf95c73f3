"""Batches of clips. Threads read the next ones while the current one is learned from; they do not affect the order."""

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
"""Batches that are read in advance."""


@dataclass(frozen=True)
class Place:
    """The reader's position: with the seed and the list of damaged files, it determines the next batch.

    clip: rows of a clip in this epoch. position: batches of the epoch that have been read. line: for each clip of the
    last batch that was read here, the number of its recording and the row after its last.
    """

    epoch: int = -1
    position: int = 0
    clip: int = 0
    line: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A batch: its rows, as `Batch.of` takes them or as `bring` returned them; the reader's position after it; and the
    files that were found damaged."""

    rows: Any
    place: Place
    damaged: dict[str, str] = field(default_factory=dict)


class Loader:
    """Draws batches of clips from recordings.

    Args:
        recordings: those to draw from. plan: for each update, the rows of a clip and the clips of its batch.
        size: height and width of the images. carry: whether clip b of a batch continues clip b of the last batch.
        update, place: the first update, and the reader's position before it.
        retrace: share of clips whose second half is the way back (`retraced`).
        shard, shards: this loader reads every batch's part of that number, of so many: they do not overlap, and
            together they are the batches of a single one.
        bring: called with a batch's rows in the reading thread, for example to copy them to a device.
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
        shard: int = 0,
        shards: int = 1,
        bring: Callable[[dict[str, Any]], Any] = lambda rows: rows,
    ):
        self.library = library
        self.recordings = recordings
        self.plan = plan
        self.size = size
        self.seed = seed
        self.carry = carry
        self.update = update
        self.retrace = retrace
        self.shard = shard
        self.shards = shards
        self.bring = bring
        self.lengths = [recording.length for recording in recordings]
        self.place = place or Place()
        self._damaged = dict(library.damaged)  # as the reading thread knows them: it is batches ahead
        self._orders: tuple[tuple[int, int, int], np.ndarray] = ((-1, 0, 0), np.empty(0))
        self._queue: queue.Queue[Loaded | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def next(self) -> Loaded:
        """The next batch. Files that were found damaged are added to the library.

        Raises:
            UserError: a file does not have the form of its layout, or no readable recording is long enough.
        """
        loaded = self._queue.get()
        if isinstance(loaded, BaseException):
            raise loaded
        self.place = loaded.place
        self.library.damaged.update(loaded.damaged)
        return loaded

    def too_short(self, clip: int) -> int:
        """Number of recordings that are shorter than a clip."""
        return sum(length < clip for length in self.lengths)

    def close(self) -> None:
        """Stop the threads."""
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    # -- in the reading thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        place = self.place
        update = self.update
        try:
            while not self._stop.is_set():
                loaded = self._load(place, *self.plan(update))
                place = loaded.place
                update += 1
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
        each = batch // self.shards
        begin = self.shard * each
        slots = [(int(recording), int(start)) for recording, start in order[place.position, begin : begin + each]]
        clips = []
        line = []
        damaged: dict[str, str] = {}
        for i, rows_or_error in enumerate(list(self._pool.map(lambda slot: self._try(slot[0], slot[1], clip), slots))):
            recording, start = slots[i]
            tries = 0
            while isinstance(rows_or_error, str):  # another clip of the epoch replaces it
                if (name := self.recordings[recording].name) not in self._damaged:
                    damaged[name] = rows_or_error
                    self._damaged[name] = rows_or_error
                if tries == order.size // 2:
                    name, why = next(iter(self._damaged.items()))
                    raise UserError(
                        f"{self.library.root}: no recording of {clip} rows is left that can be read; of "
                        f"{len(self._damaged)}, {name} {why}"
                    )
                tries += 1
                later = ((place.position + 1) * batch + begin + i + tries) % (order.size // 2)
                recording, start = map(int, order.reshape(-1, 2)[later])
                rows_or_error = self._try(recording, start, clip)
            follows = self.carry and i < len(place.line) and place.line[i] == (recording, start)
            rows_or_error["is_first"][0] = not follows
            number = place.position * batch + begin + i
            back = int((number + 1) * self.retrace) > int(number * self.retrace)
            clips.append(retraced(rows_or_error) if back else rows_or_error)
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
        """The rows of the clip, or what is wrong with its file."""
        recording = self.recordings[number]
        if recording.name in self._damaged:
            return self._damaged[recording.name]
        try:
            return read_clip(self.library, recording, start, clip, self.size)
        except Damaged as error:
            return str(error)


def check_lengths(recordings: list[Recording], root: Any, clip: int) -> None:
    """Raise UserError if every recording is shorter than `clip` rows."""
    longest_recording = max(recordings, key=lambda recording: recording.length)
    if longest_recording.length < clip:
        raise UserError(
            f"clips of {clip} rows are asked for, and the longest recording to learn from in {root}, "
            f"{longest_recording.name}, has {longest_recording.length}: lower video.lengths"
        )


def read_clip(library: Library, recording: Recording, start: int, clip: int, size: int) -> dict[str, np.ndarray]:
    """The rows `start` to `start + clip` of a recording, each `(clip, ...)`, as in docs/conventions.md.

    `before` `(A,)` is the action before the first row. The last row of a recording is truncated.

    Raises:
        Damaged: the file cannot be read.
        UserError: the file does not have the form of its layout.
    """
    reader = library.reader
    stop = start + clip
    back = min(start, 1)
    actions = reader.actions(recording, start - back, stop)
    flags = np.zeros((3, clip), bool)
    flags[0, 0] = start == 0
    flags[2, -1] = stop == recording.length
    return {
        "image": reader.frames(recording, start, stop, size),
        "action": actions[back:],
        "before": actions[0] * back,
        "reward": reader.rewards(recording, start, stop),
        "surprise": np.zeros(clip, np.float32),
        **dict(zip(("is_first", "terminated", "truncated"), flags, strict=True)),
    }


def retraced(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A clip with poses as actions, played along its first half and back again.

    Row t shows the frame of row `way[t]`, and the row before holds that frame's pose. Rewards and ends are 0."""
    length = len(rows["image"])
    out = length // 2 + 1
    way = np.concatenate([np.arange(out), np.arange(out - 2, out - 2 - (length - out), -1)])
    poses = np.concatenate([rows["before"][None], rows["action"]])  # pose t is that of row t
    last = np.zeros_like(poses[:1])
    zeros = {key: np.zeros_like(rows[key]) for key in ("reward", "surprise", "terminated", "truncated")}
    return rows | zeros | {"image": rows["image"][way], "action": np.concatenate([poses[way[1:]], last])}
