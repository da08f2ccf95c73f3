"""`longdream bench loop`: the speed of training, and the time of each of its parts."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from longdream.agent.bench.common import MB, config_of, now, resident_bytes
from longdream.agent.config import options
from longdream.agent.config.checks import check
from longdream.agent.config.schema import Config, Device
from longdream.agent.core.device import resolve_device
from longdream.agent.evaluation.policy import make_world
from longdream.agent.run.logger import Logger
from longdream.agent.run.signals import Signals
from longdream.agent.train.device_collector import making_tensors
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import UserError
from longdream.envs.make import World, makes_tensors

Online = TypeVar("Online", bound=OnlineTrainer)
ALONE_S = 5.0
"""Seconds in which an environment is measured alone, at most."""
BETWEEN = 4
"""Steps of it between two looks at the clock."""


@contextmanager
def opened(config: Config, trainer: type[Online] = OnlineTrainer) -> Iterator[Online]:
    """A trainer at its beginning, in a temporary folder that is gone afterwards. It takes its turns by `turn`."""
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = trainer(config, folder, None, signals, stack)
        yield made.open(stack.enter_context(Logger(folder, console=False)), None)


def turn(trainer: OnlineTrainer) -> None:
    """A turn and the line of metrics that is due, as in `Trainer.run`, without evaluations and checkpoints."""
    trainer.turn()
    trainer.signals.check()
    if trainer.passed(trainer.config.evaluate.log_every, "logged"):
        trainer.log()


def measure(
    preset: str = "quickstart",
    envs: tuple[str, ...] = (),
    workers: tuple[Literal["sync", "async", "beside"], ...] = ("sync", "beside"),
    seconds: float = 60.0,
    steps: int | None = None,
    train_ratio: float | None = None,
    device: Device | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Steps and updates per second of training, by environment and way of collecting, and where the time goes.

    Runs the training loop of a preset in a temporary folder, without evaluations and checkpoints. It measures once
    learning has begun.

    examples
      longdream bench loop --preset tiny --seconds 10
      longdream bench loop --preset memory-maze-9x9 --envs longdream/FastMemoryMaze-9x9-v0 --workers sync --json
      longdream bench loop --preset memory-maze-9x9 --envs longdream/MemoryMaze-9x9-v0,third:Crafter-v0 \\
          --workers async,beside --settings '{"env.copies": 16, "replay.keep": "disk"}' --json
    (third.py is in docs/environments.md; Crafter is a package of its own.)

    Args:
        preset: preset or .yaml file
        envs: environments in place of the preset's, ID or module:ID
        workers: ways of collecting, as env.workers
        seconds: duration of each measurement
        steps: measure over this many real steps instead
        train_ratio: replayed rows per real step (default: learn.train_ratio of the preset); with a small ratio, a few
            minutes cover many steps
        device: where to compute (default: as in the preset)
        settings: settings to change, '{"env.copies": 16}'

    Returns:
        rows, one per environment and way of collecting. env, workers, keep (of the replay), copies. env_steps_per_s and
        updates_per_s; env_alone_per_s: steps per second of the same copies under random actions, with nothing beside.
        busy: on CUDA the share of time in which the GPU works (null where it cannot be read), on the CPU the share of
        the learner's time that is spent in updates. stale: updates made since those whose weights chose an action, when
        its row comes to the learner; 0 where the agent itself acts. waited: share of the learner's time that is spent
        waiting for rows or, where it acts itself, in acting and in the environment. share: of the learner's time, by
        part: collect (environment and acting, or waiting for rows), replay (sampling), encoder (V), model (M),
        controller (C and its dreams), other. replay_share_of_updates: share of sampling in the time of an update.
        rss_mb: resident memory at some steps, [real step, MB]. rss_growth_mb: its rise by linear regression, without
        the first fifth, in which the mapped pages of the replay accumulate. env_steps, updates, wall_s.
        preset, device.
    """
    if seconds <= 0 or (steps is not None and steps < 1) or not workers:
        raise UserError(f"--seconds {seconds:g}, --steps {steps}, --workers: must be more than 0")
    base = config_of(preset, device)
    given = (settings or {}) | {"learn.warmup": 0, "learn.warmup_model": 0}
    given |= {} if train_ratio is None else {"learn.train_ratio": train_ratio}
    configs = [_with(base, env, how, given) for env in envs or (base.env.id,) for how in workers]
    for config in configs:
        check(config)
    rows = [_measured(config, seconds, steps) for config in configs]
    result = {"preset": preset, "device": resolve_device(configs[0].device), "rows": rows}
    columns = ("env_steps_per_s", "updates_per_s", "env_alone_per_s", "busy", "stale", "waited")
    copies = configs[0].env.copies
    ratio = configs[0].learn.train_ratio
    print(f"preset {preset} on {result['device']}, {copies} copies, learning from {ratio:g} rows per real step")
    print(f"{'':44}" + "".join(f"{name:>16}" for name in columns))
    for row in rows:
        values = ["-" if row[name] is None else f"{row[name]:,.2f}" for name in columns]
        print(f"{row['env']} {row['workers']}".ljust(44) + "".join(f"{value:>16}" for value in values))
    for row in rows:
        print(f"{row['env']} {row['workers']}: {row['env_steps']:,} real steps, {row['updates']:,} updates")
        for part, value in row["share"].items():
            each = f" {1e3 * value * row['wall_s'] / row['updates']:9.2f} ms per update" if row["updates"] else ""
            print(f"  {part:10} {value:6.1%}{each}")
        print(f"  sampling replay is {row['replay_share_of_updates']:.2%} of an update")
        sizes = [size for _, size in row["rss_mb"]]
        print(f"  resident memory {min(sizes):.0f} to {max(sizes):.0f} MB, grew by {row['rss_growth_mb']} MB")
    return result


def _with(config: Config, env: str, workers: str, settings: dict[str, Any]) -> Config:
    """The configuration with these settings, another environment and way of collecting, and a replay that allows it."""
    settings = settings | {"env.id": env, "env.workers": workers}
    if workers == "beside" or not makes_tensors(env):
        settings["replay.keep"] = "disk"
    return options.changed(config, settings)


def _measured(config: Config, seconds: float, steps: int | None) -> dict[str, Any]:
    """A row of `measure`."""
    alone = speed_alone(config, min(seconds, ALONE_S))
    name = f"{config.env.id} {config.env.workers}"
    with opened(config) as trainer:
        # the first three updates allocate memory and are not measured
        while trainer.count["learning_began"] is None or (config.learn.train_ratio and trainer.agent.updates < 3):
            turn(trainer)
        trainer.log()
        lines = len(_lines(trainer))
        spent = _spent(trainer)
        updates = trainer.agent.updates
        first = trainer.collector.env_steps
        began = time.perf_counter()
        percent = 0
        marks = [(first, resident_bytes() / MB)]
        busy: list[float] = []
        while percent < 100:
            turn(trainer)
            step = trainer.collector.env_steps
            wall = time.perf_counter() - began
            before = percent
            percent = int(100 * ((step - first) / steps if steps else wall / seconds))
            if percent > before:
                marks.append((step, resident_bytes() / MB))
                busy += trainer.rates.gpu().values()
            if percent // 10 > before // 10:
                print(f"{name}, step {step:,}: {marks[-1][1]:.0f} MB resident", file=sys.stderr)
        spent = {part: value - spent[part] for part, value in _spent(trainer).items()}
        updates = trainer.agent.updates - updates
        env_steps = trainer.collector.env_steps - first
        trainer.log()
        collected = _lines(trainer)[lines:]
    learning = sum(spent[part] for part in ("replay", "encoder", "model", "controller"))
    spent["other"] = max(wall - sum(spent.values()), 0.0)
    total = sum(spent.values())
    if trainer.agent.device.type == "cpu":
        busy = [learning / total]
    stale = [line["collect/stale"] for line in collected if "collect/stale" in line]
    waited = [line["collect/waited"] for line in collected if "collect/waited" in line]
    return {
        "env": config.env.id,
        "workers": config.env.workers,
        "keep": config.replay.keep,
        "copies": config.env.copies,
        "env_steps_per_s": round(env_steps / wall, 2),
        "updates_per_s": round(updates / wall, 3),
        "env_alone_per_s": round(alone, 2),
        "busy": float(np.mean(busy)) if busy else None,
        "stale": float(np.mean(stale)) if stale else 0.0,
        "waited": float(np.mean(waited)) if waited else spent["collect"] / total,
        "share": {part: value / total for part, value in spent.items()},
        "replay_share_of_updates": spent["replay"] / learning if learning else 0.0,
        "env_steps": env_steps,
        "updates": updates,
        "wall_s": round(wall, 4),
        "rss_mb": [[step, round(size, 1)] for step, size in marks[:: max(len(marks) // 10, 1)]],
        "rss_growth_mb": round(growth(marks[len(marks) // 5 :]), 1),
    }


def speed_alone(config: Config, seconds: float) -> float:
    """Steps per second of all copies together under random actions, as they run in training, with nothing beside."""
    on_device = config.replay.keep == "device"
    env = making_tensors(config) if on_device else config.env
    device = torch.device(resolve_device(config.device))
    rng = np.random.default_rng(config.seed)
    with closing(make_world(World, env, env.copies, config.seed)) as world:
        vector: Any = world.vector
        if on_device:
            vector.reset_tensors(list(range(env.copies)))
        else:
            world.reset()
        actions = world.spec.action
        steps = 0
        began = now(device)
        while (wall := now(device) - began) < seconds:
            for _ in range(BETWEEN):
                if on_device:
                    vector.step_tensors(torch.randint(actions.parts[0], (env.copies,), device=device))
                else:
                    world.step(world.random_action(rng))
            steps += BETWEEN * env.copies
    return steps / wall


def _lines(trainer: OnlineTrainer) -> list[dict[str, Any]]:
    """The lines of metrics so far."""
    return [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]


def growth(marks: Sequence[tuple[int, float]]) -> float:
    """The rise from first to last of the regression line through the marks (step, MB).

    Resident memory fluctuates, as mapped pages of the replay are used and released: the difference of two marks would
    be random.
    """
    steps, sizes = np.array(marks, np.float64).T
    centered = steps - steps.mean()
    return float(centered @ sizes / max(centered @ centered, 1e-9) * (steps[-1] - steps[0]))


def _spent(trainer: OnlineTrainer) -> dict[str, float]:
    return {"collect": trainer.seconds["act"], "replay": trainer.seconds["replay"], **trainer.agent.seconds}
