"""Training in imagination: a new C learns in the dreams of an existing run, and is then evaluated for real."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from longdream.agent.config.checks import check_clip
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.core.ranks import here
from longdream.agent.dream_env.starts import open_replay
from longdream.agent.evaluation.policy import play
from longdream.agent.run import folder as run_folder
from longdream.agent.run.signals import Signals
from longdream.agent.train.trainer import LINES, Trainer
from longdream.envs.contract import UserError


class ImaginationTrainer(Trainer):
    """A C learns alone, in dreams that start from the replay of the run `config.world`.

    The folder is a run like any other: its checkpoints hold that run's V and M and the new C, and can be evaluated and
    dreamt with. `env_steps` in its summary are the real steps behind V and M, `updates` those of C.
    """

    SHOWN = ("controller/return", "evaluate/return_mean")

    def __init__(self, config: Config, folder: Path, saved: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        super().__init__(config, folder, saved, signals, stack)
        source = run_folder.open_run(config.world)
        if source.config.kind == "video":
            raise UserError(
                f"{config.world} was trained on video: it has no replay for dreams of a controller to start in"
            )
        checkpoint, self.real_steps = source.saved
        self.rng = np.random.default_rng(here().seed(config.seed, 1))
        config = here().share(config)
        self.batch = config.replay.batch
        self.learner = self.agent = Agent(config, source.spec)
        self.agent.check_memory()
        run_folder.fill_model(self.agent, checkpoint, source.folder)
        self.replay = open_replay(source)
        stack.callback(self.replay.close)
        check_clip(config, self.replay.longest_clip)
        if not self.replay.can_sample(config.replay.length):
            raise UserError(f"the replay of {config.world} holds no {config.replay.length} rows in a row: use less")

    @staticmethod
    def total(config: Config) -> int:
        return config.learn.updates

    def greeting(self, progress: int) -> str:
        return f"{super().greeting(progress)}, in dreams of {self.config.world}"

    def turn(self) -> None:
        settings = self.config.replay
        rows = self.replay.sample(
            self.rng,
            self.batch,
            settings.length,
            settings.episode_start_fraction,
            settings.priority_fraction,
        )
        self.averages.add(self.agent.update_controller(rows, self.rate_scale()), self.agent.finite)

    def report(self) -> None:
        """A line of metrics, and an evaluation, where it is time for them."""
        metrics: dict[str, Any] = {}
        if self.is_due("evaluated", self.config.evaluate.times + 1, before_the_end=True):
            metrics = self.evaluation()
            self.count["evaluated"] = self.progress
        if self.is_due("logged", LINES) or metrics:
            self.write(metrics)

    def evaluation(self) -> dict[str, Any]:
        config = self.config
        settings = config.evaluate
        returns = play(
            self.agent, config.evaluation_env, settings.episodes, config.seed, "agent", settings, self.signals
        )
        self.show(self.agent)
        return {"evaluate/return_mean": returns.return_mean, "evaluate/return_std": returns.return_std}

    def state(self) -> dict[str, Any]:
        return {
            "spec": self.agent.spec.to_json(),
            "replay": {"of": self.config.world},
            "random": {"sample": self.rng.bit_generator.state},
        }

    def restore(self, saved: dict[str, Any]) -> list[str]:
        if "lost" in saved:
            self.rng = np.random.default_rng(here().seed(self.config.seed, 1, saved["progress"]))
        else:
            self.rng.bit_generator.state = saved["random"]["sample"]
        return []

    def finish(self) -> dict[str, Any]:
        return self.conclude(self.final_evaluation(self.agent) | {"env_steps": self.real_steps})
