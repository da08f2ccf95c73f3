"""Reading a range of frames of a video file: decoding begins at the key frame before it and ends after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from longdream.agent.data.video.reader import Damaged, one_line
from longdream.envs.images import resize_area

FAULTS = (av.error.FFmpegError, OSError, ValueError, IndexError)


def measure(path: Path) -> tuple[int, tuple[int, int]]:
    """Number of frames, and their height and width. Raises Damaged."""
    with _stream(path) as (_, stream):
        size = (stream.height, stream.width)
        frames = stream.frames  # from the header; 0 if it does not say
    frames = frames or len(_times(path))
    if not frames:
        raise Damaged("holds no frames")
    return frames, size


def decode(path: Path, start: int, stop: int, size: int) -> np.ndarray:
    """Frames `start` to `stop` in display order, resized by area averaging: uint8 `(n, size, size, 3)`.

    Raises:
        Damaged: some of them cannot be decoded.
    """
    times = _times(path)
    if len(times) < stop:
        raise Damaged(f"is cut short: it ends after {len(times)} frames")
    wanted = {time: i for i, time in enumerate(times[start:stop])}
    frames: dict[int, np.ndarray] = {}
    with _stream(path) as (container, stream):
        container.seek(times[start], stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                frames[wanted[frame.pts]] = resize_area(frame.to_ndarray(format="rgb24"), size, size)
            if len(frames) == len(wanted):
                break
    if len(frames) < stop - start:
        raise Damaged(f"is damaged: {stop - start - len(frames)} of its frames {start} to {stop - 1} cannot be decoded")
    return np.stack([frames[i] for i in range(stop - start)])


def _times(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return _times_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)
def _times_of(path: Path, changed: int, size: int) -> tuple[int, ...]:
    """Presentation times of all frames in the stream's time unit, sorted. Packets are not decoded for it."""
    with _stream(path) as (container, stream):
        times = [packet.pts for packet in container.demux(stream) if packet.size]
    if None in times:
        raise Damaged("does not say when its frames are shown: write it again as an mp4")
    return tuple(sorted(times))


@contextmanager
def _stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """The file and its first video stream."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # clips are read in parallel already
            yield container, stream
    except FAULTS as error:
        raise Damaged(f"is damaged or no video ({one_line(error)})") from error
