"""Training: what all trainers share, and the trainer of agents that act in an environment.

`OnlineTrainer` trains V, M and C while C acts; `ImaginationTrainer` (imagined.py) a new C in the dreams of another run;
`VideoTrainer` (video.py) V and M on recordings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from longdream.agent.config.checks import check_clip
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent, Stage
from longdream.agent.core.ranks import here
from longdream.agent.evaluation.diagnosis import diagnose, tell
from longdream.agent.evaluation.policy import evaluate_agent, play
from longdream.agent.run import folder as run_folder
from longdream.agent.run import parts, sinks
from longdream.agent.run.logger import Follower, Logger
from longdream.agent.run.metrics import RATES, Averages, Rates, Timed
from longdream.agent.run.signals import Interrupted, Signals
from longdream.agent.run.warm_start import RAMP, warm_start
from longdream.agent.train.collecting import open_collector, open_world
from longdream.agent.train.session import Session
from longdream.controller.types import Exporting
from longdream.envs.contract import EnvError

WARMUP_LOG = 100
"""Updates between lines of metrics during warm-up, when no steps are taken."""
LINES = 50
"""Lines of metrics of a run that counts updates, evenly over them."""
RETURNS = ("return_mean", "return_std", "length_mean", "random_mean", "without_memory_mean")


class Trainer(Session):
    """A run in progress. At the top of the loop in `run` its state is complete: saved there, it resumes exactly.

    Several ranks take their turns together, and rank 0 keeps the record (agent/core/ranks.py). The configuration and
    `progress` are those of the whole run.

    Derived classes build `learner` in their __init__, before which no file is touched, and say what a turn is. The last
    methods are theirs to define.

    Args:
        saved: the checkpoint that the run resumes from, if any.
        stack: closes what is opened here.
    """

    UNIT: ClassVar[str] = "updates"
    """What `progress` counts, as summary.json names it."""
    SHOWN: ClassVar[tuple[str, ...]]
    """Metrics on the console's line."""

    def __init__(self, config: Config, folder: Path, saved: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        super().__init__(config, folder, saved, signals, stack)
        torch.manual_seed(config.seed)

    @classmethod
    def train(cls, config: Config, folder: Path, resume: bool = False, console: bool = True) -> dict[str, Any]:
        """Train in `folder`, which is made here or, to `resume`, is there; the summary, which summary.json holds too.

        On the CPU a run that was killed at any moment and resumed gives the metrics of one that never stopped, bit for
        bit (all but the keys under time/), unless it collects beside learning (env.workers: beside).

        Raises:
            UserError: the configuration, the folder or the environment cannot be used; a new folder is not made then.
            EnvError: the environment failed. All is saved but the episodes under way.
            Interrupted: SIGINT, SIGTERM or SIGHUP came. All is saved.
            NotFinite, DiskFull: the run cannot go on. The last checkpoint is intact.
        """
        ranks = here()
        with ExitStack() as stack:
            signals = stack.enter_context(Signals())
            if config.threads:
                torch.set_num_threads(config.threads)
            saved = None
            with ranks.together():
                shown_in = sinks.find(config.log.to, run_folder.settings_of(config))
                if resume and not ranks.rank:
                    stack.enter_context(run_folder.lock(folder))
                if resume:
                    saved = parts.newest(folder)
                    summary = run_folder.summary(folder)
                    if saved and summary and summary.get(cls.UNIT) == saved["progress"] >= cls.total(config):
                        return summary
                with run_folder.fitting(folder, saved):
                    trainer = cls(config, folder, saved, signals, stack)
                if config.init and not saved:
                    warm_start(trainer.learner, Path(config.init))
            with ranks.together():
                if resume and not ranks.rank:
                    run_folder.write_config(folder, config)
                elif not ranks.rank:
                    run_folder.create(folder, config)
                    stack.enter_context(run_folder.lock(folder))
            log: Logger = Follower(ranks.rank)
            if not ranks.rank:
                log = Logger(folder, console, cls.total(config), cls.SHOWN, sinks=shown_in)
            trainer.open(stack.enter_context(log), saved)
            trainer.run()
            return trainer.finish()

    def open(self, logger: Logger, saved: dict[str, Any] | None) -> Self:
        """Open the record and, with a checkpoint, go back to the moment when it was saved."""
        self.logger = logger
        warnings = logger.restore(saved and saved["logger"])
        logger.note(self.greeting(saved["progress"] if saved else 0))
        if saved:
            run_folder.fill(self.learner, saved, self.folder)
            self.averages = Averages(saved["averages"]["sums"], saved["averages"]["numbers"])
            with run_folder.fitting(self.folder, saved):
                warnings += self.restore(saved)
                parts.restore_randomness(saved, self.learner)
        elif here().rank:
            parts.seed_torch(self.learner, 0)
        if saved and "lost" in saved:
            self.saved_at = -float("inf")  # before the files that the checkpoint names are replaced
            warnings += [saved["lost"]] if not here().rank else []
        for warning in warnings:
            logger.note(f"warning: {warning}")
        parts.check_weights(self.learner)
        return self

    def run(self) -> None:
        """Turn after turn to the end, and a checkpoint."""
        try:
            while True:
                self.report()
                due = self.meet()
                if self.progress >= self.total(self.config):
                    break
                if due:
                    self.save()
                self.turn()
        except (Interrupted, EnvError):
            self.save()
            self.settle()
            self.meet()  # the signal that ends this run may have reached the environment's processes first
            raise
        self.save()
        self.settle()

    def final_evaluation(self, agent: Agent) -> dict[str, Any]:
        """The agent's returns beside those without memory and of random actions, written as metrics."""
        config = self.config
        episodes = config.evaluate.final_episodes
        self.logger.note(f"evaluating over {episodes} episodes")
        summary = evaluate_agent(agent, config.evaluation_env, episodes, config.seed, config.evaluate, self.signals)
        self.logger.write(self.progress, {f"final/{key}": summary[key] for key in RETURNS if key in summary})
        self.show(agent)
        if isinstance(agent.controller, Exporting) and not here().rank:
            with self.logger.view("what C exports"):
                agent.controller.export(self.folder)
        return summary | {"dream_steps": agent.dream_steps}

    def show(self, agent: Agent) -> None:
        """Show an episode of the evaluation in pictures, diagnose the agent, and warn once of each part that stands at
        red; unless the run is shown nowhere."""
        if here().rank or not self.config.log.to:
            return
        from longdream.agent.evaluation.pictures import evaluation_pictures  # imported here: it brings matplotlib

        env, seed = self.config.evaluation_env, self.config.seed
        pictures = evaluation_pictures(agent, env, seed, self.config.evaluate.greedy, self.signals)
        self.logger.draw(self.progress, pictures)
        tell(diagnose(agent, env, seed, signals=self.signals), self.logger, self.progress, self.count)

    def rate_scale(self) -> float:
        """Factor on the learning rates: from 1 linearly to `learn.decay` at the end."""
        return 1 - (1 - self.config.learn.decay) * self.progress / self.total(self.config)

    def is_due(self, counter: str, times: int, before_the_end: bool = False) -> bool:
        """Whether one of `times` evenly spaced events is due; `counter` holds `progress` at the last one."""
        total = self.total(self.config)
        passed = self.progress * times // total
        return passed > self.count[counter] * times // total and not (before_the_end and passed == times)

    # -- what derived classes say -------------------------------------------------------------------------------------

    @staticmethod
    def total(config: Config) -> int:
        """`progress` at which the run is over."""
        raise NotImplementedError

    def greeting(self, progress: int) -> str:
        """What is printed when training begins."""
        source = f", beginning with the weights of {self.config.init}" if self.config.init else ""
        return f"training in {self.folder}" + (f", from step {progress:,} on" if progress else source)

    def turn(self) -> None:
        """The smallest piece of work."""
        raise NotImplementedError

    def report(self) -> None:
        """Between turns: write the line of metrics, and make the evaluation, that is due."""
        raise NotImplementedError

    def restore(self, saved: dict[str, Any]) -> list[str]:
        """Put that back; warnings."""
        raise NotImplementedError

    def finish(self) -> dict[str, Any]:
        """The last evaluation, written to summary.json."""
        raise NotImplementedError


class OnlineTrainer(Timed, Trainer):
    """V, M and C learn from what C experiences in the environment."""

    UNIT = "env_steps"
    SHOWN = ("train/return", "train/reward", "evaluate/return_mean", *RATES)

    def __init__(self, config: Config, folder: Path, saved: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        super().__init__(config, folder, saved, signals, stack)
        # learning_began: real steps by then. lost_worlds: environments that failed. faults: that the environments of
        # earlier sessions have survived. rewarded: real steps by the last line.
        counters = {"learning_began": None, "warmup": 0, "updates": 0, "lost_worlds": 0, "faults": 0, "rewarded": 0}
        self.count = counters | self.count
        roots = {name: here().seed(config.seed, i) for i, name in enumerate(("act", "sample"))}
        self.rng = {name: np.random.default_rng(root) for name, root in roots.items()}
        config = here().share(config)
        seed = config.seed
        lost = (self.count["lost_worlds"], saved["progress"] if saved and "lost" in saved else 0)
        if any(lost):  # the next world plays other episodes, not those of the beginning again
            seed = int(np.random.SeedSequence((seed, *lost)).generate_state(1)[0])
        self.world = open_world(config, seed, signals, saved)
        self.world_is_lost = False
        stack.callback(self.world.close)
        self.learner = self.agent = Agent(config, self.world.spec)
        self.agent.check_memory()
        self.replay, self.collector = open_collector(self.world, self.agent, folder, self.rng["act"], seed)
        stack.callback(self.replay.close)
        check_clip(config, self.replay.longest_clip)
        self.seconds: dict[str, float] = defaultdict(float)
        self.rates = Rates(self.agent, self.config.replay.batch * config.replay.length)
        self.batch = config.replay.batch
        self.steps = 0
        self.ready = False
        """Whether all ranks' replays hold a clip."""
        self.ended: list[dict[str, float]] = []
        """Metrics of episodes that ended with the last step."""

    @staticmethod
    def total(config: Config) -> int:
        return config.learn.steps

    @property
    def progress(self) -> int:
        return self.steps

    def greeting(self, progress: int) -> str:
        return f"{super().greeting(progress)}\n{self.config.env.id}: {self.world.reading()}"

    def turn(self) -> None:
        """A step of every copy and the updates that are due then, or one update of warm-up."""
        learn = self.config.learn
        replay = self.config.replay
        count = self.count
        warmup = learn.warmup + learn.warmup_model
        if count["learning_began"] is None:
            self.act(random=not self.config.init)
            if self.progress >= learn.prefill and self.ready:
                count["learning_began"] = self.progress
        elif count["warmup"] < warmup:
            self.learn("encoder" if count["warmup"] < learn.warmup else "model")
            count["warmup"] += 1
            if count["warmup"] % WARMUP_LOG == 0 or count["warmup"] in (learn.warmup, warmup):
                self.log()
        elif not self.ready:  # resumed without it: these steps bring no updates
            before = self.progress
            self.act(random=False)
            count["learning_began"] += self.progress - before
        else:
            self.act(random=False)
            rows = (self.progress - count["learning_began"]) * learn.train_ratio
            while count["updates"] < int(rows / (replay.batch * replay.length)):
                self.learn("controller")
                count["updates"] += 1

    def act(self, random: bool) -> None:
        """A step of every copy, into the replay."""
        self.ended = []
        with here().together(self._reached) as met, self.timed("act"), self.in_world():
            self.ended = self.collector.step(random)
        for episode in self.ended:
            self.averages.add({key.replace("episode/", "train/"): value for key, value in episode.items()})
        if self._reach(met[0]):
            for episode in chain(*here().gather(self.ended)):
                self.logger.write(self.progress, episode)

    def _reached(self) -> tuple[float, ...]:
        """What the other ranks need to know of this one after a step."""
        return self.collector.env_steps, self.replay.can_sample(self.config.replay.length), len(self.ended)

    def _reach(self, met: np.ndarray) -> int:
        """Take in what `_reached` gave on each rank; returns the number of episodes that ended."""
        steps, ready, ended = met.T
        self.steps = int(steps.sum())
        self.ready = bool(ready.all())
        return int(ended.sum())

    def learn(self, stage: Stage) -> None:
        """An update of V, M and C, or of those up to `stage`."""
        settings = self.config.replay
        with self.timed("replay"):
            rows = self.replay.sample(
                self.rng["sample"],
                self.batch,
                settings.length,
                settings.episode_start_fraction,
                settings.priority_fraction,
            )
        metrics = self.agent.update(rows, stage, self.rate_scale())
        self.averages.add(metrics, self.agent.finite)

    def rate_scale(self) -> float:
        """Factor on the learning rates: 1 when learning begins, `learn.decay` at the last step."""
        learn = self.config.learn
        began = self.count["learning_began"]
        done = (self.progress - began) / max(1, learn.steps - began)
        ramp = min(1.0, (self.agent.updates + 1) / RAMP) if self.config.init else 1.0
        return ramp * (1 - (1 - learn.decay) * min(1.0, done))

    def report(self) -> None:
        settings = self.config.evaluate
        finished = self.progress >= self.total(self.config)
        if self.passed(settings.log_every, "logged") or (finished and self.averages.numbers):
            self.log()
        if settings.every and self.passed(settings.every, "evaluated") and not finished:
            self.evaluate()

    def passed(self, every: int, counter: str) -> bool:
        """Whether a multiple of `every` steps was passed since the event of `counter`."""
        return self.progress // every > self.count[counter] // every

    def log(self) -> None:
        """A line of metrics: means over the updates and episodes since the last one, counts and timings."""
        counts = {"lost_worlds": self.count["lost_worlds"], "faults": self.faults()}
        counts |= {"episodes": self.collector.episodes, "rows": len(self.replay)}
        metrics = {f"count/{key}": value for key, value in here().total(counts).items()}
        metrics |= {f"time/{key}": value for key, value in (self.seconds | self.agent.seconds).items()}
        metrics |= self.rates.take() | self.collector.take_metrics()
        # episodes are reported when they end; where these are long, the reward per step is known before
        if (steps := self.progress - self.count["rewarded"]) > 0:
            metrics["train/reward"] = here().total({"": self.collector.take_reward()})[""] / steps
            self.count["rewarded"] = self.progress
        self.write(metrics)

    def evaluate(self) -> None:
        """Play some episodes in an environment of their own: this changes nothing in training."""
        config = self.config
        settings = config.evaluate
        with self.timed("evaluate"):
            returns = play(
                self.agent, config.evaluation_env, settings.episodes, config.seed, "agent", settings, self.signals
            ).to_json()
            self.show(self.agent)
        self.logger.write(self.progress, {f"evaluate/{key}": returns[key] for key in RETURNS if key in returns})
        self.count["evaluated"] = self.progress

    def finish(self) -> dict[str, Any]:
        return self.conclude(self.final_evaluation(self.agent) | {"env_steps": self.progress})

    def save(self) -> None:
        with self.timed("save"):
            super().save()

    def saved(self) -> None:
        self.replay.commit_eviction()
        parts.remove_stale(self.folder)

    def state(self) -> dict[str, Any]:
        """A world that is lost has no state: new episodes will follow its last rows.

        Raises:
            EnvError: the world failed now; a second call saves the run without it.
        """
        collected = None
        if not self.world_is_lost:
            with self.in_world():
                collected = self.collector.get_state()
        return {
            "spec": self.world.spec.to_json(),
            "collector": collected,
            "collected": [self.collector.env_steps, self.collector.episodes],
            "replay": self.replay.state(),
            "random": {"numpy": {name: rng.bit_generator.state for name, rng in self.rng.items()}},
        }

    def restore(self, saved: dict[str, Any]) -> list[str]:
        lost = "lost" in saved
        warnings = [] if lost else self.replay.restore(saved["replay"])
        if saved["collector"]:
            self.collector.set_state(saved["collector"])
        self.collector.env_steps, self.collector.episodes = saved["collected"]
        for i, (name, state) in enumerate(saved["random"]["numpy"].items()):
            if lost:
                state = np.random.default_rng(here().seed(self.config.seed, i, saved["progress"])).bit_generator.state
            self.rng[name].bit_generator.state = state  # in place: the collector has the same one
        self._reach(here().numbers(*self._reached()))
        self.rates.restart()
        return warnings

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"faults": self.faults()}

    def faults(self) -> int:
        """How often an environment has failed and was started again, in earlier sessions too."""
        return self.count["faults"] + self.world.faults

    @contextmanager
    def in_world(self) -> Iterator[None]:
        """Around calls of the training environment: notes that it failed."""
        try:
            yield
        except EnvError:
            self.world_is_lost = True
            self.count["lost_worlds"] += 1
            raise
