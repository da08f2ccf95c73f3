"""Runs whose steps are updates, since no environment is stepped: what their loops have in common."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from longdream.agent.config.schema import Config
from longdream.agent.core.learner import Learner
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run
from longdream.agent.run.logger import Logger
from longdream.agent.run.metrics import Window
from longdream.agent.run.signals import Interrupted, Signals
from longdream.envs.contract import EnvError


class UpdateLoop:
    """A run in progress. At the top of `run`'s loop its state is whole: saved there, it goes on exactly.

    Derived classes build `learner` in their __init__ (no file is touched by then) and say what an update is. See
    longdream.agent.train.online.Training, whose habits these are.

    Args:
        tree: the checkpoint that it will go on from, if any.
        stack: closes what is opened here.
    """

    SHOW: ClassVar[tuple[str, ...]]
    """Metrics on the console's line."""
    learner: Learner

    def __init__(self, config: Config, folder: Path, tree: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        self.config, self.folder, self.signals = config, folder, signals
        self.began = self.saved = time.monotonic()
        self.count = {"wall": 0.0} | (tree["count"] if tree else {})
        self.window = Window()
        torch.manual_seed(config.seed)

    # -- what derived classes say -------------------------------------------------------------------------------------

    @staticmethod
    def total(config: Config) -> int:
        """Updates until the run is over."""
        raise NotImplementedError

    def greeting(self) -> str:
        """What is told when training begins."""
        return f"training in {self.folder}"

    def update(self) -> dict[str, Any]:
        """One update; its metrics."""
        raise NotImplementedError

    def log(self) -> None:
        """After an update: write a line of metrics, if it is time for one."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """More for the checkpoint, under keys that the rest leaves free."""
        raise NotImplementedError

    def restore(self, tree: dict[str, Any]) -> None:
        """Put that back."""
        raise NotImplementedError

    def finish(self) -> dict[str, Any]:
        """The last evaluation, written to summary.json; `updates` is among what it says."""
        raise NotImplementedError

    # -- what they share ----------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, config: Config, folder: Path, resume: bool, console: bool) -> dict[str, Any]:
        """A whole run, or what is left of it; see longdream.agent.train.online.train."""
        with ExitStack() as stack:
            signals = stack.enter_context(Signals())
            if config.threads:
                torch.set_num_threads(config.threads)
            tree = None
            if resume:
                stack.enter_context(run.lock(folder))
                tree = run.newest(folder)
                if tree and (done := run.summary(folder)) and done["updates"] >= cls.total(config):
                    return done
            training = cls(config, folder, tree, signals, stack)
            if resume:
                run.write_config(folder, config)
            else:
                run.create(folder, config)
                stack.enter_context(run.lock(folder))
            logger = stack.enter_context(Logger(folder, console, cls.total(config), cls.SHOW))
            training.record(logger, tree).run()
            return training.finish()

    def record(self, logger: Logger, tree: dict[str, Any] | None) -> Self:
        """Open the record and, with a checkpoint, go back to the moment it was saved."""
        self.logger = logger
        warnings = logger.restore(tree and tree["logger"])
        logger.note(self.greeting())
        for warning in warnings:
            logger.note(f"warning: {warning}")
        if tree:
            run.fill(self.learner, tree, self.folder)
            self.window = Window(tree["window"]["sums"], tree["window"]["numbers"])
            self.restore(tree)
            torch.set_rng_state(tree["random"]["torch"])
            if self.learner.device.type == "cuda" and tree["random"]["cuda"]:
                torch.cuda.set_rng_state_all(tree["random"]["cuda"])
        return self

    def run(self) -> None:
        """Update after update to the last, and a checkpoint."""
        learner, total = self.learner, self.total(self.config)
        try:
            while learner.updates < total:
                self.signals.check()
                if time.monotonic() - self.saved > self.config.evaluate.save_seconds:
                    self.save()
                self.window.add(self.update(), learner.taken)
                self.log()
        except (Interrupted, EnvError):
            self.save()
            self.signals.check()  # the signal that ends this run may have reached the environment's processes first
            raise
        self.save()

    def pace(self) -> float:
        """Share of the learning rates at this update: from 1 to `learn.decay`."""
        return 1 - (1 - self.config.learn.decay) * self.learner.updates / self.total(self.config)

    def save(self) -> None:
        """Write a checkpoint, from which `record` goes on exactly."""
        cuda = torch.cuda.get_rng_state_all() if self.learner.device.type == "cuda" else []
        tree = {
            **self.learner.state_dict(),
            **self.state(),
            "spec": self.learner.spec.to_json(),
            "logger": self.logger.state(),
            "window": {"sums": dict(self.window.sums), "numbers": dict(self.window.numbers)},
            "random": {"torch": torch.get_rng_state(), "cuda": cuda},
            "count": self.count | {"wall": self.wall()},
        }
        checkpoint.save(self.folder / "checkpoints", self.learner.updates, tree)
        self.saved = time.monotonic()

    def write(self, metrics: dict[str, Any]) -> None:
        """A line of metrics: these, and means over the updates since the last one."""
        learner = self.learner
        learner.settle()
        told = {"count/updates": learner.updates, "count/skipped": learner.skipped, "time/wall": self.wall()}
        self.logger.write(learner.updates, self.window.means() | told | metrics)
        self.window = Window()

    def conclude(self, found: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json: what was found, and what it took."""
        found = found | {"updates": self.learner.updates, "wall_s": round(self.wall(), 1)}
        run.write(self.folder / "summary.json", run.to_json(found, indent=1) + "\n")
        return found

    def wall(self) -> float:
        """Seconds of this run, those of earlier sessions included."""
        return self.count["wall"] + time.monotonic() - self.began
