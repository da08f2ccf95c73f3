"""Inputs that were tampered with, read in worker processes, each input within a bound of time."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np

from longdream.agent.bench.faults.kinds import KINDS
from longdream.agent.bench.faults.processes import environment, kill
from longdream.agent.config import options
from longdream.agent.data import npz_episodes
from longdream.agent.run import checkpoint
from longdream.agent.train.trainer import OnlineTrainer

INPUT_S = 60.0
"""Seconds that one input may take: what it asks for, such as a large model, may take some."""
START_S = 120.0
FRAMES = 12


def read(count: int, seed: int, workers: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Let `count` inputs be read. Returns tried, accepted, refused and failed by kind, and the failures."""
    base = folder / "base"
    shutil.rmtree(folder, ignore_errors=True)
    make_base(base)
    tally: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    failures: list[dict[str, Any]] = []
    lock = threading.Lock()

    def take(result: dict[str, Any]) -> None:
        with lock:
            tally[result["kind"]][result["ended"]] += 1
            if result["ended"] == "failed":
                failures.append(result)
                say(f"input {result['number']} ({result['kind']}) failed: {result['why'].splitlines()[-1][:160]}")
            done = sum(map(Counter.total, tally.values()))
            if done % 500 == 0:
                say(f"{done:,} of {count:,} inputs")

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_work, base, folder / f"worker-{w}", seed, w, count, workers, take) for w in range(workers)]
        for job in jobs:
            job.result()
    ends = ("accepted", "refused", "failed")
    kinds = {kind: {end: counts[end] for end in ends} for kind, counts in tally.items()}
    return {"tried": sum(map(Counter.total, tally.values())), "kinds": kinds, "failures": failures}


def _work(
    base: Path, home: Path, seed: int, first: int, last: int, step: int, take: Callable[[dict[str, Any]], None]
) -> None:
    """Let a worker read every `step`-th input. One that hangs or dies is followed by another."""
    home.mkdir(parents=True)
    while first < last:
        words = [str(base), str(home), str(seed), str(first), str(last), str(step)]
        command = [sys.executable, "-m", "longdream.agent.bench.faults.worker", *words]
        with open(home / "log", "ab") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(), start_new_session=True
            )
        begun: dict[str, Any] | None = None
        assert process.stdout is not None
        try:
            while True:
                ready, _, _ = select.select([process.stdout], [], [], START_S if begun is None else INPUT_S)
                line = process.stdout.readline() if ready else ""
                if not line:
                    why = "it ended the process" if ready else f"it took more than {INPUT_S:g} s"
                    break
                answer = json.loads(line)
                if "ended" in answer:
                    first = answer["number"] + step
                    take(answer)
                else:
                    begun = answer
        finally:
            kill(process)
            process.wait()
            process.stdout.close()
        if first < last:
            if begun is None or begun["number"] < first:
                raise RuntimeError(f"a worker did not start: see {home / 'log'}")
            why += f" (exit code {process.returncode}; {_end_of(home / 'log')})"
            take({**begun, "ended": "failed", "why": why})
            first = begun["number"] + step


def _end_of(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-12:])[-1200:]


def make_base(base: Path) -> None:
    """Good examples of every kind."""
    base.mkdir(parents=True)
    short = {"learn.steps": 88, "evaluate.final_episodes": 1, "evaluate.every": 0, "evaluate.save_seconds": 0.0}
    small = {"replay.capacity": 400, "evaluate.episodes": 1, "evaluate.copies": 1}
    OnlineTrainer.train(options.update(options.load("tiny"), short | small), base / "run", console=False)
    (base / "run" / "summary.json").unlink()
    shutil.rmtree(base / "run" / "tensorboard", ignore_errors=True)
    tree, _ = checkpoint.load(base / "run" / "checkpoints")
    (base / "logger.json").write_text(json.dumps(tree["logger"]))
    rng = np.random.default_rng(0)
    shades = np.arange(20, 20 + 8 * FRAMES, 8, dtype=np.uint8)
    frames = np.broadcast_to(shades[:, None, None, None], (FRAMES, 32, 32, 3))
    for name in ("film.mp4", "film.mkv"):
        imageio.imwrite(base / name, frames, plugin="pyav", codec="libx264", fps=20)
    np.save(base / "film.npy", rng.integers(4, size=FRAMES))
    keys = {"keys": ["key.keyboard.w", "key.keyboard.space"]}
    mouse = {"dx": 3.0, "dy": -1.5, "buttons": [0], "newButtons": []}
    lines = [json.dumps({"tick": t, "mouse": mouse, "keyboard": keys, "hotbar": t % 9}) for t in range(FRAMES)]
    (base / "film.jsonl").write_text("\n".join(lines) + "\n")
    teco = rng.integers(256, size=(FRAMES, 16, 16, 3)).astype(np.uint8)
    np.savez_compressed(base / "teco.npz", video=teco, actions=rng.integers(4, size=FRAMES))
    probes = {
        "maze_layout": np.ones((9, 9), np.uint8),
        "agent_pos": np.array([2.5, 4.5]),
        "agent_dir": np.array([1.0, 0.0]),
        "targets_pos": np.zeros((3, 2)),
        "targets_vec": np.zeros((3, 2)),
        "target_index": np.int64(0),
        "target_color": np.zeros(3),
    }
    pictures = rng.integers(256, size=(FRAMES, 64, 64, 3)).astype(np.uint8)
    rows = [npz_episodes.row(pictures[t], t % 6 if t else None, 0.0, probes) for t in range(FRAMES)]
    npz_episodes.write(base / "maze.npz", rows)
