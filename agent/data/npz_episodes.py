"""Episodes in the format of the published offline data of Memory Maze: one NPZ file per episode, 1,001 rows each.

The format is that of the data set of Pasukonis, Lillicrap and Hafner (2022, arXiv 2210.13383). Row t holds the
observation and the true state at time t, and the action and reward that led there. Row 0 has neither; both are 0 there.
(In the rows of docs/conventions.md, action_t is chosen from obs_t. Here it is `action[t + 1]`.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from longdream.envs.contract import UserError

STEPS = 1000
"""Steps of an episode on disk; longer episodes are cut. It has one row more."""

# Axes by letter: t rows, s cells along a side, k targets. Then the allowed kinds of NumPy dtypes; "b" is boolean.
LAYOUT: dict[str, tuple[str, str]] = {
    "image": ("t 64 64 3", "u"),
    "action": ("t 6", "buif"),
    "reward": ("t", "buif"),
    "maze_layout": ("t s s", "bui"),
    "agent_pos": ("t 2", "f"),
    "agent_dir": ("t 2", "f"),
    "targets_pos": ("t k 2", "f"),
    "targets_vec": ("t k 2", "f"),
    "target_pos": ("t 2", "f"),
    "target_vec": ("t 2", "f"),
    "target_color": ("t 3", "f"),
}
"""Shape and allowed types of every entry; docs/memory-maze.md lists units and axes."""


def row(
    image: np.ndarray, action: int | None, reward: float, probes: Mapping[str, np.ndarray], actions: int = 6
) -> dict[str, np.ndarray]:
    """One row of an episode: image and probes after `action` (None in the first row), which earned `reward`."""
    prompted = int(probes["target_index"])
    hot = np.zeros(actions, np.float32)
    if action is not None:
        hot[action] = 1
    vectors = {key: probes[key] for key in ("agent_pos", "agent_dir", "targets_pos", "targets_vec", "target_color")}
    vectors |= {"target_pos": probes["targets_pos"][prompted], "target_vec": probes["targets_vec"][prompted]}
    return {
        "image": image,
        "action": hot,
        "reward": np.array(reward, np.float32),
        "maze_layout": probes["maze_layout"],
        **{key: np.asarray(value, np.float32) for key, value in vectors.items()},
    }


def write(path: Path, rows: list[dict[str, np.ndarray]]) -> None:
    """Write the rows of an episode to `path`. They go to a temporary file first, so that `path` is never incomplete.

    Raises:
        UserError: the file cannot be written.
    """
    episode = {key: np.stack([row[key] for row in rows]) for key in LAYOUT}
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **episode)  # pyright: ignore[reportArgumentType] (keywords are arrays)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the entries of LAYOUT from one file, published or ours; other entries are ignored.

    Returns:
        arrays with a row per time step: image uint8 (T, 64, 64, 3), action (T, 6) one-hot, reward (T,), and the
        probes, in the types that the file has.

    Raises:
        UserError: the file is missing or damaged, or has another layout; the message names file and entry.
    """
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} holds one array, not the entries of an episode")
            missing = [key for key in LAYOUT if key not in file.files]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}: it is no episode of Memory Maze's offline data")
            episode = {key: _entry(path, key, file) for key in LAYOUT}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged or no NPZ file ({_one_line(error)}): get it again") from error
    _check(path, episode)
    return episode


def _entry(path: Path, key: str, file: Mapping[str, np.ndarray]) -> np.ndarray:
    try:
        entry = file[key]
    except Exception as error:  # zipfile, its decompressors and numpy raise a dozen kinds for bytes that are no array
        raise UserError(f"{path} is damaged: {key!r} cannot be read ({_one_line(error)}): get it again") from error
    if not isinstance(entry, np.ndarray):  # bytes that do not begin as an array does
        raise UserError(f"{path} is damaged: {key!r} is no array: get it again")
    return entry


def check_shapes(entries: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, int]:
    """Compare the shape and type of every entry with LAYOUT.

    Returns:
        rows, cells along a side, and targets: sizes by the letters of LAYOUT.

    Raises:
        ValueError: an entry is missing, or has another shape or type.
    """
    missing = [key for key in LAYOUT if key not in entries]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}: it is no episode of Memory Maze's offline data")
    sizes: dict[str, int] = {}
    for key, (axes, kinds) in LAYOUT.items():
        shape, dtype = entries[key]
        names = axes.split()
        fits = len(shape) == len(names) and all(
            size == (int(name) if name.isdigit() else sizes.setdefault(name, size))
            for name, size in zip(names, shape, strict=True)
        )
        if not fits:
            known = " ".join(str(sizes.get(name, name)) for name in names)
            raise ValueError(f"{key!r} has shape {shape}, not ({known.replace(' ', ', ')})")
        if dtype.kind not in kinds or (key == "image" and dtype != np.uint8):
            raise ValueError(f"{key!r} has type {dtype}")
    return sizes


def _check(path: Path, episode: dict[str, np.ndarray]) -> None:
    """Raise UserError where shapes or types differ from LAYOUT, or values are impossible."""
    try:
        sizes = check_shapes({key: (value.shape, value.dtype) for key, value in episode.items()})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    for key, value in episode.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            at = np.argwhere(~np.isfinite(value))[0][0]
            raise UserError(f"{path}: {key!r} is not finite in row {at}")
    if sizes["t"] < 2:
        raise UserError(f"{path}: {sizes['t']} rows are no episode")
    action = episode["action"]
    wrong = np.flatnonzero((np.sort(action[1:], 1) != [0, 0, 0, 0, 0, 1]).any(1))
    if len(wrong):
        raise UserError(f"{path}: 'action' is no one-hot in row {wrong[0] + 1}")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
