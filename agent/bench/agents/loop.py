"""`longdream bench loop`: the time of each part of training."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from longdream.agent.bench.common import MB, config_of, resident_bytes
from longdream.agent.config.checks import check
from longdream.agent.config.schema import Config, Device
from longdream.agent.run.logger import Logger
from longdream.agent.run.signals import Signals
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import UserError

Online = TypeVar("Online", bound=OnlineTrainer)


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
    seconds: float = 60.0,
    steps: int | None = None,
    train_ratio: float | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """The time of each part of training, its speed, and the growth of memory.

    Runs the training loop of a preset in a temporary folder, without evaluations and checkpoints. It measures once
    learning has begun.

    Args:
        preset: preset or .yaml file
        seconds: duration of the measurement
        steps: measure over this many real steps instead
        train_ratio: replayed rows per real step (default: learn.train_ratio of the preset); with a small ratio, a few
            minutes cover many steps
        device: where to compute (default: as in the preset)

    Returns:
        share: of wall-clock time, by part: collect (environment and acting), replay (sampling), encoder (V), model (M),
        controller (C and its dreams), other. replay_share_of_updates: share of sampling in the time of an update.
        rss_mb: resident memory at some steps, [real step, MB]. rss_growth_mb: its rise by linear regression, without
        the first fifth, in which the mapped pages of the replay accumulate. env_steps_per_s, updates_per_s.
    """
    if seconds <= 0 or (steps is not None and steps < 1):
        raise UserError(f"--seconds {seconds:g}, --steps {steps}: must be more than 0")
    config = config_of(preset, device)
    train_ratio = config.learn.train_ratio if train_ratio is None else train_ratio
    config = dataclasses.replace(config, learn=dataclasses.replace(config.learn, warmup=0, train_ratio=train_ratio))
    check(config)
    with opened(config) as trainer:
        # the first three updates allocate memory and are not measured
        while trainer.count["learning_began"] is None or (train_ratio and trainer.agent.updates < 3):
            turn(trainer)
        spent = _spent(trainer)
        updates = trainer.agent.updates
        first = trainer.collector.env_steps
        began = time.perf_counter()
        percent = 0
        marks = [(first, resident_bytes() / MB)]
        while percent < 100:
            turn(trainer)
            step = trainer.collector.env_steps
            wall = time.perf_counter() - began
            before = percent
            percent = int(100 * ((step - first) / steps if steps else wall / seconds))
            if percent > before:
                marks.append((step, resident_bytes() / MB))
            if percent // 10 > before // 10:
                print(f"step {step:,}: {marks[-1][1]:.0f} MB resident", file=sys.stderr)
        spent = {part: value - spent[part] for part, value in _spent(trainer).items()}
        updates = trainer.agent.updates - updates
        env_steps = trainer.collector.env_steps - first
    learning = sum(spent[part] for part in ("replay", "encoder", "model", "controller"))
    spent["other"] = max(wall - sum(spent.values()), 0.0)
    total = sum(spent.values())
    result = {
        "preset": preset,
        "device": str(trainer.agent.device),
        "share": {part: value / total for part, value in spent.items()},
        "replay_share_of_updates": spent["replay"] / learning if learning else 0.0,
        "env_steps": env_steps,
        "updates": updates,
        "wall_s": round(wall, 4),
        "env_steps_per_s": round(env_steps / wall, 2),
        "updates_per_s": round(updates / wall, 3),
        "rss_mb": [[step, round(size, 1)] for step, size in marks[:: max(len(marks) // 10, 1)]],
        "rss_growth_mb": round(growth(marks[len(marks) // 5 :]), 1),
    }
    print(f"preset {preset} on {result['device']}: {env_steps:,} real steps, {updates:,} updates in {wall:.0f} s")
    for part, value in result["share"].items():
        print(f"  {part:10} {value:6.1%}" + (f" {1e3 * spent[part] / updates:9.2f} ms per update" if updates else ""))
    print(f"  {result['env_steps_per_s']:,} real steps and {result['updates_per_s']} updates per second")
    print(f"  sampling replay is {result['replay_share_of_updates']:.2%} of an update")
    sizes = [size for _, size in marks]
    print(f"  resident memory {min(sizes):.0f} to {max(sizes):.0f} MB, grew by {result['rss_growth_mb']} MB")
    return result


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
