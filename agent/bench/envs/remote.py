"""`longdream bench remote`: the overhead of an environment that runs in another interpreter."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from longdream.envs.contract import UserError
from longdream.envs.remote import RemoteEnv

WORLD = '''"""Two environments of negligible cost, for any interpreter with numpy."""

import numpy as np


class Box:
    dtype = np.dtype("u1")

    def __init__(self, *shape):
        self.low, self.high = np.zeros(shape, "u1"), np.full(shape, 255, "u1")


class Discrete:
    n = 2


class Frames:
    """Images, 64 x 64 x 3, that differ from step to step."""

    observation_space, action_space = Box(64, 64, 3), Discrete()

    def __init__(self):
        self.pictures = np.random.RandomState(0).randint(0, 256, (16, 64, 64, 3)).astype("u1")
        self.t = 0

    def reset(self, seed=None):
        return self.pictures[0].copy(), {}

    def step(self, action):
        self.t += 1
        return self.pictures[self.t % 16].copy(), 0.0, False, False, {}

    def close(self):
        pass


class Trivial(Frames):
    """One byte."""

    observation_space = Box(1)

    def __init__(self):
        self.pictures, self.t = np.zeros((16, 1), "u1"), 0
'''


def measure(python: str | None = None, steps: int = 1_000, rounds: int = 15, copies: int = 4) -> dict[str, Any]:
    """The time of a step through another interpreter, compared with the same environment in this process.

    In each round both are stepped; the order alternates. The environments compute nothing, so that only the
    communication is measured.

    examples
      longdream bench remote
      longdream bench remote --python ~/minerl/bin/python --json

    Args:
        python: the other interpreter, with numpy (default: another process of this one)
        steps: steps in each round
        rounds: rounds of each measurement
        copies: copies in parallel under AsyncVectorEnv, in the last measurement

    Returns:
        overhead_ms: median over rounds of the additional time of a step with 64 x 64 x 3 frames. steps_per_s: median,
        with an observation of one byte. frames_per_s: median, with frames. parallel_frames_per_s: of all copies
        together. same: whether both gave the same frames.
    """
    if steps < 1 or rounds < 1 or copies < 1:
        raise UserError(f"--steps {steps} --rounds {rounds} --copies {copies}: each must be at least 1")
    python = python or sys.executable
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "remote_bench_world.py").write_text(WORLD)
        world: dict[str, Any] = {}
        exec(compile(WORLD, "remote_bench_world.py", "exec"), world)
        environ = {"PYTHONPATH": folder}
        result: dict[str, Any] = {"python": python, "steps": steps, "rounds": rounds, "copies": copies}
        seconds = {}
        same = True
        for name in ("Frames", "Trivial"):
            here: Any = world[name]()
            with closing(RemoteEnv(python, f"remote_bench_world:{name}", environ=environ)) as there:
                same &= np.array_equal(here.reset()[0], there.reset()[0])
                times = np.array([_times(here, there, steps, i % 2) for i in range(-1, rounds)])[1:]
                same &= np.array_equal(here.step(0)[0], there.step(0)[0])
            seconds[name] = times
            print(f"{name}: {rounds} rounds of {steps} steps", file=sys.stderr)
        result["overhead_ms"] = round(1e3 * float(np.median(seconds["Frames"][:, 1] - seconds["Frames"][:, 0])), 4)
        result["steps_per_s"] = round(1 / float(np.median(seconds["Trivial"][:, 1])), 1)
        result["frames_per_s"] = round(1 / float(np.median(seconds["Frames"][:, 1])), 1)
        result["parallel_frames_per_s"] = round(_parallel(python, environ, copies, steps, rounds), 1)
        result["same"] = bool(same)
    print(f"an environment in {python}, on {os.cpu_count()} cores")
    print(f"  a step with a 64x64x3 frame costs {result['overhead_ms']} ms more than in this process")
    print(
        f"  {result['steps_per_s']:,} steps/s with an observation of one byte, {result['frames_per_s']:,} with frames"
    )
    print(f"  {result['parallel_frames_per_s']:,} frames/s of {copies} copies under AsyncVectorEnv")
    print(f"  frames {'the same' if same else 'DIFFER'}")
    return result


def _times(here: Any, there: Any, steps: int, first: int) -> tuple[float, float]:
    """Seconds per step in this process and in the other interpreter; `first` says who begins."""
    seconds = [0.0, 0.0]
    for who in (first, 1 - first):
        env = (here, there)[who]
        began = time.perf_counter()
        for t in range(steps):
            env.step(t % 2)
        seconds[who] = (time.perf_counter() - began) / steps
    return seconds[0], seconds[1]


def _parallel(python: str, environ: dict[str, str], copies: int, steps: int, rounds: int) -> float:
    """Steps per second of all copies together, the median over rounds."""
    kwargs = {"python": python, "env": "remote_bench_world:Frames", "environ": environ}
    vector = gym.make_vec(
        "longdream:longdream/Remote-v0", copies, "async", vector_kwargs={"context": "forkserver"}, **kwargs
    )
    with closing(vector):
        vector.reset()
        rates = []
        for _ in range(rounds):
            began = time.perf_counter()
            for t in range(steps):
                vector.step(np.full(copies, t % 2))
            rates.append(copies * steps / (time.perf_counter() - began))
        return float(np.median(rates))
