"""Reading a range of rows of an entry of an NPZ file, and the shapes and types of entries, without the rest."""

from __future__ import annotations

import re
import threading
import tokenize
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from longdream.agent.data.video.found import files_below
from longdream.agent.data.video.reader import Damaged, one_line, version

Entries = dict[str, tuple[tuple[int, ...], np.dtype]]
HEADER = re.compile(
    rb"\{'descr': '(?P<type>[<>|=]?[a-zA-Z]\d*)', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>[\d, ]*)\),? *\} *\n"
)
"""The header of an NPY file as NumPy writes it for arrays without fields."""
LONGEST_HEADER = 10_000
ONE_AT_A_TIME = threading.Lock()
"""For headers of other forms."""


def files_with(root: Path, keys: tuple[str, ...]) -> list[Path]:
    """All NPZ files below `root`, sorted, if one of them has entries of these names; otherwise none."""
    files = files_below(root, ".npz")
    for path in files:
        with suppress(Damaged):
            if set(keys) <= entries(path).keys():
                return files
    return []


def entries(path: Path) -> Entries:
    """Shape and type of every entry. Raises Damaged."""
    return _entries(path, *version(path))


@lru_cache(maxsize=1 << 14)  # the layouts before the one that fits look at the same files
def _entries(path: Path, changed: int, size: int) -> Entries:
    with _archive(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name.removesuffix(".npy"): read_header(archive.open(name))[:2] for name in names}


def rows(path: Path, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` (None: to the end) of an entry. Rows after them are not decompressed.

    The archive has one checksum per entry, which is verified only if the entry is read to its end.

    Raises:
        Damaged: they cannot be read.
    """
    with _archive(path) as archive, archive.open(f"{key}.npy") as file:
        shape, dtype, fortran = read_header(file)
        if (fortran and len(shape) > 1) or dtype.hasobject:
            raise ValueError(f"{key!r} is not stored row by row")
        total, *axes = list(shape)
        row_bytes = dtype.itemsize * prod(axes)
        stop = total if stop is None else stop
        file.seek(start * row_bytes, 1)
        data = file.read((stop - start) * row_bytes)
        if len(data) < (stop - start) * row_bytes:
            raise ValueError(f"{key!r} ends before row {stop}")
        if stop == total:
            file.read(1)  # reading past the end verifies the checksum
        return np.frombuffer(data, dtype).reshape(-1, *axes)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (Damaged, MemoryError):
        raise
    except Exception as error:  # zipfile, its decompressors and numpy raise a dozen kinds for bytes that are no archive
        raise Damaged(f"is damaged or no NPZ file ({one_line(error)})") from error


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape and type of the array in an NPY file, and whether it is in Fortran order; the array comes next.

    NumPy reads headers by `ast.literal_eval`, which in CPython 3.11 fails at times if several threads are in it
    (SystemError: AST constructor recursion depth mismatch). As NumPy writes them, they are read here without it.

    Raises:
        ValueError: it is no NPY file.
    """
    begin = file.tell()
    version = np.lib.format.read_magic(file)
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if match := HEADER.fullmatch(file.read(min(length, LONGEST_HEADER))):
        shape = tuple(int(part) for part in match["shape"].split(b",") if part.strip())
        return shape, np.dtype(match["type"].decode()), match["fortran"] == b"True"
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with ONE_AT_A_TIME:
        file.seek(begin)
        np.lib.format.read_magic(file)
        try:
            shape, fortran, dtype = read(file)
        except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError, TypeError) as error:
            raise ValueError(f"its header cannot be read ({one_line(error)})") from None
    return shape, dtype, fortran
