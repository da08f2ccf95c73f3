"""Between two lines of metrics.jsonl: averages of metrics, the time of each part, and what is learned per second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

RATES = {
    "time/updates_per_s": "{} updates/s",
    "time/rows_per_s": "{} rows/s",
    "time/dreamt_steps_per_s": "{} dreamt/s",
    "time/gpu": "gpu {}",
}
"""The metrics of `Rates`, each with its form on the console's line."""


class Averages:
    """Sums and counts of metrics since the last line. Tensors stay on their device until `means` is called."""

    def __init__(self, sums: dict[str, Any] | None = None, numbers: dict[str, Any] | None = None):
        self.sums = sums or {}
        self.numbers = numbers or {}

    def add(self, metrics: dict[str, Any], finite: Tensor | bool = True) -> None:
        """Add metrics of an update, unless it was skipped because it was not finite. On CUDA this is decided on the
        device, without waiting for it."""
        if isinstance(finite, Tensor) and finite.is_cuda:
            for key, value in metrics.items():
                self.sums[key] = self.sums.get(key, 0.0) + torch.where(finite, value, 0.0)
                self.numbers[key] = self.numbers.get(key, 0) + finite.long()
        elif finite:
            for key, value in metrics.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
                self.numbers[key] = self.numbers.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: float(total) / int(self.numbers[key]) for key, total in self.sums.items() if self.numbers[key]}


class Timed:
    """Adds up the seconds spent in each part of a whole. Derived classes make `seconds`, whose keys are the parts."""

    seconds: dict[str, float]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """The time within belongs to `part`."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


class Learning(Protocol):
    """What `Rates` reads of an agent. updates: made so far. dream_steps: that C has learned from so far."""

    updates: int
    dream_steps: int
    device: torch.device


class Rates:
    """What an agent learns per second of wall-clock time, from line to line; evaluations and checkpoints between count.

    Args:
        rows: replayed rows per update.
    """

    def __init__(self, agent: Learning, rows: int):
        self.agent = agent
        self.rows = rows
        self._reads_gpu = agent.device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Measure from now on, as after the agent's counters were loaded."""
        self._began = time.perf_counter()
        self._updates = self.agent.updates
        self._dream_steps = self.agent.dream_steps

    def take(self) -> dict[str, float]:
        """The metrics named in RATES since the last call. `time/gpu`, the share of time in which the GPU works, is that
        of the last second or less; it is left out where it cannot be read."""
        seconds = time.perf_counter() - self._began
        updates = (self.agent.updates - self._updates) / seconds
        dreamt = (self.agent.dream_steps - self._dream_steps) / seconds
        self.restart()
        rates = {"updates_per_s": updates, "rows_per_s": updates * self.rows, "dreamt_steps_per_s": dreamt}
        return {f"time/{key}": value for key, value in (rates | self.gpu()).items()}

    def gpu(self) -> dict[str, float]:
        """The share of the last second or less in which the GPU works; nothing where it cannot be read."""
        if not self._reads_gpu:
            return {}
        try:
            return {"gpu": torch.cuda.utilization(self.agent.device) / 100}
        except Exception:  # no nvidia-ml-py, no driver, a part of a GPU: whatever it is, no reason to end a run
            self._reads_gpu = False
            return {}
