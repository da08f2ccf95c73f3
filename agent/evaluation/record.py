"""What runs have recorded, read without opening them: nothing of a run is executed, and it may still be training."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longdream.agent.config import options
from longdream.agent.config.flags import shown
from longdream.agent.run.files import opened, read_text
from longdream.agent.run.folder import summary
from longdream.envs.contract import UserError

RETURNS = ("evaluate/return_mean", "final/return_mean")
"""Metrics that make the curve of returns: evaluations during training, and the one at its end."""
SEED = re.compile(r"-s(\d+)(-\d+)?$|[-_.]?\d+$")
"""The end of a folder's name that tells runs of one group apart: NAME-s3, NAME-s3-1, or NAME3."""


@dataclass(frozen=True)
class Curve:
    """Values of a metric over a run, each `(T,)`: at real steps (updates, for a run without an environment), after
    seconds of wall-clock time, after updates."""

    steps: np.ndarray
    wall: np.ndarray
    updates: np.ndarray
    value: np.ndarray

    def at(self, axis: str, x: float) -> float:
        """The last value at or before x on that axis; the first one if there is none."""
        return float(self.value[max(0, np.searchsorted(getattr(self, axis), x, "right") - 1)])


@dataclass(frozen=True)
class Record:
    """The record of a run.

    env: the environment that it is evaluated in, with its arguments, in one word; of a run on video, its data.
    """

    folder: Path
    env: str
    seed: int

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that can be read."""
        try:
            with opened(self.folder / "metrics.jsonl") as (file, _):
                return [line for line in map(_parsed, file) if isinstance(line, dict) and _is_number(line.get("step"))]
        except OSError as error:
            raise UserError(f"{self.folder / 'metrics.jsonl'} cannot be read ({error.strerror})") from None

    def curve(self, metric: str | None = None) -> Curve:
        """The curve of a metric; None: of the returns of evaluations.

        Raises:
            UserError: the run has no such metric.
        """
        names = (metric,) if metric else RETURNS
        points = [(line["step"], line[name]) for line in self.lines for name in names if _is_number(line.get(name))]
        if not points:
            known = sorted({key for line in self.lines for key in line if "/" in key and not key.startswith("time/")})
            hint = f"it has {', '.join(known)}" if known else "it has none yet"
            raise UserError(f"{self.folder} has no metric {' or '.join(names)}: {shown(hint, 400)}")
        steps, value = (np.array(column, np.float64) for column in zip(*points, strict=True))
        return Curve(steps, self._at(steps, "time/wall"), self._at(steps, "count/updates"), value)

    def _at(self, steps: np.ndarray, key: str) -> np.ndarray:
        """A value that lines of metrics tell, between them; 0 at step 0."""
        known = [(line["step"], line[key]) for line in self.lines if _is_number(line.get(key))]
        known = [(0.0, 0.0), *known]
        at, value = (np.array(column, np.float64) for column in zip(*known, strict=True))
        return np.interp(steps, at, value)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # the last one may be half written
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read(folder: Path) -> Record:
    """The record of a run, or of a baseline.

    Raises:
        UserError: there is no run, or one of another version.
    """
    if (folder / "baseline.json").is_file():
        try:
            known = json.loads(read_text(folder / "baseline.json"))
            return Record(folder, _env(known["env"], known["env_kwargs"]), int(known["seed"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder / 'baseline.json'} cannot be read: put it back as it was") from None
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it holds no config.yaml; give folders such as runs/quickstart-s1-1")
    config = options.load(str(folder / "config.yaml"))
    if config.kind == "video":
        return Record(folder, config.video.data, config.seed)
    return Record(folder, _env(config.evaluation_env.id, config.evaluation_env.kwargs), config.seed)


def _env(env: str, kwargs: dict[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in sorted(kwargs.items()))
    return f"{env}({arguments})" if arguments else env


def groups(words: Iterable[str | Path]) -> dict[str, list[Record]]:
    """Runs by group. Folders whose names differ only in their seeds are a group; so are all that match one quoted
    pattern, such as 'runs/a*'.

    Raises:
        UserError: a word names no run, a run is named twice, or environments differ.
    """
    by_name: dict[str, list[Record]] = {}
    seen: set[Path] = set()
    for word in map(str, words):
        pattern = any(letter in word for letter in "*?[") and not os.path.lexists(word)
        folders = sorted(map(Path, glob.glob(word))) if pattern else [Path(word)]
        folders = [folder for folder in folders if not pattern or folder.is_dir()]
        if not folders:
            raise UserError(f"no run matches {word!r}")
        for folder in folders:
            if folder.resolve() in seen:
                raise UserError(f"{folder} is named twice")
            seen.add(folder.resolve())
            name = word if pattern else SEED.sub("", folder.name) or folder.name
            by_name.setdefault(name, []).append(read(folder))
    records = [record for group in by_name.values() for record in group]
    for record in records[1:]:
        if record.env != records[0].env:
            raise UserError(
                f"{records[0].folder} plays {records[0].env}, {record.folder} plays {record.env}: compare runs of one "
                f"environment"
            )
    return by_name


# -- the state of a run ------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, Any]:
    """What can be said of a run, as JSON values: its status (training, complete, stopped or unreadable), environment,
    seed, steps, last return, size in bytes, and when it was last written to (seconds since 1970)."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    known: dict[str, Any] = {
        "run": str(folder),
        "status": "training" if _is_locked(folder) else "stopped",
        "size": sum(path.stat().st_size for path in files),
        "written": max((path.stat().st_mtime for path in files), default=folder.stat().st_mtime),
    }
    done = summary(folder)
    if done is not None and known["status"] == "stopped":
        known["status"] = "complete"
    try:
        record = read(folder)
        lines = record.lines
    except UserError as error:
        return known | {"status": "unreadable", "problem": str(error)}
    known |= {"env": record.env, "seed": record.seed, "steps": int(lines[-1]["step"]) if lines else 0}
    returns = [line[name] for line in lines for name in RETURNS if _is_number(line.get(name))]
    return known | {"return": returns[-1] if returns else None}


def _is_locked(folder: Path) -> bool:
    """Whether a process trains in it."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
