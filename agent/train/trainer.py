"""Training: what all trainers share, and the trainer of agents that act in an environment.

`OnlineTrainer` trains V, M and C while C acts; `ImaginationTrainer` (imagined.py) a new C in the dreams of another run;
`VideoTrainer` (video.py) V and M on recordings.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from longdream.agent.config.checks import check_clip
from longdream.agent.config.schema import Config, EnvConfig
from longdream.agent.core.agent import Agent, Stage
from longdream.agent.core.device import resolve_device
from longdream.agent.core.learner import Learner
from longdream.agent.data.base import ReplayBuffer
from longdream.agent.data.device_replay import DeviceReplay
from longdream.agent.data.replay import Replay
from longdream.agent.evaluation.policy import evaluate_agent, make_world, play
from longdream.agent.run import folder as run_folder
from longdream.agent.run import sinks
from longdream.agent.run.logger import Logger
from longdream.agent.run.metrics import RATES, Averages, Rates, Timed
from longdream.agent.run.saver import Saver
from longdream.agent.run.signals import Interrupted, Signals
from longdream.agent.run.warm_start import RAMP, warm_start
from longdream.agent.train.collector import Collector, RowCollector
from longdream.agent.train.device_collector import DeviceCollector
from longdream.controller.types import Exporting
from longdream.envs.contract import EnvError, UserError
from longdream.envs.make import World, makes_tensors, vector_takes

WARMUP_LOG = 100
"""Updates between lines of metrics during warm-up, when no steps are taken."""
LINES = 50
"""Lines of metrics of a run that counts updates, evenly over them."""
RETURNS = ("return_mean", "return_std", "length_mean", "random_mean", "without_memory_mean")


class Trainer:
    """A run in progress. At the top of the loop in `run` its state is complete: saved there, it resumes exactly.

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
        self.saver = Saver(lambda step, tree: run_folder.save(root, step, tree, config), self.saved)
        stack.callback(self.saver.settle)
        torch.manual_seed(config.seed)

    @classmethod
    def train(cls, config: Config, folder: Path, resume: bool = False, console: bool = True) -> dict[str, Any]:
        """Train in `folder`, which is made here or, to `resume`, is there; the summary, which summary.json holds too.

        On the CPU a run that was killed at any moment and resumed gives the metrics of one that never stopped, bit for
        bit (all but the keys under time/).

        Raises:
            UserError: the configuration, the folder or the environment cannot be used; a new folder is not made then.
            EnvError: the environment failed. All is saved but the episodes under way.
            Interrupted: SIGINT, SIGTERM or SIGHUP came. All is saved.
            NotFinite, DiskFull: the run cannot go on. The last checkpoint is intact.
        """
        with ExitStack() as stack:
            signals = stack.enter_context(Signals())
            if config.threads:
                torch.set_num_threads(config.threads)
            saved = None
            shown_in = sinks.find(config.log.to, run_folder.settings_of(config))
            if resume:
                stack.enter_context(run_folder.lock(folder))
                saved = run_folder.newest(folder)
                summary = run_folder.summary(folder)
                if saved and summary and summary.get(cls.UNIT) == saved["progress"] >= cls.total(config):
                    return summary
            with run_folder.fitting(folder, saved):
                trainer = cls(config, folder, saved, signals, stack)
            if config.init and not saved:
                warm_start(trainer.learner, Path(config.init))
            if resume:
                run_folder.write_config(folder, config)
            else:
                run_folder.create(folder, config)
                stack.enter_context(run_folder.lock(folder))
            logger = Logger(folder, console, cls.total(config), cls.SHOWN, sinks=shown_in)
            trainer.open(stack.enter_context(logger), saved)
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
                torch.set_rng_state(saved["random"]["torch"])
                if self.learner.device.type == "cuda" and saved["random"]["cuda"]:
                    torch.cuda.set_rng_state_all(saved["random"]["cuda"])
        for warning in warnings:
            logger.note(f"warning: {warning}")
        return self

    def run(self) -> None:
        """Turn after turn to the end, and a checkpoint."""
        try:
            while True:
                self.report()
                self.signals.check()
                if self.progress >= self.total(self.config):
                    break
                self.saver.poll()
                if time.monotonic() - self.saved_at > self.config.evaluate.save_seconds:
                    self.save()
                self.turn()
        except (Interrupted, EnvError):
            self.save()
            self.saver.settle()
            self.signals.check()  # the signal that ends this run may have reached the environment's processes first
            raise
        self.save()
        self.saver.settle()

    def save(self) -> None:
        """Write a checkpoint, from which `open` goes on exactly, while training goes on."""
        cuda = torch.cuda.get_rng_state_all() if self.learner.device.type == "cuda" else []
        state = {
            **self.learner.state_dict(),
            **self.state(),
            "progress": self.progress,
            "logger": self.logger.state(),
            "averages": {"sums": dict(self.averages.sums), "numbers": dict(self.averages.numbers)},
            "count": self.counters(),
        }
        state["random"] = {"torch": torch.get_rng_state(), "cuda": cuda, **state.get("random", {})}
        self.saver.save(self.progress, state)
        self.saved_at = time.monotonic()

    def saved(self) -> None:
        """Called once a checkpoint is on disk."""

    def counters(self) -> dict[str, Any]:
        """`count` as it is kept in a checkpoint."""
        return self.count | {"wall": self.wall()}

    def write(self, metrics: dict[str, Any]) -> None:
        """A line of metrics: these, and means over what was added to `averages` since the last line."""
        learner = self.learner
        learner.settle()
        counts = {"count/updates": learner.updates, "count/skipped": learner.skipped, "time/wall": self.wall()}
        self.logger.write(self.progress, self.averages.means() | counts | metrics)
        self.averages = Averages()
        self.count["logged"] = self.progress

    def conclude(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json: these values, the number of updates, and the time that they took."""
        summary = summary | {"updates": self.learner.updates, "wall_s": round(self.wall(), 1)}
        run_folder.write(self.folder / "summary.json", run_folder.to_json(summary, indent=1) + "\n")
        return summary

    def final_evaluation(self, agent: Agent) -> dict[str, Any]:
        """The agent's returns beside those without memory and of random actions, written as metrics."""
        config = self.config
        episodes = config.evaluate.final_episodes
        self.logger.note(f"evaluating over {episodes} episodes")
        summary = evaluate_agent(agent, config.evaluation_env, episodes, config.seed, config.evaluate, self.signals)
        self.logger.write(self.progress, {f"final/{key}": summary[key] for key in RETURNS if key in summary})
        if isinstance(agent.controller, Exporting):
            with self.logger.view("what C exports"):
                agent.controller.export(self.folder)
        return summary | {"dream_steps": agent.dream_steps}

    def rate_scale(self) -> float:
        """Factor on the learning rates: from 1 linearly to `learn.decay` at the end."""
        return 1 - (1 - self.config.learn.decay) * self.progress / self.total(self.config)

    def is_due(self, counter: str, times: int, before_the_end: bool = False) -> bool:
        """Whether one of `times` evenly spaced events is due; `counter` holds `progress` at the last one."""
        total = self.total(self.config)
        passed = self.progress * times // total
        return passed > self.count[counter] * times // total and not (before_the_end and passed == times)

    def wall(self) -> float:
        """Seconds of this run, those of earlier sessions included."""
        return self.count["wall"] + time.monotonic() - self.began

    # -- what derived classes say -------------------------------------------------------------------------------------

    @staticmethod
    def total(config: Config) -> int:
        """`progress` at which the run is over."""
        raise NotImplementedError

    @property
    def progress(self) -> int:
        """How far the run is, in its unit."""
        return self.learner.updates

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

    def state(self) -> dict[str, Any]:
        """More for the checkpoint, under keys that the rest leaves free."""
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
        self.rng = {name: np.random.default_rng((config.seed, i)) for i, name in enumerate(("act", "sample"))}
        seed = config.seed
        if lost := self.count["lost_worlds"]:  # the next world plays other episodes, not those of the beginning again
            seed = int(np.random.SeedSequence((seed, lost)).generate_state(1)[0])
        on_device = config.replay.keep == "device"
        env = _making_tensors(config) if on_device else config.env
        self.world = make_world(World, env, env.copies, seed, signals, saved)
        self.world_is_lost = False
        stack.callback(self.world.close)
        self.learner = self.agent = Agent(config, self.world.spec)
        self.agent.check_memory()
        self.replay: ReplayBuffer
        self.collector: RowCollector
        capacity = config.replay.capacity
        copies = self.world.num_envs
        priority = config.replay.priority
        if on_device:
            replay = DeviceReplay(self.agent.device, self.world.spec, copies, capacity, priority)
            self.collector = DeviceCollector(self.world, self.agent, replay, self.rng["act"], seed)
        else:
            replay = Replay(folder / "replay", self.world.spec, copies, capacity, priority=priority)
            self.collector = Collector(self.world, self.agent, replay, self.rng["act"])
        self.replay = replay
        stack.callback(replay.close)
        check_clip(config, replay.longest_clip)
        self.seconds: dict[str, float] = defaultdict(float)
        self.rates = Rates(self.agent, config.replay.batch * config.replay.length)

    @staticmethod
    def total(config: Config) -> int:
        return config.learn.steps

    @property
    def progress(self) -> int:
        return self.collector.env_steps

    def turn(self) -> None:
        """A step of every copy and the updates that are due then, or one update of warm-up."""
        learn = self.config.learn
        replay = self.config.replay
        count = self.count
        warmup = learn.warmup + learn.warmup_model
        if count["learning_began"] is None:
            self.act(random=not self.config.init)
            if self.progress >= learn.prefill and self.replay.can_sample(replay.length):
                count["learning_began"] = self.progress
        elif count["warmup"] < warmup:
            self.learn("encoder" if count["warmup"] < learn.warmup else "model")
            count["warmup"] += 1
            if count["warmup"] % WARMUP_LOG == 0 or count["warmup"] in (learn.warmup, warmup):
                self.log()
        elif not self.replay.can_sample(replay.length):  # resumed without it: these steps bring no updates
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
        with self.timed("act"), self.in_world():
            ended = self.collector.step(random)
        for episode in ended:
            self.logger.write(self.progress, episode)
            self.averages.add({key.replace("episode/", "train/"): value for key, value in episode.items()})

    def learn(self, stage: Stage) -> None:
        """An update of V, M and C, or of those up to `stage`."""
        settings = self.config.replay
        with self.timed("replay"):
            rows = self.replay.sample(
                self.rng["sample"],
                settings.batch,
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
        metrics = {f"count/{key}": value for key, value in counts.items()}
        metrics |= {f"time/{key}": value for key, value in (self.seconds | self.agent.seconds).items()}
        metrics |= self.rates.take()
        # episodes are reported when they end; where these are long, the reward per step is known before
        if (steps := self.progress - self.count["rewarded"]) > 0:
            metrics["train/reward"] = self.collector.take_reward() / steps
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
        self.logger.write(self.progress, {f"evaluate/{key}": returns[key] for key in RETURNS if key in returns})
        self.count["evaluated"] = self.progress

    def finish(self) -> dict[str, Any]:
        return self.conclude(self.final_evaluation(self.agent) | {"env_steps": self.progress})

    def save(self) -> None:
        with self.timed("save"):
            super().save()

    def saved(self) -> None:
        self.replay.commit_eviction()

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
        warnings = self.replay.restore(saved["replay"])
        if saved["collector"]:
            self.collector.set_state(saved["collector"])
        self.collector.env_steps, self.collector.episodes = saved["collected"]
        for name, state in saved["random"]["numpy"].items():
            self.rng[name].bit_generator.state = state
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


def _making_tensors(config: Config) -> EnvConfig:
    """The environment, told on which device to make its tensors and, if it can, to let episodes end at different times:
    where all copies are of one age, so is what is learned from.

    Raises:
        UserError: it makes none.
    """
    env = config.env
    if not makes_tensors(env.id):
        raise UserError(
            f"{env.id} makes no tensors: keep the replay on disk (replay.keep = disk), or train on an "
            f"environment that does, like longdream/FastMemoryMaze-9x9-v0"
        )
    kwargs: dict[str, Any] = {"device": resolve_device(config.device)}
    if vector_takes(env.id, "stagger"):
        kwargs["stagger"] = True
    return replace(env, kwargs=kwargs | env.kwargs)
