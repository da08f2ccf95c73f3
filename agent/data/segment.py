"""One file of the replay: consecutive times of all streams, memory-mapped and verified by checksum."""

import mmap
import os
import zlib
from array import array
from bisect import bisect_right
from pathlib import Path

import numpy as np

from longdream.agent.run.checkpoint import NO_ROOM, DiskFull

ALIGN = 64

Fields = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape of one row, dtype as stored


class DamagedSegment(Exception):
    """A segment file cannot be used. The message says what is wrong with it."""


class Segment:
    """One mapped file with `rows` written times of all streams. What sampling needs of them is kept in memory."""

    def __init__(self, handle: int, seq: int, num_envs: int, length: int, fields: Fields):
        self.seq = seq
        self.begin = seq * length
        self.rows = 0
        offsets, size = _offsets(num_envs, length, fields)
        self.map = mmap.mmap(handle, size)
        self.data: dict[str, np.ndarray] = {}
        for name, (shape, dtype) in fields.items():
            count = num_envs * length * int(np.prod(shape))
            block = np.frombuffer(self.map, dtype, count, offsets[name])
            self.data[name] = block.reshape(num_envs, length, *shape)
        self.row_bytes = size // (num_envs * length)
        self.totals = np.zeros(num_envs)  # sum of priority by stream
        self.start_times = array("q")  # of is_first rows, in order of time
        self.start_envs = array("q")  # their streams
        self._sums = [[0] * num_envs for _ in fields]  # checksum of each stream of each field, up to row _summed
        self._summed = 0
        self._synced = 0

    @classmethod
    def create(cls, path: Path, seq: int, num_envs: int, length: int, fields: Fields) -> "Segment":
        size = _offsets(num_envs, length, fields)[1]
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(handle, 0, size)  # writing to a mapped page without disk space kills the process
            return cls(handle, seq, num_envs, length, fields)
        except OSError as error:
            path.unlink()
            if error.errno in NO_ROOM:
                raise DiskFull(path.parent, size, error) from error
            raise
        finally:
            os.close(handle)  # the mapping has its own handle

    @classmethod
    def open(
        cls, path: Path, seq: int, num_envs: int, length: int, fields: Fields, rows: int, checksum: int
    ) -> "Segment":
        """Map an existing file. Raises DamagedSegment unless its first `rows` times have this checksum."""
        size = _offsets(num_envs, length, fields)[1]
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            raise DamagedSegment("is missing") from None
        try:
            if os.fstat(handle).st_size != size:
                raise DamagedSegment(f"is truncated ({os.fstat(handle).st_size:,} of {size:,} bytes)")
            segment = cls(handle, seq, num_envs, length, fields)
        finally:
            os.close(handle)
        segment.rows = segment._synced = rows
        intact = segment.checksum() == checksum
        if intact:
            times, envs = np.nonzero(segment.data["is_first"][:, :rows].T)
            segment.start_times.extend((segment.begin + times).tolist())
            segment.start_envs.extend(envs.tolist())
            segment.totals = segment.data["mass"][:, rows - 1].copy()
        segment.release()
        if not intact:
            segment.close()
            raise DamagedSegment("is altered (checksum differs)")
        return segment

    def append(self, values: dict[str, np.ndarray], mass: np.ndarray) -> None:
        """Append one row to every stream. mass `(n,)` >= 0 is the priority of each."""
        for name, value in values.items():
            self.data[name][:, self.rows] = value
        self.totals = self.totals + mass
        self.data["mass"][:, self.rows] = self.totals
        for env in np.flatnonzero(values["is_first"]).tolist():
            self.start_times.append(self.begin + self.rows)
            self.start_envs.append(env)
        self.rows += 1

    def count_starts(self, limit: int) -> int:
        """How many is_first rows there are up to and including time `limit`."""
        return bisect_right(self.start_times, limit)

    def checksum(self) -> int:
        """CRC-32 over the checksums of every stream of every field. Only rows added since the last call are read."""
        if self._summed < self.rows:
            for sums, data in zip(self._sums, self.data.values(), strict=True):
                for env, stream in enumerate(data[:, self._summed : self.rows]):
                    sums[env] = zlib.crc32(stream.view(np.uint8), sums[env])
            self._summed = self.rows
        return zlib.crc32(np.array(self._sums, np.uint32).tobytes())

    def release(self) -> None:
        """Release the mapped pages, which count as resident memory. The data stays in the page cache or on disk."""
        self.map.madvise(mmap.MADV_DONTNEED)

    def sync(self) -> None:
        if self._synced < self.rows:
            self.map.flush()
            self._synced = self.rows

    def close(self) -> None:
        self.data.clear()  # a map cannot be closed while views of it exist
        self.map.close()


def _offsets(num_envs: int, length: int, fields: Fields) -> tuple[dict[str, int], int]:
    """The offset of each field in a segment file, and the size of the file, in bytes."""
    offsets: dict[str, int] = {}
    size = 0
    for name, (shape, dtype) in fields.items():
        offsets[name] = size
        size += -(-num_envs * length * int(np.prod(shape)) * dtype.itemsize // ALIGN) * ALIGN
    return offsets, size
