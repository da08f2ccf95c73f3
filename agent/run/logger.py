"""The metrics of a run: metrics.jsonl, TensorBoard, and a line on the console."""

import json
import math
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from longdream.agent.run.checkpoint import NO_ROOM, DiskFull
from longdream.agent.run.files import opened
from longdream.agent.run.metrics import RATES

Value = float | int | str | None
PICTURES = Path("videos") / "training"
"""Folder in a run of the newest pictures of each kind."""


class Drawn(NamedTuple):
    """A picture as a PNG, or moving pictures as a GIF, and its size in pixels."""

    data: bytes
    height: int
    width: int


class Logger:
    """Appends metrics to `folder`/metrics.jsonl and writes their numbers to `folder`/tensorboard.

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
        tensorboard: bool = True,
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
        self._tensorboard = tensorboard
        self._writer = None
        self._purge: int | None = None
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
        """Show pictures by name: in TensorBoard's Images and, the newest of each name, as files in PICTURES.

        GIFs are written as such: what TensorBoard's `add_video` needs to make them of frames (MoviePy) is not
        installed with the project, and its version 2 makes none, without an error.
        """
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
        if self._tensorboard and pictures:
            with self.view("TensorBoard's files", self._give_up_tensorboard):
                from tensorboard.compat.proto import summary_pb2

                summary: Any = summary_pb2  # made by protobuf, which type checkers cannot read
                values = []
                for name, (data, height, width) in pictures.items():
                    image = summary.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
                    values.append(summary.Summary.Value(tag=f"pictures/{name}", image=image))
                self._view_writer()._get_file_writer().add_summary(summary.Summary(value=values), step)

    def _mirror(self, step: int, values: dict[str, Value]) -> None:
        if not self._tensorboard:
            return
        with self.view("TensorBoard's files", self._give_up_tensorboard):
            writer = self._view_writer()
            for key, value in values.items():
                if isinstance(value, int | float):
                    writer.add_scalar(key, value, step)

    def _view_writer(self) -> Any:
        """TensorBoard's writer, opened when it is needed first."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

            _silence_writers()
            self._writer = SummaryWriter(log_dir=str(self.folder / "tensorboard"), purge_step=self._purge)
        return self._writer

    def _give_up_tensorboard(self) -> None:
        self._tensorboard = False
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None

    @contextmanager
    def view(self, what: str, otherwise: Callable[[], None] | None = None) -> Iterator[None]:
        """Around writing something that only shows what is recorded elsewhere: where it cannot be written, there is a
        warning, `otherwise` is called, and the run goes on."""
        try:
            yield
        except (OSError, UnicodeError) as error:  # TensorBoard has no files whose names are not UTF-8
            why = getattr(error, "strerror", None) or error
            self.note(f"warning: {what} cannot be written ({why}): the run goes on without")
            if otherwise is not None:
                otherwise()

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
        if self._writer is not None:
            with self.view("TensorBoard's files", self._give_up_tensorboard):
                self._writer.flush()
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
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._purge = self._step + 1  # TensorBoard hides earlier events from this step on
        return warnings

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            with suppress(OSError):  # a full disk has been reported already; do not hide the exception being raised
                self._writer.close()
        self._file.close()

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

    def note(self, text: str) -> None:
        if text.startswith("warning: "):
            print(f"warning: rank {self.rank}: {text.removeprefix('warning: ')}", file=sys.stderr)

    def state(self) -> dict:
        return {}

    def restore(self, state: dict | None) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing is open."""


def _silence_writers() -> None:
    """An OSError in the thread that writes TensorBoard's files is raised at the next call, too: print no traceback."""
    hook = threading.excepthook
    if getattr(hook, "of_writers", False):
        return

    def quiet(problem: Any) -> None:
        if type(problem.thread).__name__ != "_AsyncWriterThread" or not isinstance(problem.exc_value, OSError):
            hook(problem)

    quiet.of_writers = True  # type: ignore[attr-defined]
    threading.excepthook = quiet


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
