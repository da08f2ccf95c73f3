"""`longdream bench memory-maze`: our Memory Maze against the upstream package: speed, and equality of every image."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np

from longdream.envs.contract import UserError
from longdream.envs.memory_maze.env import upstream_imports
from longdream.envs.memory_maze.sizes import ACTIONS, SIZES


def measure(size: int = 9, rounds: int = 7, steps: int = 100, seed: int = 0) -> dict[str, Any]:
    """How much faster our Memory Maze is than the class of the upstream package, and whether it is identical.

    In each round both are reset and then stepped with the same random actions in one process; the order alternates.
    Upstream computes only the image. Ratios are medians over rounds of the times in a round. The first reset of each is
    not counted, since it loads drivers and shaders, nor is a step before each turn, in which OpenGL switches contexts.

    Args:
        size: 9, 11, 13 or 15
        rounds: number of rounds, each with one episode
        steps: steps in each round
        seed: random seed of mazes and actions

    Returns:
        ratio_steps, ratio_resets: upstream's time divided by ours. identical: whether all images and rewards are equal.
        steps_per_s, upstream_steps_per_s, reset_s, upstream_reset_s: medians.
    """
    if size not in SIZES or rounds < 1 or steps < 1:
        raise UserError(
            f"--size {size} --rounds {rounds} --steps {steps}: must be a size of Memory Maze, 1 and 1 at least"
        )
    ours = gym.make(f"longdream/MemoryMaze-{size}x{size}-v0").unwrapped
    with upstream_imports():
        from memory_maze import tasks
    theirs = getattr(tasks, f"memory_maze_{size}x{size}")(seed=seed, image_only_obs=True)
    rng = np.random.default_rng(seed)
    times = np.zeros((rounds + 1, 2, 2))  # round; reset, steps; ours, theirs
    identical = True
    with closing(ours), closing(theirs):
        for i in range(rounds + 1):
            actions = rng.integers(len(ACTIONS), size=steps)
            seen: dict[int, list[Any]] = {}
            for who in (0, 1) if i % 2 else (1, 0):
                if i:
                    (ours, theirs)[who].step(0)
                began = time.perf_counter()
                if who == 0:
                    seen[0] = [ours.reset(seed=seed if i == 0 else None)[0]]
                else:
                    seen[1] = [theirs.reset().observation]
                times[i, 0, who] = time.perf_counter() - began
                began = time.perf_counter()
                for action in actions:
                    if who == 0:
                        seen[0].extend(ours.step(action)[:2])
                    else:
                        step = theirs.step(action)
                        seen[1].extend([step.observation, step.reward])
                times[i, 1, who] = time.perf_counter() - began
            same = all(np.array_equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
            identical &= same
            if i:
                ratios = times[i, :, 1] / times[i, :, 0]
                text = f"resets {ratios[0]:.2f}x, steps {ratios[1]:.2f}x, pictures {'equal' if same else 'DIFFER'}"
                print(f"round {i} of {rounds}: {text}", file=sys.stderr)
    times = times[1:]
    ratio = np.median(times[:, :, 1] / times[:, :, 0], axis=0)
    median = np.median(times, axis=0)
    result = {
        "size": size,
        "ratio_steps": round(float(ratio[1]), 2),
        "ratio_resets": round(float(ratio[0]), 2),
        "identical": bool(identical),
        "steps_per_s": round(steps / median[1, 0], 1),
        "upstream_steps_per_s": round(steps / median[1, 1], 1),
        "reset_s": round(median[0, 0], 3),
        "upstream_reset_s": round(median[0, 1], 3),
    }
    print(f"Memory Maze {size}x{size}, {rounds} rounds of a reset and {steps} steps, beside upstream's in one process")
    for what, key, speedup in (("steps", "steps_per_s", ratio[1]), ("resets", "reset_s", ratio[0])):
        upstream = result[f"upstream_{key}"]
        print(f"  {what:7} {key:11} {result[key]:8}, upstream's {upstream:8}: {speedup:.2f} times as fast")
    print(f"  pictures and rewards {'identical' if identical else 'DIFFER'}")
    return result
