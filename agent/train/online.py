"""The loop: act in the real world, remember, learn in dreams; evaluate, record and save as it goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longdream.agent.config import ranges
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent, Upto
from longdream.agent.core.learner import resolve_device
from longdream.agent.data.device_replay import DeviceCollector, DeviceReplay
from longdream.agent.data.replay import Replay
from longdream.agent.evaluation.policy import judge, make_world, play
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run
from longdream.agent.run import metrics as saving
from longdream.agent.run.logger import Logger
from longdream.agent.run.metrics import Window
from longdream.agent.run.signals import Interrupted, Signals
from longdream.agent.train.collector import Collector
from longdream.controller.types import Exporting
from longdream.envs.contract import EnvError, UserError
from longdream.envs.make import World, makes_tensors

SHOW = ("train/return", "train/reward", "evaluate/return_mean")
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
            tree = run.newest(folder)
            if tree and (done := run.summary(folder)) and done["env_steps"] == tree["acted"][0] >= config.learn.steps:
                return done
        training = Training(config, folder, tree, signals, stack)
        if resume:
            run.write_config(folder, config)
        else:
            run.create(folder, config)
            stack.enter_context(run.lock(folder))
        training.record(stack.enter_context(Logger(folder, console, config.learn.steps, SHOW)), tree)
        training.run()
        return training.finish()


class Training:
    """A run in progress. At the top of `run`'s loop its state is whole: saved there, it goes on exactly.

    Args:
        tree: the checkpoint that it will go on from, if any.
        stack: closes what is opened here. No file is touched yet.
    """

    def __init__(self, config: Config, folder: Path, tree: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        self.config, self.folder, self.signals = config, folder, signals
        self.began = self.saved = time.monotonic()
        # wall: seconds of earlier sessions. begun: real steps when learning began. lost: worlds that failed.
        # faults: that the worlds of earlier sessions have survived
        self.count = {"wall": 0.0, "begun": None, "warmup": 0, "updates": 0, "logged": 0, "evaluated": 0}
        self.count |= {"lost": 0, "faults": 0, "acted": tree["acted"][0] if tree else 0}  # acted: as of the last line
        self.count |= tree["count"] if tree else {}
        torch.manual_seed(config.seed)
        self.rng = {name: np.random.default_rng((config.seed, i)) for i, name in enumerate(("act", "sample"))}
        seed = config.seed
        if self.count["lost"]:  # the next world plays other episodes, not those of the beginning again
            seed = int(np.random.SeedSequence((seed, self.count["lost"])).generate_state(1)[0])
        env, stays = config.env, config.replay.keep == "device"
        if stays:
            if not makes_tensors(env.id):
                raise UserError(
                    f"{env.id} makes no tensors: keep the replay on disk (replay.keep = disk), or train on an "
                    f"environment that does, like longdream/FastMemoryMaze-9x9-v0"
                )
            env = replace(env, kwargs={"device": resolve_device(config.device)} | env.kwargs)
        self.world = make_world(World, env, env.copies, seed, signals)
        stack.callback(self.world.close)
        self.agent = Agent(config, self.world.spec)
        spec, copies, capacity = self.world.spec, self.world.num_envs, config.replay.capacity
        if stays:
            self.replay = DeviceReplay(self.agent.device, spec, copies, capacity, config.replay.around)
            self.collector = DeviceCollector(self.world, self.agent, self.replay, self.rng["act"], seed)
        else:
            self.replay = Replay(folder / "replay", spec, copies, capacity, around=config.replay.around)
            self.collector = Collector(self.world, self.agent, self.replay, self.rng["act"])
        stack.callback(self.replay.close)
        ranges.check_clip(config, self.replay.longest_clip)
        self.world_is_lost = False
        self.window = Window()
        self.seconds: dict[str, float] = defaultdict(float)

    def record(self, logger: Logger, tree: dict[str, Any] | None) -> None:
        """Open the record and, with a checkpoint, go back to the moment it was saved."""
        self.logger = logger
        warnings = logger.restore(tree and tree["logger"])
        logger.note(f"training in {self.folder}" + (f", from step {tree['acted'][0]:,} on" if tree else ""))
        if tree:
            warnings += saving.restore(self, tree)
        for warning in warnings:
            logger.note(f"warning: {warning}")

    def run(self) -> None:
        """Turn after turn to the last step, and a checkpoint."""
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
            self.signals.check()  # the signal that ends this run may have reached the environment's processes first
            raise
        self.save()

    def turn(self) -> None:
        """The smallest piece of work: a step of every copy and the updates that are due, or one update of warm-up."""
        learn, replay, count = self.config.learn, self.config.replay, self.count
        if count["begun"] is None:
            self.act(random=True)
            if self.collector.env_steps >= learn.prefill and self.replay.can_sample(replay.length):
                count["begun"] = self.collector.env_steps
        elif count["warmup"] < (whole := learn.warmup + learn.warmup_model):
            self.learn("encoder" if count["warmup"] < learn.warmup else "model")
            count["warmup"] += 1
            if count["warmup"] % WARMUP_LOG == 0 or count["warmup"] in (learn.warmup, whole):
                self.log()
        elif not self.replay.can_sample(replay.length):  # resumed without it: these steps bring no updates
            before = self.collector.env_steps
            self.act(random=False)
            count["begun"] += self.collector.env_steps - before
        else:
            self.act(random=False)
            due = int((self.collector.env_steps - count["begun"]) * learn.ratio / (replay.batch * replay.length))
            while count["updates"] < due:
                self.learn()
                count["updates"] += 1

    def act(self, random: bool) -> None:
        with self.timed("act"), self.in_world():
            ended = self.collector.step(random)
        for episode in ended:
            self.logger.write(self.collector.env_steps, episode)
            self.window.add({key.replace("episode/", "train/"): value for key, value in episode.items()})

    def learn(self, upto: Upto = "controller") -> None:
        replay = self.config.replay
        with self.timed("replay"):
            rows = self.replay.sample(self.rng["sample"], replay.batch, replay.length, replay.starts, replay.surprise)
        self.window.add(self.agent.update(rows, upto, self.pace()), self.agent.taken)

    def pace(self) -> float:
        """Share of the learning rates at this step: from 1 when learning begins to `learn.decay` at the last step."""
        learn, begun = self.config.learn, self.count["begun"]
        done = (self.collector.env_steps - begun) / max(1, learn.steps - begun)
        return 1 - (1 - learn.decay) * min(1.0, done)

    def save(self) -> None:
        """Write a checkpoint. What a lost world did last is kept; is_first rows of new episodes will follow it."""
        with self.timed("save"):
            checkpoint.save(self.folder / "checkpoints", self.collector.env_steps, saving.tree(self))
            self.replay.commit_eviction()
        self.saved = time.monotonic()

    # -- what is told -------------------------------------------------------------------------------------------------

    def log(self) -> None:
        """A line of metrics: means over the updates and episodes since the last one."""
        agent, step, count = self.agent, self.collector.env_steps, self.count
        agent.settle()
        counts = {"updates": agent.updates, "skipped": agent.skipped, "lost_worlds": count["lost"]}
        counts["faults"] = self.faults()
        counts |= {"episodes": self.collector.episodes, "rows": len(self.replay)}
        told = {f"count/{key}": value for key, value in counts.items()}
        told |= {f"time/{key}": value for key, value in (self.seconds | agent.seconds).items()}
        if step > count["acted"]:  # of episodes the end is told; where these are long, it is a long time to wait
            told["train/reward"] = self.collector.take_earned() / (step - count["acted"])
            count["acted"] = step
        self.logger.write(step, self.window.means() | told | {"time/wall": self.wall()})
        self.window, self.count["logged"] = Window(), step // self.config.evaluate.log_every

    def evaluate(self) -> None:
        """Play some episodes in a world of their own: this changes nothing in training."""
        env, clock = self.config.evaluation_env, self.config.evaluate
        with self.timed("evaluate"):
            found = play(self.agent, env, clock.episodes, self.config.seed, "agent", clock, self.signals)
        self.log_returns("evaluate", found.to_json())
        self.count["evaluated"] = self.collector.env_steps // clock.every

    def finish(self) -> dict[str, Any]:
        """The last evaluation, written to summary.json."""
        config, clock = self.config, self.config.evaluate
        self.logger.note(f"evaluating over {clock.final_episodes} episodes")
        found = judge(self.agent, config.evaluation_env, clock.final_episodes, config.seed, clock, self.signals)
        self.log_returns("final", found)
        found |= {"env_steps": self.collector.env_steps, "dream_steps": self.agent.dream_steps}
        found |= {"updates": self.agent.updates, "wall_s": round(self.wall(), 1)}
        if isinstance(self.agent.controller, Exporting):
            self.agent.controller.export(self.folder)
        run.write(self.folder / "summary.json", run.to_json(found, indent=1) + "\n")
        return found

    def log_returns(self, name: str, returns: dict[str, Any]) -> None:
        told = ("return_mean", "return_std", "length_mean", "random_mean", "without_memory_mean")
        self.logger.write(self.collector.env_steps, {f"{name}/{key}": returns[key] for key in told if key in returns})

    def faults(self) -> int:
        """How often an environment has failed and was started again, in earlier sessions too."""
        return self.count["faults"] + self.world.faults

    def wall(self) -> float:
        """Seconds of this run, those of earlier sessions included."""
        return self.count["wall"] + time.monotonic() - self.began

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    @contextmanager
    def in_world(self) -> Iterator[None]:
        """Around calls of the training world: notes when it failed."""
        try:
            yield
        except EnvError:
            self.world_is_lost = True
            self.count["lost"] += 1
            raise
