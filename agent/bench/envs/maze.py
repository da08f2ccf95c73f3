"""`longdream bench maze`: the speed of the fast Memory Maze, and of the original in one process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch

from longdream.envs.contract import UserError
from longdream.envs.memory_maze import gl
from longdream.envs.memory_maze.env import upstream_imports
from longdream.envs.memory_maze.sizes import ACTIONS, SIZES

WARM_UP = 5  # steps that are not timed: compilation, caches


def measure(
    size: int = 9,
    copies: int = 64,
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 7,
    steps: int = 20,
    upstream_steps: int = 60,
    upstream: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Steps per second of the fast (batched) Memory Maze, images included, and of the original package's environment.

    In each round the original takes upstream_steps steps in this process, then the fast version takes `steps` steps of
    all copies, both with random actions. Rates are medians over the rounds; resets are not timed. On the CPU the fast
    version uses as many threads as torch (OMP_NUM_THREADS).

    Args:
        size: 9, 11, 13 or 15
        copies: copies of the fast version in parallel
        device: device of the fast version
        rounds: number of rounds
        steps: steps of all copies of the fast version in each round
        upstream_steps: steps of the original in each round
        upstream: measure the original too
        seed: random seed of mazes and actions

    Returns:
        steps_per_s, upstream_steps_per_s, their ratio, device, copies; physics_share: share of the body's physics in
        the time of the fast version, the rest being images; bytes_per_copy: device memory, null on the CPU.
    """
    if size not in SIZES or min(rounds, steps, upstream_steps) < 1:
        raise UserError(f"--size {size} --rounds {rounds} --steps {steps} --upstream-steps {upstream_steps}: too small")
    from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv

    before = torch.cuda.memory_allocated() if device == "cuda" and torch.cuda.is_available() else 0
    fast = FastMemoryMazeVecEnv(copies, size, device=device)
    actions = torch.from_numpy(np.random.default_rng(seed).integers(len(ACTIONS), size=(steps, copies)))
    actions = actions.to(fast.device)
    original = _original(size, seed) if upstream else None
    rates = []
    upstream_rates = []
    shares = []
    with closing(fast):
        fast.reset_tensors(seed)
        for step in range(WARM_UP):
            fast.step_tensors(actions[step % steps])
            if original is not None:
                original(step % len(ACTIONS))
        for i in range(rounds):
            if original is not None:
                began = time.perf_counter()
                for step in range(upstream_steps):
                    original(step % len(ACTIONS))
                upstream_rates.append(upstream_steps / (time.perf_counter() - began))
            whole = _seconds(fast.device, actions, fast.step_tensors)
            unseen = _seconds(fast.device, actions, fast.step_unseen)
            rates.append(copies * steps / whole)
            shares.append(unseen / whole)
            print(f"round {i + 1} of {rounds}: {rates[-1]:,.0f} steps/s", file=sys.stderr)
        bytes_per_copy = (torch.cuda.max_memory_allocated() - before) / copies if device == "cuda" else None
    rate = float(np.median(rates))
    upstream_rate = float(np.median(upstream_rates)) if upstream_rates else None
    result = {
        "size": size,
        "copies": copies,
        "device": torch.cuda.get_device_name(fast.device) if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "steps_per_s": round(rate, 1),
        "upstream_steps_per_s": None if upstream_rate is None else round(upstream_rate, 1),
        "ratio": None if upstream_rate is None else round(rate / upstream_rate, 1),
        "physics_share": round(float(np.median(shares)), 3),
        "bytes_per_copy": None if bytes_per_copy is None else round(bytes_per_copy),
    }
    print(f"fast Memory Maze {size}x{size}, {copies} copies on {result['device']}: {rate:,.0f} steps/s")
    print(f"  physics take {result['physics_share']:.0%} of the time, images the rest")
    if upstream_rate is not None:
        print(f"  the original in one process: {upstream_rate:.1f} steps/s; {rate / upstream_rate:.1f} times as fast")
    return result


def _original(size: int, seed: int) -> Callable[[int], Any]:
    gl.choose()
    with upstream_imports():
        from memory_maze import tasks
    env = getattr(tasks, f"memory_maze_{size}x{size}")(seed=seed, image_only_obs=True)
    env.reset()
    return env.step


def _seconds(device: torch.device, actions: torch.Tensor, step: Callable[[torch.Tensor], Any]) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    synchronise(device)
    began = time.perf_counter()
    for action in actions:
        step(action)  # its result is not kept, since memory is measured too
    synchronise(device)
    return time.perf_counter() - began
