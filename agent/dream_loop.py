"""The loop without reality: a new C learns in the dreams of a run that is there, and is then judged in reality."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent import checkpoint, ranges, run
from agent.agent import Agent
from agent.config import Config
from agent.dream_starts import open_replay
from agent.judge import judge, play
from agent.logger import Logger
from agent.saving import Window
from agent.signals import Interrupted, Signals
from controller.types import Exporting
from envs.contract import EnvError, UserError

SHOW = ("controller/return", "evaluate/return_mean")
MAY_DIFFER = ("controller.", "evaluate.", "replay.batch", "replay.length", "replay.starts", "replay.surprise")
MAY_DIFFER += ("learn.updates", "learn.actor_critic_rate", "learn.decay", "learn.clip", "seed", "device", "threads")
"""Settings in which such a run may differ from the one that it dreams of. (forcing, worldmodel and encoder are what V
and M were trained with.)"""
LINES = 20
"""Lines of metrics, evenly over the updates."""


def train(config: Config, folder: Path, resume: bool = False, console: bool = True) -> dict[str, Any]:
    """Train the C of `config` in dreams of the run `config.world`; returns what is also written to summary.json.

    The folder is a run like any other: its checkpoint holds that run's V and M and the new C, and can be evaluated and
    dreamt with. `env_steps` in its summary are the real steps behind V and M, `updates` those of C. It resumes as
    agent.loop.train does, exactly.

    Raises:
        UserError: the configuration, the folder, or the run that it dreams of cannot be used.
        EnvError, Interrupted, NotFinite, DiskFull: as agent.loop.train.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        if config.threads:
            torch.set_num_threads(config.threads)
        tree = None
        if resume:
            stack.enter_context(run.lock(folder))
            tree = run.newest(folder)
            if tree and (done := run.summary(folder)) and done["updates"] >= config.learn.updates:
                return done
        training = DreamTraining(config, folder, tree, signals, stack)
        if resume:
            run.write_config(folder, config)
        else:
            run.create(folder, config)
            stack.enter_context(run.lock(folder))
        logger = stack.enter_context(Logger(folder, console, config.learn.updates, SHOW))
        training.record(logger, tree)
        training.run()
        return training.finish()


class DreamTraining:
    """A C in training on its own. See agent.loop.Training, whose habits these are; here steps are updates."""

    def __init__(self, config: Config, folder: Path, tree: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        self.config, self.folder, self.signals = config, folder, signals
        self.began = self.saved = time.monotonic()
        source = run.open_run(config.world)
        known, self.real_steps = source.saved
        self.spec = source.spec
        torch.manual_seed(config.seed)
        self.rng = np.random.default_rng((config.seed, 1))
        self.agent = Agent(config, self.spec)
        run.fill_model(self.agent, known, source.folder)
        self.replay = open_replay(source.folder, known)
        stack.callback(self.replay.close)
        ranges.check_clip(config, self.replay.longest_clip)
        if not self.replay.can_sample(config.replay.length):
            raise UserError(f"the replay of {config.world} holds no {config.replay.length} rows in a row: use less")
        self.count = {"wall": 0.0} | (tree["count"] if tree else {})
        self.window = Window()

    def record(self, logger: Logger, tree: dict[str, Any] | None) -> None:
        """Open the record and, with a checkpoint, go back to the moment it was saved."""
        self.logger = logger
        warnings = logger.restore(tree and tree["logger"])
        logger.note(f"training in {self.folder}, in dreams of {self.config.world}")
        for warning in warnings:
            logger.note(f"warning: {warning}")
        if tree:
            run.fill(self.agent, tree, self.folder)
            self.window = Window(tree["window"]["sums"], tree["window"]["numbers"])
            self.rng.bit_generator.state = tree["random"]["numpy"]
            torch.set_rng_state(tree["random"]["torch"])
            if self.agent.device.type == "cuda" and tree["random"]["cuda"]:
                torch.cuda.set_rng_state_all(tree["random"]["cuda"])

    def run(self) -> None:
        """Update after update to the last, and a checkpoint."""
        learn, replay, clock = self.config.learn, self.config.replay, self.config.evaluate
        every = max(1, learn.updates // LINES)
        try:
            while (done := self.agent.updates) < learn.updates:
                self.signals.check()
                if time.monotonic() - self.saved > clock.save_seconds:
                    self.save()
                rows = self.replay.sample(self.rng, replay.batch, replay.length, replay.starts, replay.surprise)
                skipped = self.agent.skipped
                pace = 1 - (1 - learn.decay) * done / learn.updates
                metrics = self.agent.update_controller(rows, pace)
                if self.agent.skipped == skipped:  # one that was skipped has no finite metrics
                    self.window.add(metrics)
                if self.agent.updates % every == 0 or self.agent.updates == learn.updates:
                    self.log()
        except (Interrupted, EnvError):
            self.save()
            self.signals.check()  # the signal that ends this run may have reached the environment's processes first
            raise
        self.save()

    def log(self) -> None:
        """A line of metrics, and an evaluation where `evaluate.every` is not 0."""
        clock, agent = self.config.evaluate, self.agent
        told = {"count/updates": agent.updates, "count/skipped": agent.skipped, "time/wall": self.wall()}
        if clock.every:
            found = play(
                agent, self.config.evaluation_env, clock.episodes, self.config.seed, "agent", clock, self.signals
            )
            told |= {"evaluate/return_mean": found.return_mean, "evaluate/return_std": found.return_std}
        self.logger.write(agent.updates, self.window.means() | told)
        self.window = Window()

    def save(self) -> None:
        """Write a checkpoint, from which `record` goes on exactly."""
        cuda = torch.cuda.get_rng_state_all() if self.agent.device.type == "cuda" else []
        random = {"numpy": self.rng.bit_generator.state, "torch": torch.get_rng_state(), "cuda": cuda}
        tree = {
            **self.agent.state_dict(),
            "spec": self.spec.to_json(),
            "replay": {"of": self.config.world},
            "logger": self.logger.state(),
            "window": {"sums": dict(self.window.sums), "numbers": dict(self.window.numbers)},
            "random": random,
            "count": self.count | {"wall": self.wall()},
        }
        checkpoint.save(self.folder / "checkpoints", self.agent.updates, tree)
        self.saved = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """The last evaluation, written to summary.json."""
        config, clock = self.config, self.config.evaluate
        self.logger.note(f"evaluating over {clock.final_episodes} episodes")
        found = judge(self.agent, config.evaluation_env, clock.final_episodes, config.seed, clock, self.signals)
        names = ("return_mean", "return_std", "length_mean", "random_mean", "without_memory_mean")
        self.logger.write(self.agent.updates, {f"final/{key}": found[key] for key in names})
        found |= {"env_steps": self.real_steps, "dream_steps": self.agent.dream_steps}
        found |= {"updates": self.agent.updates, "wall_s": round(self.wall(), 1)}
        if isinstance(self.agent.controller, Exporting):
            self.agent.controller.export(self.folder)
        run.write(self.folder / "summary.json", run.to_json(found, indent=1) + "\n")
        return found

    def wall(self) -> float:
        """Seconds of this run, those of earlier sessions included."""
        return self.count["wall"] + time.monotonic() - self.began
