"""`longdream bench loop`: where the time of training goes."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from longdream.agent.bench.common import MB, Device, config_of, resident_bytes
from longdream.agent.config import options
from longdream.agent.run.logger import Logger
from longdream.agent.run.signals import Signals
from longdream.agent.train.online import Training
from longdream.envs.contract import UserError


def measure(
    preset: str = "quickstart",
    seconds: float = 60.0,
    steps: int | None = None,
    ratio: float | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """Where the time of training goes, how fast it is, whether memory stays flat.

    Runs the training loop of a preset in a temporary folder, turn by turn, without evaluations and checkpoints, and
    measures once learning has begun.

    Args:
        preset: preset or .yaml file
        seconds: how long to measure
        steps: measure over so many real steps instead
        ratio: of learning to acting (default: learn.ratio of the preset); a small one takes many steps in minutes
        device: where to compute (default: as in the preset)

    Returns:
        share: of wall-clock time, by part: collect (environment and acting), replay (sampling), encoder (V), model (M),
        controller (C and its dreams), other. replay_share_of_updates: sampling, of the time of an update with it.
        rss_mb: resident memory at some marks, [real step, MB]. rss_growth_mb: rise of a line through them, without the
        first fifth, in which replay pages fill what may stay mapped.
        env_steps_per_s, updates_per_s.
    """
    if seconds <= 0 or (steps is not None and steps < 1):
        raise UserError(f"--seconds {seconds:g}, --steps {steps}: must be more than 0")
    config = config_of(preset, device)
    ratio = config.learn.ratio if ratio is None else ratio
    config = dataclasses.replace(config, learn=dataclasses.replace(config.learn, warmup=0, ratio=ratio))
    options.check(config)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        training = Training(config, folder, None, signals, stack)
        training.record(stack.enter_context(Logger(folder, console=False)), None)
        while training.count["begun"] is None or (ratio and training.agent.updates < 3):  # the first updates allocate
            training.turn()
            signals.check()
        spent, updates, first = _spent(training), training.agent.updates, training.collector.env_steps
        began, percent, marks = time.perf_counter(), 0, [(first, resident_bytes() / MB)]
        while percent < 100:
            training.turn()
            signals.check()
            step = training.collector.env_steps
            if step // config.evaluate.log_every > training.count["logged"]:
                training.log()
            wall = time.perf_counter() - began
            before, percent = percent, int(100 * ((step - first) / steps if steps else wall / seconds))
            if percent > before:
                marks.append((step, resident_bytes() / MB))
            if percent // 10 > before // 10:
                print(f"step {step:,}: {marks[-1][1]:.0f} MB resident", file=sys.stderr)
        spent = {part: value - spent[part] for part, value in _spent(training).items()}
        updates, walked = training.agent.updates - updates, training.collector.env_steps - first
    learning = sum(spent[part] for part in ("replay", "encoder", "model", "controller"))
    spent["other"] = max(wall - sum(spent.values()), 0.0)
    total = sum(spent.values())
    found = {
        "preset": preset,
        "device": str(training.agent.device),
        "share": {part: value / total for part, value in spent.items()},
        "replay_share_of_updates": spent["replay"] / learning if learning else 0.0,
        "env_steps": walked,
        "updates": updates,
        "wall_s": round(wall, 4),
        "env_steps_per_s": round(walked / wall, 2),
        "updates_per_s": round(updates / wall, 3),
        "rss_mb": [[step, round(size, 1)] for step, size in marks[:: max(len(marks) // 10, 1)]],
        "rss_growth_mb": round(growth(marks[len(marks) // 5 :]), 1),
    }
    print(f"preset {preset} on {found['device']}: {walked:,} real steps, {updates:,} updates in {wall:.0f} s")
    for part, value in found["share"].items():
        print(f"  {part:10} {value:6.1%}" + (f" {1e3 * spent[part] / updates:9.2f} ms per update" if updates else ""))
    print(f"  {found['env_steps_per_s']:,} real steps and {found['updates_per_s']} updates per second")
    print(f"  sampling replay is {found['replay_share_of_updates']:.2%} of an update")
    sizes = [size for _, size in marks]
    print(f"  resident memory {min(sizes):.0f} to {max(sizes):.0f} MB, grew by {found['rss_growth_mb']} MB")
    return found


def growth(marks: Sequence[tuple[int, float]]) -> float:
    """How much a straight line through the marks (step, MB) rises from first to last.

    Resident memory goes up and down as mapped replay pages are used and handed back: two marks alone would tell chance.
    """
    steps, sizes = np.array(marks, np.float64).T
    away = steps - steps.mean()
    return float(away @ sizes / max(away @ away, 1e-9) * (steps[-1] - steps[0]))


def _spent(training: Training) -> dict[str, float]:
    return {"collect": training.seconds["act"], "replay": training.seconds["replay"], **training.agent.seconds}
