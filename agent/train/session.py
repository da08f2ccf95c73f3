"""A run in progress: what is saved of it and recorded, on which all of its ranks agree."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from longdream.agent.config.schema import Config
from longdream.agent.core.learner import Learner
from longdream.agent.core.ranks import here
from longdream.agent.run import files, parts
from longdream.agent.run import folder as run_folder
from longdream.agent.run.logger import Logger
from longdream.agent.run.metrics import Averages
from longdream.agent.run.saver import Saver
from longdream.agent.run.signals import Interrupted, Signals


class Session:
    """The checkpoints and the record of a run. A `Trainer` (trainer.py) takes the turns between them.

    Rank 0 writes both (agent/core/ranks.py); every rank calls the methods, at the same moments.

    Args:
        saved: the checkpoint that the run resumes from, if any.
        stack: closes what is opened here.
    """

    learner: Learner
    logger: Logger

    def __init__(self, config: Config, folder: Path, saved: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        self.config = config
        self.folder = folder
        self.signals = signals
        self.began = time.monotonic()
        self.saved_at = self.began
        self.count: dict[str, Any] = {"wall": 0.0, "logged": 0, "evaluated": 0}
        """Counters that outlive a session: seconds of earlier sessions, and `progress` at the last line of metrics and
        at the last evaluation."""
        if saved:
            self.count |= saved["count"]
        self.averages = Averages()
        root = folder.absolute()  # an environment may change the working directory while a thread writes
        self.on_disk = False
        """Whether a checkpoint has come to be on disk of which `saved` was not told."""
        self.saver = Saver(lambda step, tree: run_folder.save(root, step, tree, config), self._written)
        stack.callback(self.saver.settle)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def meet(self) -> bool:
        """Between turns: whether it is time to save. All ranks take note of a checkpoint that is on disk.

        Raises:
            Interrupted: one of them has received a signal.
        """
        self.saver.poll()
        due = time.monotonic() - self.saved_at > self.config.evaluate.save_seconds
        signal, due, on_disk = here().numbers(here().signal(self.signals.number), due, self.on_disk).T
        self._commit(on_disk[0])
        if signal.any():
            raise Interrupted(int(signal.max()))
        return bool(due[0])

    def settle(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self.saver.settle()
        self._commit(here().numbers(self.on_disk)[0, 0])

    def _written(self) -> None:
        self.on_disk = True

    def _commit(self, on_disk: float) -> None:
        if on_disk:
            self.on_disk = False
            self.saved()

    def save(self) -> None:
        """Write a checkpoint, from which `open` goes on exactly, while training goes on."""
        self.settle()  # the one before, since the state below says what may be deleted then
        cuda = torch.cuda.get_rng_state_all() if self.learner.device.type == "cuda" else []
        own: dict[str, Any] = {}
        with here().together():
            own = self.state()
            own["averages"] = {"sums": dict(self.averages.sums), "numbers": dict(self.averages.numbers)}
            own["count"] = self.counters()
            own["random"] = {"torch": torch.get_rng_state(), "cuda": cuda, **own.get("random", {})}
        state = self.learner.state_dict() | parts.collect(own)
        if not here().rank:
            self.saver.save(self.progress, state | {"progress": self.progress, "logger": self.logger.state()})
        self.saved_at = time.monotonic()

    def saved(self) -> None:
        """Called, on all ranks, once a checkpoint is on disk."""

    def counters(self) -> dict[str, Any]:
        """`count` as it is kept in a checkpoint."""
        return self.count | {"wall": self.wall()}

    def state(self) -> dict[str, Any]:
        """More for the checkpoint, under keys that the rest leaves free."""
        raise NotImplementedError

    # -- the record ---------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> int:
        """How far the run is, in its unit."""
        return self.learner.updates

    def write(self, metrics: dict[str, Any]) -> None:
        """A line of metrics: these, and means over what was added to `averages` since the last line."""
        learner = self.learner
        learner.settle()
        counts = {"count/updates": learner.updates, "count/skipped": learner.skipped, "time/wall": self.wall()}
        self.logger.write(self.progress, parts.means(self.averages) | counts | metrics)
        self.averages = Averages()
        self.count["logged"] = self.progress

    def conclude(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json: these values, the number of updates, and the time that they took."""
        summary = summary | {"updates": self.learner.updates, "wall_s": round(self.wall(), 1)}
        if not here().rank:
            run_folder.write(self.folder / "summary.json", files.to_json(summary, indent=1) + "\n")
        return summary

    def wall(self) -> float:
        """Seconds of this run, those of earlier sessions included."""
        return self.count["wall"] + time.monotonic() - self.began
