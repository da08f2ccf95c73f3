"""Measurements that the docs rest on: `longdream bench NAME` makes one and prints what it found."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from agent import options
from agent.agent import Agent, Carry
from agent.config import Config
from agent.logger import Logger
from agent.loop import Training
from agent.signals import Signals
from envs.contract import UserError
from envs.make import World

Device = Literal["auto", "cpu", "cuda"]
MB = 1 << 20


# -- act --------------------------------------------------------------------------------------------------------------


def act(preset: str = "quickstart", steps: int = 20_000, device: Device | None = None) -> dict[str, Any]:
    """Time and memory per acted step of one endless episode: does either grow with the episode's age?

    An untrained agent of a preset acts in one copy of its environment, on real observations, but is told of no
    episode's end: to its memory, all steps are one episode. Timed is the agent alone, not the environment.

    Args:
        preset: preset or .yaml file
        steps: acted steps, after 200 of warm-up
        device: where to compute (default: as in the preset)

    Returns:
        ms_per_step_start, ms_per_step_end: medians over the first and the last 1,000 steps, or a quarter of all if that
        is less. state_bytes_start, state_bytes_end: all that is carried from step to step. rss_growth_mb: of resident
        memory, from the end of the first of these windows to the end.
    """
    if steps < 4:
        raise UserError(f"--steps {steps}: must be at least 4")
    config = _config(preset, device)
    with closing(World(config.env.id, 1, config.seed, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
        window, seconds = min(1_000, steps // 4), np.zeros(steps)
        row, carry = world.reset(), agent.initial(1)
        size = resident = 0
        for t in range(-200, steps):
            began = time.perf_counter()
            carry, _ = agent.observe(carry, row, measure=False)
            action = agent.act(carry, greedy=False)  # on the CPU: a GPU has finished by then
            carry = agent.acted(carry, action)
            seconds[max(t, 0)] = time.perf_counter() - began
            if t == 0:
                size = carry_bytes(carry)
            if t == window - 1:
                resident = resident_bytes()
            row = dataclasses.replace(world.step(action), is_first=np.zeros(1, np.bool_))
    found = {
        "preset": preset,
        "device": str(agent.device),
        "steps": steps,
        "ms_per_step_start": round(1e3 * float(np.median(seconds[:window])), 4),
        "ms_per_step_end": round(1e3 * float(np.median(seconds[-window:])), 4),
        "state_bytes_start": size,
        "state_bytes_end": carry_bytes(carry),
        "rss_growth_mb": round((resident_bytes() - resident) / MB, 2),
    }
    print(f"preset {preset}, one stream on {agent.device}, {steps:,} steps of one episode")
    for name, unit in (("ms_per_step", "ms per step"), ("state_bytes", "bytes of state")):
        print(f"  {unit:15} {found[f'{name}_start']:>9} at the start {found[f'{name}_end']:>9} at the end")
    print(f"  resident memory grew by {found['rss_growth_mb']} MB")
    return found


def carry_bytes(carry: Carry) -> int:
    """Bytes of all tensors that acting carries from one row to the next."""
    sizes = [carry.feat.nbytes, carry.action.nbytes]
    carry.state.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)


def resident_bytes() -> int:
    """Resident memory of this process (its peak, where the system tells no more)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- loop -------------------------------------------------------------------------------------------------------------


def loop(
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
    config = _config(preset, device)
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
        "wall_s": round(wall, 2),
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


# -- objectives -------------------------------------------------------------------------------------------------------


def objectives(
    preset: str = "quickstart",
    kinds: tuple[str, ...] = ("flow/two", "flow/one", "mask/two", "teacher/one"),
    seeds: tuple[int, ...] = (1, 2, 3),
    steps: int | None = None,
    threshold: float = 0.9,
    parallel: int = 1,
    out: Path = Path("runs/objectives"),
    device: Device | None = None,
) -> dict[str, Any]:
    """The objectives of M compared: a preset trained with each of them, over several seeds.

    Every training is a run of its own below OUT, by `longdream train`. One that has finished is not run again and one
    that was cut short goes on, so the same command continues a comparison that was stopped.

    Args:
        preset: preset or .yaml file
        kinds: forcing.objective/forcing.stream of each; teacher forcing noises nothing, there the stream means nothing
        seeds: of the runs of each kind
        steps: real steps of each run (default: the preset's)
        threshold: mean greedy return that is asked for
        parallel: runs at a time
        out: folder of the runs and of what they print
        device: where to compute (default: as in the preset)

    Returns:
        rows: of each run objective, stream, seed, return_mean, env_steps, updates, wall_s and, from the evaluations on
        the clock, steps_to_threshold and seconds_to_threshold (null where it was never reached).

    Raises:
        UserError: a training failed; the message says where to find what it printed.
    """
    if parallel < 1 or not seeds or not all("/" in kind for kind in kinds):
        raise UserError(f"--parallel {parallel}, --seeds {seeds}, --kinds {kinds}: must be like 1, 1,2,3 and flow/two")
    _config(preset, device)  # an unknown preset is an error here, not in each of the runs
    preset = str(Path(preset).resolve()) if Path(preset).suffix else preset
    flags = [*(("--device", device) if device else ()), *(("--steps", str(steps)) if steps else ())]
    out.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, int]) -> dict[str, Any]:
        row = _trained(out, preset, flags, threshold, *job)
        print("{objective} {stream}, seed {seed}: {return_mean:.3f} in {wall_s:.0f} s".format(**row), file=sys.stderr)
        return row

    with ThreadPoolExecutor(parallel) as pool:
        rows = list(pool.map(one, [(kind, seed) for kind in kinds for seed in seeds]))
    print(markdown(rows, threshold))
    return {"preset": preset, "threshold": threshold, "rows": rows}


def _trained(out: Path, preset: str, flags: list[str], threshold: float, kind: str, seed: int) -> dict[str, Any]:
    """The row of one run, trained now unless it has been."""
    objective, _, stream = kind.rpartition("/")
    name = f"{objective}-{stream}-s{seed}"
    folder, log = out / "runs" / name, out / f"{name}.log"
    if not (folder / "summary.json").exists():
        what = ["--resume", f"runs/{name}"]
        if not (folder / "config.yaml").exists():
            settings = {"name": name, "seed": seed, "forcing.objective": objective, "forcing.stream": stream}
            what = [preset, *flags, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
        root = str(Path(__file__).resolve().parent.parent)  # importable from `out` too, where it is not installed
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        with open(log, "a") as file:
            command = [sys.executable, "-m", "agent.cli", "train", *what]
            code = subprocess.run(command, cwd=out, env=environment, stdout=file, stderr=file).returncode
        if code != 0:
            last = log.read_text().strip().rpartition("\n")[2]
            raise UserError(f"training {name} ended with code {code} ({last}): see {log}, mend it and run this again")
    summary = json.loads((folder / "summary.json").read_text())
    steps, seconds = reached_at(folder / "metrics.jsonl", threshold)
    row = {"objective": objective, "stream": stream, "seed": seed}
    row |= {key: summary[key] for key in ("return_mean", "env_steps", "updates", "wall_s")}
    return row | {"steps_to_threshold": steps, "seconds_to_threshold": seconds}


def reached_at(record: Path, threshold: float) -> tuple[int, float] | tuple[None, None]:
    """Real step and seconds of wall-clock at a run's first evaluation on the clock with that mean return, or more."""
    wall = 0.0
    for line in record.read_text().splitlines():
        values = json.loads(line)
        wall = values.get("time/wall") or wall
        value = values.get("evaluate/return_mean")
        if value is not None and value >= threshold:
            return values["step"], round(wall, 1)
    return None, None


def markdown(rows: Sequence[dict[str, Any]], threshold: float) -> str:
    """The comparison as two tables: a line per objective, over its seeds, and a line per run."""
    to = [f"real steps to {threshold:g}", f"seconds to {threshold:g}"]
    over_seeds = [["objective", "stream", "return, mean", "lowest", "runs that got there", *to, "seconds in all"]]
    for kind in dict.fromkeys((row["objective"], row["stream"]) for row in rows):
        group = [row for row in rows if (row["objective"], row["stream"]) == kind]
        hits = [row for row in group if row["steps_to_threshold"] is not None]
        returns = [row["return_mean"] for row in group]
        medians = [
            f"{statistics.median(row[key] for row in some):,.0f}" if some else "–"
            for key, some in (("steps_to_threshold", hits), ("seconds_to_threshold", hits), ("wall_s", group))
        ]
        got = f"{len(hits)} of {len(group)}"
        over_seeds.append([*kind, f"{statistics.mean(returns):.3f}", f"{min(returns):.3f}", got, *medians])
    runs = [["objective", "stream", "seed", "return", *to, "real steps", "updates", "seconds in all"]]
    for row in rows:
        keys = ("steps_to_threshold", "seconds_to_threshold", "env_steps", "updates", "wall_s")
        numbers = ["–" if row[key] is None else f"{row[key]:,.0f}" for key in keys]
        runs.append([row["objective"], row["stream"], str(row["seed"]), f"{row['return_mean']:.3f}", *numbers])
    return "\n\n".join([_table(over_seeds), "Steps and seconds are medians over runs. Each of them:", _table(runs)])


def _table(cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


# -- registry ---------------------------------------------------------------------------------------------------------

BENCHES: dict[str, Callable[..., dict[str, Any]]] = {"act": act, "loop": loop, "objectives": objectives}
"""Name and function of each measurement: prints what it found, and returns it as JSON values."""


def find(name: str) -> Callable[..., dict[str, Any]]:
    """The measurement of that name.

    Raises:
        UserError: there is none.
    """
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}" + options.suggest(name, BENCHES, f"there are {', '.join(BENCHES)}"))
    return BENCHES[name]


def _config(preset: str, device: Device | None) -> Config:
    config = options.load(preset)
    config = dataclasses.replace(config, device=device or config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    return config
