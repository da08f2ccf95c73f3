"""Some rows of an entry of an NPZ file, without the rows behind them, and what an entry is, without any."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from longdream.agent.data.video.reader import Damaged, one_line

FAULTS = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, NotImplementedError)


def files_with(root: Path, keys: tuple[str, ...]) -> list[Path]:
    """All NPZ files below `root`, sorted, if the first that can be read has entries of these names; else none."""
    files = sorted(root.rglob("*.npz"))
    for path in files:
        with suppress(Damaged):
            return files if set(keys) <= entries(path).keys() else []
    return []


def entries(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every entry. Raises Damaged."""
    with _archive(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name.removesuffix(".npy"): _header(archive.open(name))[:2] for name in names}


def rows(path: Path, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` (None: the last) of an entry; what lies behind them is not unpacked. Raises Damaged.

    The archive's checksum is over a whole entry: it is compared where that is read to its end.
    """
    with _archive(path) as archive, archive.open(f"{key}.npy") as file:
        shape, dtype, fortran = _header(file)
        if (fortran and len(shape) > 1) or dtype.hasobject:
            raise ValueError(f"{key!r} is not stored row by row")
        total, *axes = list(shape)
        wide, stop = dtype.itemsize * prod(axes), total if stop is None else stop
        file.seek(start * wide, 1)
        data = file.read((stop - start) * wide)
        if len(data) < (stop - start) * wide:
            raise ValueError(f"{key!r} ends before row {stop}")
        if stop == total:
            file.read(1)  # beyond the end: the checksum is compared
        return np.frombuffer(data, dtype).reshape(-1, *axes)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FAULTS as error:
        raise Damaged(f"is damaged or no NPZ file ({one_line(error)})") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, type, and whether it is stored column by column."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, dtype, fortran
