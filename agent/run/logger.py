"""The record of a run: metrics.jsonl, its view in TensorBoard, and a line on the console."""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longdream.agent.run.checkpoint import NO_ROOM, DiskFull

Value = float | int | str | None


class Logger:
    """Appends to `folder`/metrics.jsonl, the record, and mirrors its numbers to `folder`/tensorboard.

    On a terminal one progress line is kept up to date on stderr; elsewhere a plain line appears at most every `every`
    seconds. Both show the step of `total`, steps per second, the time left, and the last value of each metric in
    `show`. Use it as a context manager, or call `close`.
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
        self.folder, self.total, self.show, self.every = Path(folder), total, show, every
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.nonfinite = 0  # values that were not finite, over the whole run
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the logger)
        self._bytes = self._file.seek(0, os.SEEK_END)
        self._step = -1  # last one written
        self._tensorboard, self._writer, self._purge = tensorboard, None, None
        self._shown: dict[str, Value] = {}
        self._began: tuple[int, float] | None = None  # step and clock of the first line of this process
        self._printed = -math.inf
        self._console = Console(stderr=True, highlight=False, soft_wrap=True) if console else None
        self._progress: Progress | None = None

    def write(self, step: int, metrics: dict[str, Any], **tags: Value) -> None:
        """Record `metrics` (numbers, strings, None, or anything with `.item()`) at `step`, flushed to the file.

        The line is one JSON object: "step", the tags and the metrics, with keys in order and floats exact. A value
        that is not finite becomes null; how many there were so far is added as "log/nonfinite", and the console names
        the metric. Wall-clock values belong under "time/", so that runs can be compared without them.
        Raises DiskFull, leaving only whole lines in the file.
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
            if written < len(line):  # a nearly full disk takes a part first, and the rest not at all
                self._file.write(line[written:])
        except OSError as error:
            os.truncate(self.path, self._bytes)
            if error.errno in NO_ROOM:
                raise DiskFull(self.folder, len(line), error) from error
            raise
        self._bytes += len(line)

    def _mirror(self, step: int, values: dict[str, Value]) -> None:
        if not self._tensorboard:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

                self._writer = SummaryWriter(log_dir=str(self.folder / "tensorboard"), purge_step=self._purge)
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(key, value, step)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise DiskFull(self.folder / "tensorboard", 1 << 20, error) from error
            raise

    # -- console ------------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Print one line on the console (above the progress line, on a terminal)."""
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
                self._progress = Progress(
                    BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), console=self._console
                )
                self._progress.add_task("", total=self.total)
                self._progress.start()
            self._progress.update(self._progress.task_ids[0], completed=step, description=self._line(step, now))
        elif now - self._printed >= self.every:
            self._printed = now
            self.note(self._line(step, now))

    def _line(self, step: int, now: float) -> str:
        assert self._began is not None
        parts = [f"step {step:,}" + (f"/{self.total:,}" if self.total else "")]
        done, seconds = step - self._began[0], now - self._began[1]
        if done > 0 and seconds > 0:
            rate = done / seconds
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            if self.total:
                left = max(0, round((self.total - step) * seconds / done))
                parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        for key, value in self._shown.items():
            parts.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
        return "  ".join(parts)

    # -- resume -------------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Where the record stands, synced to disk: goes into a checkpoint."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()
        return {"bytes": self._bytes, "step": self._step, "nonfinite": self.nonfinite, "shown": dict(self._shown)}

    def restore(self, state: dict | None) -> list[str]:
        """Cut the record back to `state`, or to nothing for None: the resumed run writes those lines again.

        Returns a warning when the record is shorter than it was.
        """
        state = state or {"bytes": 0, "step": -1, "nonfinite": 0, "shown": {}}
        warnings = []
        end = state["bytes"]
        if self.path.stat().st_size < end:
            end = self.path.read_bytes().rfind(b"\n") + 1
            warnings.append(
                f"{self.path} has {end:,} of the {state['bytes']:,} bytes it had at the checkpoint: "
                f"the metrics between are lost, the run goes on"
            )
        os.truncate(self.path, end)
        self._bytes = end
        self._step, self.nonfinite, self._shown = state["step"], state["nonfinite"], dict(state["shown"])
        self._began = (max(self._step, 0), time.monotonic())
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._purge = self._step + 1  # TensorBoard hides the events from this step on that were written before
        return warnings

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            with suppress(OSError):  # a full disk has been reported by then, and must not hide the error on its way
                self._writer.close()
        self._file.close()

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _plain(value: Any) -> Value:
    return value.item() if hasattr(value, "item") else value
