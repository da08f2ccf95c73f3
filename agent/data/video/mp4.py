"""Reading a range of frames of a video file: decoding begins at the key frame before it and ends after it.

Frames are those that a player shows, turned as it turns them. A file may hold more: cutting without encoding again
(`ffmpeg -ss 3 -i IN -c copy OUT`, and phones) keeps the frames from the key frame before the cut, and its edit list
says which ones are not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from longdream.agent.data.video.reader import Damaged, one_line, version
from longdream.envs.contract import UserError
from longdream.envs.images import resize_area

DELAY = 32
"""Frames after which every frame that was decoded is shown, with a margin: H.264 and H.265 allow 16."""


def measure(path: Path) -> tuple[int, tuple[int, int]]:
    """Number of frames that are shown, and their height and width. Only the first frame is decoded.

    Raises:
        Damaged: the file cannot be read. UserError: PyAV is not installed.
    """
    return _measured(path, *version(path))


def decode(path: Path, start: int, stop: int, size: int) -> np.ndarray:
    """Frames `start` to `stop` in display order, resized by area averaging: uint8 `(n, size, size, 3)`.

    Raises:
        Damaged: some of them cannot be decoded. UserError: PyAV is not installed.
    """
    times = _times(path, *version(path))
    if len(times) < stop:
        raise Damaged(f"is cut short: it ends after {len(times)} frames")
    wanted = {time: i for i, time in enumerate(times[start:stop])}
    frames: dict[int, np.ndarray] = {}
    # files are searched by the time at which frames are decoded, earlier than that at which they are shown: the key
    # frame that is found may be shown after the first of the frames that are wanted
    for time in (times[start], times[max(0, start - DELAY)], None):
        if len(frames) < len(wanted):
            frames |= _decoded(path, time, wanted, size)
    if len(frames) < len(wanted):
        raise Damaged(f"is damaged: {len(wanted) - len(frames)} of its frames {start} to {stop - 1} cannot be decoded")
    return np.stack([frames[i] for i in range(len(wanted))])


def _decoded(path: Path, time: int | None, wanted: dict[int, int], size: int) -> dict[int, np.ndarray]:
    """The wanted frames by number, decoded from the key frame before `time` on; from the first one for None.

    A decoder fills in what it cannot read, and says so for that frame. Those after it, up to a key frame, build on it.
    """
    frames: dict[int, np.ndarray] = {}
    filled_in = False
    with _stream(path) as (container, stream):
        if time is not None:
            container.seek(time, stream=stream, backward=True)
        for frame in container.decode(stream):
            filled_in = frame.is_corrupt or (filled_in and not frame.key_frame)
            if frame.pts in wanted and not filled_in:
                frames[wanted[frame.pts]] = resize_area(_shown(frame), size, size)
            if len(frames) == len(wanted):
                break
    return frames


def _shown(frame: Any) -> np.ndarray:
    """A decoded frame as a player shows it, `(height, width, 3)` uint8: mirrored and turned as its file says."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = _display_matrix(frame)
    if matrix is None:
        return pixels
    # a pixel at (x, y) is shown at (a x + c y, b x + d y), moved back into the picture; y points down
    (a, b, _), (c, d, _), _ = matrix.astype(np.int64)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.swapaxes(0, 1)
        down = b
        right = c
    else:
        down = d
        right = a
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])


def _display_matrix(frame: Any) -> np.ndarray | None:
    """The matrix `(3, 3)` int32 by which a frame is to be turned and mirrored; None if it is shown as it is."""
    for entry in frame.side_data:
        if entry.type.name == "DISPLAYMATRIX":
            return np.frombuffer(bytes(entry), np.int32).reshape(3, 3)
    return None


@lru_cache(maxsize=4096)
def _measured(path: Path, changed: int, file_size: int) -> tuple[int, tuple[int, int]]:
    with _stream(path) as (container, stream):
        index = getattr(stream, "index_entries", ())  # PyAV before 16 has none
        # the index has every frame, unless the file consists of fragments: then the header counts none
        frames = sum(not entry.is_discard for entry in index) if 0 < stream.frames == len(index) else 0
        first = next(container.decode(stream), None)
        size = None if first is None else _shown(first).shape
    frames = frames or len(_times(path, changed, file_size))
    if not frames or size is None:
        raise Damaged("holds no frames")
    height, width, _ = size
    return frames, (height, width)


@lru_cache(maxsize=512)
def _times(path: Path, changed: int, file_size: int) -> tuple[int, ...]:
    """Presentation times of all frames that are shown, in the stream's time unit, sorted. Packets are not decoded."""
    with _stream(path) as (container, stream):
        times = {packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard}
    if None in times:
        raise Damaged("does not say when its frames are shown: write it again as an mp4")
    return tuple(sorted(times))


@contextmanager
def _stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """The file and its video stream: the main one, not a cover picture."""
    try:
        import av  # imported here: other layouts are read without it
        import av.error
    except ImportError as error:
        raise UserError(f"reading {path} needs PyAV: pip install 'longdream[video]' ({one_line(error)})") from None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise Damaged("holds no video")
            if stream.codec_context is None:
                raise Damaged("holds a video of a kind that cannot be decoded")
            stream.codec_context.thread_count = 1  # clips are read in parallel already
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise Damaged(f"is damaged or no video ({one_line(error)})") from error
