"""The loop without reality: a new C learns in the dreams of a run that is there, and is then judged in reality."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from longdream.agent.config import ranges
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.dream_env.starts import open_replay
from longdream.agent.evaluation.policy import judge, play
from longdream.agent.run import folder as run
from longdream.agent.run.signals import Signals
from longdream.agent.train.trainer import UpdateLoop
from longdream.controller.types import Exporting
from longdream.envs.contract import UserError

MAY_DIFFER = ("controller.", "evaluate.", "replay.batch", "replay.length", "replay.episode_start_fraction", "replay.priority_fraction")
MAY_DIFFER += ("learn.updates", "learn.actor_critic_rate", "learn.decay", "learn.agc", "seed", "device", "threads")
MAY_DIFFER += ("recorded",)
"""Settings in which such a run may differ from the one that it dreams of. (forcing, worldmodel and encoder are what V
and M were trained with.)"""
LINES = 20
"""Lines of metrics, evenly over the updates."""


def train(config: Config, folder: Path, resume: bool = False, console: bool = True) -> dict[str, Any]:
    """Train the C of `config` in dreams of the run `config.world`; returns what is also written to summary.json.

    The folder is a run like any other: its checkpoint holds that run's V and M and the new C, and can be evaluated and
    dreamt with. `env_steps` in its summary are the real steps behind V and M, `updates` those of C. It resumes as
    longdream.agent.train.online.train does, exactly.

    Raises:
        UserError: the configuration, the folder, or the run that it dreams of cannot be used.
        EnvError, Interrupted, NotFinite, DiskFull: as longdream.agent.train.online.train.
    """
    return DreamTraining.train(config, folder, resume, console)


class DreamTraining(UpdateLoop):
    """A C in training on its own."""

    SHOW = ("controller/return", "evaluate/return_mean")

    def __init__(self, config: Config, folder: Path, tree: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        super().__init__(config, folder, tree, signals, stack)
        source = run.open_run(config.world)
        known, self.real_steps = source.saved
        self.rng = np.random.default_rng((config.seed, 1))
        self.learner = self.agent = Agent(config, source.spec)
        run.fill_model(self.agent, known, source.folder)
        self.replay = open_replay(source.folder, known)
        stack.callback(self.replay.close)
        ranges.check_clip(config, self.replay.longest_clip)
        if not self.replay.can_sample(config.replay.length):
            raise UserError(f"the replay of {config.world} holds no {config.replay.length} rows in a row: use less")

    @staticmethod
    def total(config: Config) -> int:
        return config.learn.updates

    def greeting(self) -> str:
        return f"{super().greeting()}, in dreams of {self.config.world}"

    def update(self) -> dict[str, Any]:
        replay = self.config.replay
        rows = self.replay.sample(self.rng, replay.batch, replay.length, replay.episode_start_fraction, replay.priority_fraction)
        return self.agent.update_controller(rows, self.pace())

    def log(self) -> None:
        """A line of metrics, and an evaluation where `evaluate.every` is not 0."""
        updates, total, clock = self.agent.updates, self.total(self.config), self.config.evaluate
        if updates % max(1, total // LINES) and updates < total:
            return
        told = {}
        if clock.every:
            env, seed = self.config.evaluation_env, self.config.seed
            found = play(self.agent, env, clock.episodes, seed, "agent", clock, self.signals)
            told = {"evaluate/return_mean": found.return_mean, "evaluate/return_std": found.return_std}
        self.write(told)

    def state(self) -> dict[str, Any]:
        return {"replay": {"of": self.config.world}, "sampling": self.rng.bit_generator.state}

    def restore(self, tree: dict[str, Any]) -> None:
        self.rng.bit_generator.state = tree["sampling"]

    def finish(self) -> dict[str, Any]:
        config, clock = self.config, self.config.evaluate
        self.logger.note(f"evaluating over {clock.final_episodes} episodes")
        found = judge(self.agent, config.evaluation_env, clock.final_episodes, config.seed, clock, self.signals)
        names = ("return_mean", "return_std", "length_mean", "random_mean", "without_memory_mean")
        self.logger.write(self.agent.updates, {f"final/{key}": found[key] for key in names})
        if isinstance(self.agent.controller, Exporting):
            self.agent.controller.export(self.folder)
        return self.conclude(found | {"env_steps": self.real_steps, "dream_steps": self.agent.dream_steps})
