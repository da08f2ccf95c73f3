"""`longdream watch`: what runs have written so far, for a page that follows them. Nothing of a run is executed."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from longdream.agent.config import options
from longdream.agent.core.device import free_bytes
from longdream.agent.run import files
from longdream.agent.run.logger import PICTURES
from longdream.envs.contract import UserError

POINTS = 300
"""Points of a curve, at most; a longer one is averaged."""
MOST_KEYS = 200
"""Curves of a run, at most."""
READ_BYTES = 8 << 20
"""Of a run's metrics that are read at a time."""
LINE_BYTES = 1 << 20
"""Of one line of metrics, at most."""
PICTURE_BYTES = 32 << 20
QUIET_S = 120.0
"""A run that has written nothing for so long counts as stopped."""
MOST_RUNS = 50
TYPES = {".gif": "image/gif", ".png": "image/png"}


@dataclass
class Curve:
    """A metric over steps: each point is the mean of `each` values."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    each: int = 1
    waiting: list[tuple[float, float]] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        self.waiting.append((x, y))
        if len(self.waiting) < self.each:
            return
        self.x.append(self.waiting[-1][0])
        self.y.append(sum(value for _, value in self.waiting) / len(self.waiting))
        self.waiting = []
        if len(self.x) >= 2 * POINTS:
            self.each *= 2
            self.y = [(a + b) / 2 for a, b in zip(self.y[::2], self.y[1::2], strict=True)]
            self.x = self.x[1::2]

    def to_json(self) -> list[list[float]]:
        x, y = list(self.x), list(self.y)
        if self.waiting:  # the newest values are shown, even if they are too few for a point
            x.append(self.waiting[-1][0])
            y.append(sum(value for _, value in self.waiting) / len(self.waiting))
        return [x, [float(f"{value:.5g}") for value in y]]


class WatchedRun:
    """The record of a run as far as it is written.

    version: another number whenever there is something new.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 0
        self.curves: dict[str, Curve] = {}
        self.offset = 0
        self.written = 0.0
        self.step = 0
        self.state = ""
        self.pictures: dict[str, int] = {}
        self.about: dict[str, Any] = {}
        try:
            config = options.load(str(folder / "config.yaml"))
            total = config.learn.steps if config.kind == "online" else config.learn.updates
            self.about = {"kind": config.kind, "env": config.env.id, "total": total}
        except UserError as error:
            self.about = {"problem": str(error)}

    def poll(self) -> None:
        """Read what is new."""
        try:
            self._metrics()
            self._pictures()
            self._state()
        except OSError as error:
            self.about["problem"] = error.strerror or str(error)

    def _metrics(self) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with files.opened(path) as (file, size):
            if size < self.offset:  # the run went on from a checkpoint, and writes these lines again
                self.offset = 0
                self.curves = {}
            if size == self.offset:
                return
            file.seek(self.offset)
            data = file.read(READ_BYTES)
            self.written = os.fstat(file.fileno()).st_mtime
        end = data.rfind(b"\n") + 1
        if not end and len(data) > LINE_BYTES:
            end = len(data)  # no line of ours
        self.offset += end
        for line in data[:end].splitlines():
            self._line(line)
        if end:
            self.version += 1

    def _line(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            step = float(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        self.step = max(self.step, int(step))
        for key, value in values.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and (key in self.curves or len(self.curves) < MOST_KEYS):
                self.curves.setdefault(key[:80], Curve()).add(step, float(value))

    def _pictures(self) -> None:
        newest = {}
        folder = self.folder / PICTURES
        if folder.is_dir() and not folder.is_symlink():
            for path in sorted(folder.iterdir()):
                if path.suffix in TYPES and not path.is_symlink():
                    newest[path.name] = path.stat().st_mtime_ns // 1_000_000
        if newest != self.pictures:
            self.pictures = newest
            self.version += 1

    def _state(self) -> None:
        finished = (self.folder / "summary.json").exists()
        lively = time.time() - self.written < QUIET_S
        state = "finished" if finished else "training" if lively else "quiet"
        if state != self.state:
            self.state = state
            self.version += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.folder.name,
            "about": self.about,
            "state": self.state,
            "step": self.step,
            "curves": {key: curve.to_json() for key, curve in self.curves.items()},
            "pictures": self.pictures,
        }


class WatchService:
    """A run, or all runs of a folder.

    Raises:
        UserError: there is no such folder, or it holds no run.
    """

    page = "watch.html"

    def __init__(self, what: Path) -> None:
        self.root = what
        self.alone = (what / "config.yaml").is_file()
        if not what.is_dir():
            raise UserError(f"{what}: there is no such folder; give one such as runs/ or runs/quickstart-s1-1")
        if not self.alone and not self._folders():
            raise UserError(f"{what} holds no run: give the folder of a run, or of runs")
        self.runs: dict[str, WatchedRun] = {}
        self.turn = asyncio.Lock()

    def _folders(self) -> list[Path]:
        if self.alone:
            return [self.root.resolve()]  # "." has a name, too
        folders = [path.parent for path in self.root.glob("*/config.yaml")]
        newest = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        return newest[:MOST_RUNS]

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/data", self.data), web.get("/picture", self.picture)]

    async def work(self) -> None:
        await asyncio.Event().wait()

    async def data(self, request: web.Request) -> web.Response:
        """Runs that have changed since the page saw them, `?seen={"name": version}`, and the machine."""
        try:
            seen = json.loads(request.query.get("seen", "{}"))
            seen = seen if isinstance(seen, dict) else {}
        except (ValueError, RecursionError):
            seen = {}
        async with self.turn:
            content = await asyncio.to_thread(self._poll, seen)
        response = web.json_response(text=content)
        response.enable_compression()
        return response

    def _poll(self, seen: dict[str, Any]) -> str:
        folders = {path.name: path for path in self._folders()}
        self.runs = {name: self.runs.get(name) or WatchedRun(path) for name, path in folders.items()}
        for run in self.runs.values():
            run.poll()
        changed = {
            name: {"version": run.version, **run.to_json()}
            for name, run in self.runs.items()
            if seen.get(name) != run.version
        }
        return json.dumps(
            {"root": str(self.root), "names": list(self.runs), "runs": changed, "machine": self._machine()}
        )

    def _machine(self) -> dict[str, Any]:
        import torch

        return {
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "free_memory": free_bytes(torch.device("cpu")),
            "free_disk": shutil.disk_usage(self.root).free,
        }

    async def picture(self, request: web.Request) -> web.Response:
        """A picture of a run; its name is one that `data` gave."""
        run = self.runs.get(request.query.get("run", ""))
        name = request.query.get("name", "")
        if run is None or name not in run.pictures:
            return web.Response(status=404, text="there is no such picture\n")
        try:
            path = run.folder / PICTURES / name
            files.check_own_path(run.folder, path)
            data = await asyncio.to_thread(_read, path)
        except (OSError, UserError) as error:
            return web.Response(status=404, text=f"{error}\n")
        return web.Response(body=data, content_type=TYPES[path.suffix])


def _read(path: Path) -> bytes:
    with files.opened(path) as (file, _):
        return file.read(PICTURE_BYTES)
