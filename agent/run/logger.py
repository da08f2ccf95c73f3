"""The metrics of a run: metrics.jsonl, what shows them elsewhere, and a line on the console."""

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from longdream.agent.run.checkpoint import NO_ROOM, DiskFull
from longdream.agent.run.files import opened
from longdream.agent.run.metrics import RATES
from longdream.agent.run.sinks import Drawing, Drawn, Factory, Sink, Warned, find

Value = float | int | str | None
PICTURES = Path("videos") / "training"
"""Folder in a run of the newest pictures of each kind."""
TENSORBOARD = find(["tensorboard"], {})


class Logger:
    """Appends metrics to `folder`/metrics.jsonl, and shows their numbers in sinks (`longdream.agent.run.sinks`).

    On a terminal, stderr shows one progress line, which is updated in place. Elsewhere a plain line is printed at most
    every `every` seconds. Both show the step out of `total`, steps per second, the time left, and the last value of
    each metric in `show`, in that order. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        folder: Path,
        console: bool = True,
        total: int | None = None,
        show: tuple[str, ...] = (),
        every: float = 5.0,
        sinks: Sequence[Factory] = TENSORBOARD,
    ):
        self.folder = Path(folder)
        self.total = total
        self.show = show
        self.every = every
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.nonfinite = 0  # number of values that were not finite, over the whole run
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the logger)
        self._bytes = self._file.seek(0, os.SEEK_END)
        self._sum = _checksum(self.path, self._bytes)
        self._step = -1  # the last step written
        self._factories = list(sinks)
        self._sinks: dict[Factory, Sink] = {}  # made when something is first written
        self._first_step = 0
        self._shown: dict[str, Value] = {}
        self._began: tuple[int, float] | None = None  # step and time of the first line of this process
        self._printed = -math.inf
        self._console = Console(stderr=True, highlight=False, soft_wrap=True) if console else None
        self._progress: Progress | None = None

    def write(self, step: int, metrics: dict[str, Any], **tags: Value) -> None:
        """Write `metrics` (numbers, strings, None, or anything with `.item()`) at `step`, unbuffered.

        The line is one JSON object: "step", the tags and the metrics, with sorted keys and exact floats. A value that
        is not finite becomes null. The number of such values so far is added as "log/nonfinite", and the console names
        the metric. Wall-clock values belong under "time/", so that runs can be compared without them.

        Raises:
            DiskFull: the disk is full; the file contains only complete lines.
        """
        values: dict[str, Value] = {key: _plain(value) for key, value in metrics.items()}
        bad = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            self.nonfinite += len(bad)
            values |= dict.fromkeys(bad) | {"log/nonfinite": self.nonfinite}
        line = json.dumps({**values, **tags, "step": int(step)}, sort_keys=True, allow_nan=False).encode() + b"\n"
        self._append(line)
        self._step = int(step)
        self._mirror(int(step), values)
        for key in bad:
            self.note(f"step {step:,}: {key} is not finite ({self.nonfinite:,} such values so far)")
        self._shown |= {key: value for key, value in values.items() if key in self.show}
        self._show(int(step))

    def _append(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
            if written < len(line):  # a nearly full disk takes only a part; writing the rest raises the error
                self._file.write(line[written:])
        except OSError as error:
            os.truncate(self.path, self._bytes)
            if error.errno in NO_ROOM:
                raise DiskFull(self.folder, len(line), error) from error
            raise
        self._bytes += len(line)
        self._sum = zlib.crc32(line, self._sum)

    def draw(self, step: int, pictures: dict[str, Drawn]) -> None:
        """Show pictures by name: in sinks that draw and, the newest of each name, as files in PICTURES."""
        for name, drawn in pictures.items():
            path = self.folder / PICTURES / f"{name}{'.gif' if drawn.data[:3] == b'GIF' else '.png'}"
            with self.view(str(path)):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.tmp")
                try:
                    temporary.write_bytes(drawn.data)
                    temporary.replace(path)
                finally:  # of a full disk
                    temporary.unlink(missing_ok=True)
        for factory in self._factories:
            with self._showing(factory):
                sink = self._sink(factory)
                if isinstance(sink, Drawing):
                    sink.draw(step, pictures)

    def warn(self, step: int, text: str) -> None:
        """A warning that belongs to a step: on the console, and in sinks that take words."""
        self.note(f"warning: {text}")
        for factory in self._factories:
            with self._showing(factory):
                sink = self._sink(factory)
                if isinstance(sink, Warned):
                    sink.warn(step, text)

    def _mirror(self, step: int, values: dict[str, Value]) -> None:
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        for factory in self._factories:
            with self._showing(factory):
                self._sink(factory).write(step, numbers)

    def _sink(self, factory: Factory) -> Sink:
        """What shows metrics, made when something is first shown."""
        if factory not in self._sinks:
            self._sinks[factory] = factory(self.folder, self._first_step)
        return self._sinks[factory]

    @contextmanager
    def _showing(self, factory: Factory) -> Iterator[None]:
        """Around calls of a sink, which is given up where it fails."""
        try:
            yield
        except Exception as error:  # it may be anybody's code, and shows only what is recorded
            self._factories = [other for other in self._factories if other is not factory]
            sink = self._sinks.pop(factory, None)
            what = type(sink).__name__ if sink else getattr(factory, "func", factory).__name__
            why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            self.note(f"warning: {what} cannot be written ({why}): the run goes on without")
            with suppress(Exception):
                if sink is not None:
                    sink.close()

    @contextmanager
    def view(self, what: str) -> Iterator[None]:
        """Around writing something that the run can do without: where it cannot be written, there is a warning."""
        try:
            yield
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            self.note(f"warning: {what} cannot be written ({why}): the run goes on without")

    # -- console ------------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Print one line on the console, on a terminal above the progress line."""
        if self._console is not None:
            (self._progress.console if self._progress else self._console).print(text, markup=False)

    def _show(self, step: int) -> None:
        now = time.monotonic()
        if self._console is None:
            return
        if self._began is None:
            self._began = (step, now)
        if self._console.is_terminal:
            if self._progress is None:
                text = TextColumn("{task.description}", markup=False, table_column=Column())  # wraps where it must
                self._progress = Progress(BarColumn(bar_width=24), text, console=self._console)
                self._progress.add_task("", total=self.total)
                self._progress.start()
            self._progress.update(self._progress.task_ids[0], completed=step, description=self._line(step, now))
        elif now - self._printed >= self.every:
            self._printed = now
            self.note(self._line(step, now))

    def _line(self, step: int, now: float) -> str:
        assert self._began is not None
        parts = [f"step {step:,}" + (f"/{self.total:,}" if self.total else "")]
        done = step - self._began[0]
        seconds = now - self._began[1]
        if done > 0 and seconds > 0:
            rate = done / seconds
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            if self.total:
                left = max(0, round((self.total - step) * seconds / done))
                parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        parts += [_form(key, self._shown[key]) for key in self.show if key in self._shown]
        return "  ".join(parts)

    # -- resume -------------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """The state for a checkpoint. The file is synced to disk first."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno in NO_ROOM:
                raise DiskFull(self.folder, self._bytes, error) from error
            raise
        for factory, sink in list(self._sinks.items()):
            with self._showing(factory):
                sink.flush()
        # a resumed run is no slower or faster for what was measured before
        shown = {key: value for key, value in self._shown.items() if not key.startswith("time/")}
        return {
            "bytes": self._bytes,
            "crc32": self._sum,
            "step": self._step,
            "nonfinite": self.nonfinite,
            "shown": shown,
        }

    def restore(self, state: dict | None) -> list[str]:
        """Truncate the file to its length at `state`, or to 0 for None: the resumed run writes the later lines again.

        Returns a warning if the file is shorter than it was at `state`, or not the same. Part of a line is cut off
        too: the next one would be appended to it.
        """
        state = state or {"bytes": 0, "step": -1, "nonfinite": 0, "shown": {}}
        warnings = []
        end = _whole_lines(self.path, state["bytes"])
        if end < state["bytes"]:
            warnings.append(
                f"{self.path} has {end:,} of the {state['bytes']:,} bytes it had at the checkpoint: "
                f"the metrics between are lost, the run goes on"
            )
        os.truncate(self.path, end)
        self._bytes = end
        self._sum = _checksum(self.path, end)
        if end == state["bytes"] and state.get("crc32", self._sum) != self._sum:
            warnings.append(
                f"{self.path} is altered: its first {end:,} bytes are not those of the checkpoint; what is there is "
                f"kept, the run goes on"
            )
        self._step = state["step"]
        self.nonfinite = state["nonfinite"]
        self._shown = dict(state["shown"])
        self._began = (max(self._step, 0), time.monotonic())
        self._close_sinks()
        self._first_step = self._step + 1
        return warnings

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._close_sinks()
        self._file.close()

    def _close_sinks(self) -> None:
        for factory, sink in list(self._sinks.items()):
            with self._showing(factory):
                sink.close()
        self._sinks = {}

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Follower(Logger):
    """The logger of a rank other than the first, which keeps no record: its warnings alone are printed."""

    def __init__(self, rank: int):
        self.rank = rank

    def write(self, step: int, metrics: dict[str, Any], **tags: Value) -> None:
        """Nothing: rank 0 writes what all ranks have."""

    def draw(self, step: int, pictures: dict[str, Drawn]) -> None:
        """Nothing: rank 0 draws."""

    def note(self, text: str) -> None:
        if text.startswith("warning: "):
            print(f"warning: rank {self.rank}: {text.removeprefix('warning: ')}", file=sys.stderr)

    def state(self) -> dict:
        return {}

    def restore(self, state: dict | None) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing is open."""


def _checksum(path: Path, size: int) -> int:
    """CRC-32 of the first bytes of a file."""
    checksum = 0
    with opened(path) as (file, _):
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            checksum = zlib.crc32(block, checksum)
            size -= len(block)
    return checksum


def _whole_lines(path: Path, limit: int) -> int:
    """The number of bytes, at most `limit`, of the whole lines that a file begins with."""
    with opened(path) as (file, size):
        end = min(size, limit)
        while end > 0:
            begin = max(0, end - (1 << 20))
            file.seek(begin)
            if (last := file.read(end - begin).rfind(b"\n")) >= 0:
                return begin + last + 1
            end = begin
    return 0


def _plain(value: Any) -> Value:
    return value.item() if hasattr(value, "item") else value


def _form(key: str, value: Value) -> str:
    """A metric as it appears on the console's line."""
    if key in RATES and isinstance(value, float):
        return RATES[key].format(f"{value:.0%}" if key == "time/gpu" else compact(value))
    if isinstance(value, float) and 1000 <= abs(value) < 1e15:  # three digits would be shown as 1e+03
        return f"{key} {value:,.0f}"
    return f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"


def compact(value: float) -> str:
    """A number that is at least 0, to three digits: 0.123, 12.3, 101k, 2.5M."""
    value = float(f"{value:.3g}")
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"
