"""The loop: act in the real world, remember, learn in dreams; evaluate, record and save as it goes."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent import checkpoint, run
from agent.agent import Agent
from agent.collect import Collector
from agent.config import Config
from agent.judge import hidden_from, judge, play
from agent.logger import Logger
from agent.replay import Replay
from agent.signals import Interrupted, Signals
from envs.contract import EnvError, UserError
from envs.make import World

SHOW = ("train/return", "evaluate/return_mean")
WARMUP_LOG = 100
"""Updates between lines of metrics during warm-up, when no steps are taken."""


def train(config: Config, folder: Path, resume: bool = False, console: bool = True) -> dict[str, Any]:
    """Train in `folder`, made here or, to `resume`, there already; returns what is also written to its summary.json.

    On the CPU a run that was killed at any moment and resumed gives the metrics of one that never stopped, bit for bit
    (all but the keys under time/).

    Raises:
        UserError: the configuration, the folder or the environment cannot be used; a new folder is not made then.
        EnvError: the environment failed. All is saved but the episodes under way.
        Interrupted: SIGINT or SIGTERM came. All is saved.
        NotFinite, DiskFull: the run cannot go on. The last checkpoint is intact.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        if config.threads:
            torch.set_num_threads(config.threads)
        tree = None
        if resume:
            stack.enter_context(run.lock(folder))
            if checkpoint.latest(folder / "checkpoints"):
                tree, step = checkpoint.load(folder / "checkpoints")
                if step >= config.learn.steps and (folder / "summary.json").exists():
                    return json.loads((folder / "summary.json").read_text())
        training = Training(config, folder, tree, signals, stack)
        if not resume:
            run.create(folder, config)
            stack.enter_context(run.lock(folder))
        training.record(stack.enter_context(Logger(folder, console, config.learn.steps, SHOW)), tree)
        training.run()
        return training.finish()


class Training:
    """A run in progress. At the top of `run`'s loop its state is whole: saved there, it goes on exactly."""

    def __init__(self, config: Config, folder: Path, tree: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        """Build everything and touch no file. tree: the checkpoint to go on from. stack: closes what is opened here."""
        self.config, self.folder, self.signals = config, folder, signals
        self.began = self.saved = time.monotonic()
        # wall: seconds of earlier sessions. begun: real steps when learning began. lost: worlds that failed
        self.count = {"wall": 0.0, "begun": None, "warmup": 0, "updates": 0, "logged": 0, "evaluated": 0, "lost": 0}
        self.count |= tree["count"] if tree else {}
        torch.manual_seed(config.seed)
        self.rng = {name: np.random.default_rng((config.seed, i)) for i, name in enumerate(("act", "sample"))}
        # after a lost world the next one plays other episodes, not those of the beginning again
        again = int(np.random.SeedSequence((config.seed, self.count["lost"])).generate_state(1)[0])
        seed, env = again if self.count["lost"] else config.seed, config.env
        self.world = hidden_from(signals, World, env.id, env.copies, seed, env.kwargs, env.workers, env.timeout_s)
        stack.callback(self.world.close)
        self.agent = Agent(config, self.world.spec)
        self.replay = Replay(folder / "replay", self.world.spec, self.world.num_envs, config.replay.capacity)
        stack.callback(self.replay.close)
        if self.replay.longest_clip < config.replay.length:
            raise UserError(
                f"replay.capacity = {config.replay.capacity} always has clips of {self.replay.longest_clip} rows only, "
                f"replay.length is {config.replay.length}: raise the one or lower the other"
            )
        self.collector = Collector(self.world, self.agent, self.replay, config.learn.explore, self.rng["act"])
        self.world_is_lost = False
        self.window = Window()
        self.seconds: dict[str, float] = defaultdict(float)

    def record(self, logger: Logger, tree: dict[str, Any] | None) -> None:
        """Open the record and, with a checkpoint, go back to the moment it was saved."""
        self.logger = logger
        warnings = logger.restore(tree and tree["logger"])
        if tree:
            run.fill(self.agent, tree, self.folder)
            warnings += self.replay.restore(tree["replay"])
            if tree["collector"]:
                self.collector.set_state(tree["collector"])
            self.collector.env_steps, self.collector.episodes = tree["acted"]
            self.window = Window(tree["window"]["sums"], tree["window"]["numbers"])
            for name, state in tree["random"]["numpy"].items():
                self.rng[name].bit_generator.state = state
            torch.set_rng_state(tree["random"]["torch"])
            if self.agent.device.type == "cuda" and tree["random"]["cuda"]:
                torch.cuda.set_rng_state_all(tree["random"]["cuda"])
            logger.note(f"going on from step {self.collector.env_steps:,}")
        for warning in warnings:
            logger.note(f"warning: {warning}")

    def save(self) -> None:
        """Write a checkpoint. A world that failed cannot be saved: the run goes on with new episodes."""
        with self.timed("save"):
            random = {name: rng.bit_generator.state for name, rng in self.rng.items()}
            cuda = torch.cuda.get_rng_state_all() if self.agent.device.type == "cuda" else []
            tree = {
                **self.agent.state_dict(),
                "spec": self.world.spec.to_json(),
                "collector": None if self.world_is_lost else self.collector.get_state(),
                "acted": [self.collector.env_steps, self.collector.episodes],
                "replay": self.replay.state(),
                "logger": self.logger.state(),
                "window": {"sums": dict(self.window.sums), "numbers": dict(self.window.numbers)},
                "random": {"numpy": random, "torch": torch.get_rng_state(), "cuda": cuda},
                "count": self.count | {"wall": self.wall()},
            }
            checkpoint.save(self.folder / "checkpoints", self.collector.env_steps, tree)
            self.replay.commit_eviction()
        self.saved = time.monotonic()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turn after turn, to the last step, and a checkpoint."""
        clock = self.config.evaluate
        try:
            while True:
                step = self.collector.env_steps
                finished = step >= self.config.learn.steps
                if step // clock.log_every > self.count["logged"] or (finished and self.window.numbers):
                    self.log()
                if clock.every and step // clock.every > self.count["evaluated"] and not finished:
                    self.evaluate()
                self.signals.check()
                if finished:
                    break
                if time.monotonic() - self.saved > clock.save_seconds:
                    self.save()
                self.turn()
        except (Interrupted, EnvError):
            self.save()
            raise
        self.save()

    def turn(self) -> None:
        """The smallest piece of work: a step of every copy and the updates that are due, or one update of warm-up."""
        learn, replay, count = self.config.learn, self.config.replay, self.count
        if count["begun"] is None:
            self.act(random=True)
            if self.collector.env_steps >= learn.prefill and self.replay.can_sample(replay.length):
                count["begun"] = self.collector.env_steps
        elif count["warmup"] < learn.warmup:
            self.learn(warmup=True)
            count["warmup"] += 1
            if count["warmup"] % WARMUP_LOG == 0 or count["warmup"] == learn.warmup:
                self.log()
        else:
            self.act(random=False)
            due = int((self.collector.env_steps - count["begun"]) * learn.ratio / (replay.batch * replay.length))
            while count["updates"] < due and self.replay.can_sample(replay.length):
                self.learn(warmup=False)
                count["updates"] += 1

    def act(self, random: bool) -> None:
        with self.timed("act"):
            try:
                ended = self.collector.step(random)
            except EnvError:
                # In the middle of a turn: what came so far is kept, and is_first rows of new episodes will follow it.
                self.world_is_lost = True
                self.count["lost"] += 1
                raise
        for episode in ended:
            self.logger.write(self.collector.env_steps, episode)
            self.window.add({key.replace("episode/", "train/"): value for key, value in episode.items()})

    def learn(self, warmup: bool) -> None:
        replay, skipped = self.config.replay, self.agent.skipped
        with self.timed("replay"):
            rows = self.replay.sample(self.rng["sample"], replay.batch, replay.length, replay.starts, replay.surprise)
        metrics = self.agent.update(rows, warmup)
        if self.agent.skipped == skipped:  # one that was skipped has no finite metrics
            self.window.add(metrics)

    # -- what is told -------------------------------------------------------------------------------------------------

    def log(self) -> None:
        """A line of metrics: means over the updates and episodes since the last one."""
        step = self.collector.env_steps
        counts = {"updates": self.agent.updates, "skipped": self.agent.skipped, "episodes": self.collector.episodes}
        counts["rows"] = len(self.replay)
        seconds = self.seconds | self.agent.seconds | {"wall": self.wall()}
        told = {f"count/{key}": value for key, value in counts.items()}
        told |= {f"time/{key}": value for key, value in seconds.items()}
        self.logger.write(step, self.window.means() | told)
        self.window = Window()
        self.count["logged"] = step // self.config.evaluate.log_every

    def evaluate(self) -> None:
        config = self.config
        clock = config.evaluate
        with self.timed("evaluate"):
            returns = play(self.agent, config.env, clock.episodes, config.seed, "agent", clock.copies, self.signals)
        self.log_returns("evaluate", returns.to_json())
        self.count["evaluated"] = self.collector.env_steps // clock.every

    def log_returns(self, name: str, returns: dict[str, Any]) -> None:
        told = ("return_mean", "return_std", "length_mean", "random_mean", "without_memory_mean")
        self.logger.write(self.collector.env_steps, {f"{name}/{key}": returns[key] for key in told if key in returns})

    def finish(self) -> dict[str, Any]:
        """The last evaluation, written to summary.json."""
        config, clock = self.config, self.config.evaluate
        self.logger.note(f"evaluating over {clock.final_episodes} episodes")
        found = judge(self.agent, config.env, clock.final_episodes, config.seed, clock.copies, self.signals)
        self.log_returns("final", found)
        trained = {
            "env_steps": self.collector.env_steps,
            "updates": self.agent.updates,
            "wall_s": round(self.wall(), 1),
        }
        run.write(self.folder / "summary.json", json.dumps(found | trained, indent=1) + "\n")
        return found | trained

    def wall(self) -> float:
        """Seconds of this run, those of earlier sessions included."""
        return self.count["wall"] + time.monotonic() - self.began

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


class Window:
    """Means of metrics; tensors stay on their device until asked for."""

    def __init__(self, sums: dict[str, Any] | None = None, numbers: dict[str, int] | None = None):
        self.sums, self.numbers = sums or {}, numbers or {}

    def add(self, metrics: dict[str, Any]) -> None:
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.numbers[key] = self.numbers.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: float(total) / self.numbers[key] for key, total in self.sums.items()}
