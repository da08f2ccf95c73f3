"""SIGKILL at random moments of a small training, which is resumed until it is done: nothing is to be lost."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longdream.agent.bench.faults.processes import BOUND_S, begin, end, kill, run
from longdream.agent.run import checkpoint
from longdream.envs.contract import UserError

TRAIN = ("train", "tiny", "--name", "run", "--evaluate.save_seconds", "0.1")


@dataclass
class Lost:
    """What is missing. rows: lines of metrics that differ from those of a run that was never killed, and rows of the
    replay. runs: that could not be resumed. checkpoints: that were there and cannot be read."""

    rows: int = 0
    runs: int = 0
    checkpoints: int = 0
    why: list[str] = field(default_factory=list)


def kill_and_resume(
    count: int, seed: int, workers: int, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], Lost]:
    """Kill trainings `count` times. Returns how many kills there were, how many the runs survived, how many of them
    came after training had begun, not while the program was starting, and how many runs were finished; and what is
    lost."""
    shutil.rmtree(folder, ignore_errors=True)
    whole = folder / "whole"
    whole.mkdir(parents=True)
    began = time.monotonic()
    ended = run(TRAIN, whole)
    seconds = time.monotonic() - began
    if ended.code != 0:
        raise UserError(f"the training to be killed failed ({ended.message or ended.err[-300:]}): nothing was killed")
    lost = Lost()
    tally = {"tried": 0, "survived": 0, "training": 0, "finished": 0}
    lock = threading.Lock()

    def work(number: int, kills: int) -> None:
        """Kill one training after the other, `kills` times in all."""
        rng = random.Random(f"{seed} {number}")
        place = folder / f"worker-{number}"
        while kills:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            kills -= _one_run(place, kills, rng, seconds, whole, lost, tally, lock)
            with lock:
                say(f"{tally['tried']} of {count} kills, {tally['finished']} runs finished; lost so far: {lost}")

    shares = [count // workers + (w < count % workers) for w in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for job in [pool.submit(work, w, share) for w, share in enumerate(shares) if share]:
            job.result()
    return tally, lost


def _one_run(
    place: Path,
    kills: int,
    rng: random.Random,
    seconds: float,
    whole: Path,
    lost: Lost,
    tally: dict[str, int],
    lock: threading.Lock,
) -> int:
    """Train a run to its end, killing it at most `kills` times. Returns how often it was killed."""
    folder = place / "run"
    killed = 0
    while True:
        exists = (place / "runs" / "run" / "config.yaml").exists()
        if not exists:  # killed before there was a run
            shutil.rmtree(place / "runs", ignore_errors=True)
        process = begin(("train", "--resume", "runs/run") if exists else TRAIN, place)
        was_killed = False
        if killed < kills:
            timer = threading.Timer(rng.uniform(0.3, 1.1) * seconds, kill, [process])
            timer.start()
            ended = end(process, BOUND_S)
            timer.cancel()
            was_killed = ended.code == -9
        else:
            ended = end(process, BOUND_S)
        folder = place / "runs" / "run"
        faults = _damaged_checkpoints(folder)
        dropped = [line for line in ended.err.splitlines() if line.startswith("warning") and "replay" in line]
        with lock:
            lost.checkpoints += len(faults)
            lost.rows += len(dropped)
            lost.why += faults + dropped
            tally["tried"] += was_killed
            tally["training"] += was_killed and "training in" in ended.err
        killed += was_killed
        if was_killed:
            continue
        with lock:
            if ended.code != 0:
                lost.runs += 1
                lost.why.append(f"after {killed} kills: exit code {ended.code}: {ended.message or ended.err[-500:]}")
                return max(killed, 1)
            differing = _different_rows(folder, whole / "runs" / "run")
            lost.rows += differing
            tally["survived"] += killed
            tally["finished"] += 1
        return killed


def _damaged_checkpoints(folder: Path) -> list[str]:
    """What is wrong with the checkpoints of a run that nobody trains: each that has its name must be whole."""
    faults = []
    for path in sorted(folder.glob("checkpoints/step_*")):
        try:
            checkpoint.load(path)
        except UserError as error:
            faults.append(str(error))
    return faults


def _different_rows(folder: Path, whole: Path) -> int:
    """Lines of metrics that the run that was killed lacks, or has otherwise; clocks aside."""
    mine = _rows(folder)
    its = _rows(whole)
    return abs(len(mine) - len(its)) + sum(a != b for a, b in zip(mine, its, strict=False))


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]
