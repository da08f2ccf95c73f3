"""`longdream bench fidelity`: the fast Memory Maze against the original: images, body, touches and returns."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v3 as imageio
import numpy as np
import torch

from longdream.agent.evaluation.rollout import Returns
from longdream.agent.run.signals import end_with_parent
from longdream.envs.contract import UserError
from longdream.envs.memory_maze.policies import Navigator, Oracle, Policy, Random, visible
from longdream.envs.memory_maze.sizes import ACTION_CONTROLS, ACTIONS, SIZES

if TYPE_CHECKING:
    from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv
    from longdream.envs.memory_maze.simulation import Simulation

ACTIONS_AFTER = 10  # actions over which poses are compared
SHOWN = 6  # pairs of images of each size in the picture
APPROACH = 8  # actions within which a target is reached or missed
STATES_PER_MAZE = 10


def measure(
    states: int = 130,
    approaches: int = 100,
    episodes: int = 100,
    workers: int | None = None,
    seed: int = 0,
    out: Path = Path("runs/fidelity"),
) -> dict[str, Any]:
    """How close the fast (batched) Memory Maze is to the original.

    Images: the fast version is set to states of the original (maze, textures, pose, targets) that a noisy policy has
    reached; PSNR of each image without its border. Body: both take the same actions from there, random ones or the
    policy's; distance between the positions that they reach, in cells, in the open and where the original body touched
    a wall. Touches: both roll towards a target, up to a cell off its centre; whether they touch it at the same action
    or both miss it. Returns: of uniform random actions and of the oracle, in separately sampled mazes.

    Args:
        states: states compared per size, 10 in each maze
        approaches: approaches to targets, per size
        episodes: episodes per size, policy and environment; 0 leaves returns out
        workers: processes that play for the returns (default: one per processor)
        seed: random seed of mazes, policies and actions
        out: folder for pictures: original, fast version, and four times their difference, side by side

    Returns:
        psnr_mean, psnr_p05 (dB); pose_error_1, pose_error_10_open, pose_error_10_contact: medians, in cells;
        touch_agreement: share of approaches; returns: rows of size, policy, real_mean, real_ci95 (original), fast_mean,
        fast_ci95 (fast version), agree (each mean lies in the other's 95% interval); counts: number of samples of each.
    """
    if min(states, approaches) < 1 or episodes < 0:
        raise UserError(f"--states {states} --approaches {approaches} --episodes {episodes}: too small")
    out.mkdir(parents=True, exist_ok=True)
    ratios: list[float] = []
    errors: dict[str, list[float]] = {"1": [], "open": [], "contact": []}
    agreed: list[bool] = []
    for size in SIZES:
        shown = _compare(size, states, seed, ratios, errors)
        imageio.imwrite(out / f"fidelity-{size}x{size}.png", _sheet(shown))
        agreed += _touches(size, approaches, seed)
        print(f"{size}x{size}: {len(ratios)} pictures so far, {np.mean(ratios):.1f} dB", file=sys.stderr)
    result = {
        "psnr_mean": round(float(np.mean(ratios)), 2),
        "psnr_p05": round(float(np.quantile(ratios, 0.05)), 2),
        "pose_error_1": _median(errors["1"]),
        "pose_error_10_open": _median(errors["open"]),
        "pose_error_10_contact": _median(errors["contact"]),
        "touch_agreement": round(float(np.mean(agreed)), 4),
        "counts": {
            "pictures": len(ratios),
            **{f"poses_{key}": len(value) for key, value in errors.items()},
            "approaches": len(agreed),
        },
        "returns": returns(episodes, workers or os.cpu_count() or 1, seed) if episodes else [],
        "out": str(out),
    }
    print("fast Memory Maze against the original")
    for key in ("psnr_mean", "psnr_p05", "pose_error_1", "pose_error_10_open", "pose_error_10_contact"):
        print(f"  {key:22} {result[key]}")
    print(f"  touch_agreement        {result['touch_agreement']}")
    for row in result["returns"]:
        means = [
            f"{label} {row[f'{key}_mean']:.2f} ± {np.ptp(row[f'{key}_ci95']) / 2:.2f}"
            for key, label in (("real", "original"), ("fast", "fast version"))
        ]
        print(f"  {row['size']}x{row['size']} {row['policy']:6} {', '.join(means)}")
    return result


def match(fast: FastMemoryMazeVecEnv, real: Simulation) -> None:
    """Set the only copy of the fast version, after its reset, to the original's state: maze, textures, targets, body.

    Raises:
        RuntimeError: the original has not been reset.
    """
    from longdream.envs.fast_memory_maze import scene, textures

    arena = real.arena
    physics = real.physics
    if physics is None:
        raise RuntimeError("match before the original's reset")
    entities = np.array(arena.maze.entity_layer)
    floors = np.array(arena.maze.variations_layer)
    cells = np.where(floors == ".", textures.CORRIDOR, textures.ROOM)
    for char, texture in arena._current_wall_texture.items():
        cells[entities == char] = scene.WALL + textures.WALLS.index(texture.name)
    fast.cells[0] = torch.from_numpy(cells[::-1].astype(np.int32))
    outer = len(cells)
    colours = np.array(real.task._target_colors[: fast.count])
    for k, target in enumerate(real.task._targets):
        place = np.array(physics.bind(target.geom).xpos) / scene.CELL
        fast.spheres[0, k, :3] = torch.from_numpy(place + np.array([outer / 2, outer / 2, 0.0]))
    fast.spheres[0, : fast.count, 3:6] = torch.from_numpy(np.floor(colours * 255.0)).float()
    fast.colours[0] = torch.from_numpy(colours)
    fast.prompt[0] = int(real.task._current_target_ix)
    q = np.array(physics.data.qpos)  # x, y, z, steering (clockwise), rolling
    v = np.array(physics.data.qvel)
    middle = outer * scene.CELL / 2
    body = [q[0] + middle, q[1] + middle, q[2] + scene.BALL_RADIUS, -q[3], v[0], v[1], v[2], -v[3], v[4]]
    fast.body[0] = torch.tensor(body, dtype=torch.float64)


def _compare(
    size: int, states: int, seed: int, ratios: list[float], errors: dict[str, list[float]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Append PSNRs and pose errors of `states` states to `ratios` and `errors`. Returns some pairs of images."""
    real, fast = _pair(size)
    rng = np.random.default_rng((seed, size))
    shown = []
    for state in range(states):
        if state % STATES_PER_MAZE == 0:
            real.seed(int(rng.integers(2**31)))
            real.reset()
            player = Navigator(rng)
            player.reset(1)
        for _ in range(int(rng.integers(3, 12))):
            real.step(_ask(player, real))
        match(fast, real)
        images = (real.image(), fast.observe()[0].numpy())
        ratios.append(psnr(*images))
        if len(shown) < SHOWN and state % STATES_PER_MAZE == 0:
            shown.append(images)
        contact = False
        for step in range(1, ACTIONS_AFTER + 1):
            action = _ask(player, real) if state % 2 else int(rng.integers(len(ACTIONS)))
            contact |= _roll(real, action)
            fast.step_unseen(torch.tensor([action]))
            distance = np.hypot(*(real.probes()["agent_pos"] - _position(fast)))
            if step == 1:
                errors["1"].append(float(distance))
        errors["contact" if contact else "open"].append(float(distance))
    real.close()
    fast.close()
    return shown


def _touches(size: int, approaches: int, seed: int) -> list[bool]:
    """For each approach to a target, whether both touch it at the same action or neither does."""
    real, fast = _pair(size)
    rng = np.random.default_rng((seed, size, 1))
    agreed = []
    while len(agreed) < approaches:
        if len(agreed) % STATES_PER_MAZE == 0:
            real.seed(int(rng.integers(2**31)))
            real.reset()
        probes = real.probes()
        target = int(rng.integers(fast.count))
        distance = rng.uniform(0.5, 1.2)
        angle = rng.uniform(-np.pi, np.pi)
        start = probes["targets_pos"][target] + distance * np.array([np.cos(angle), np.sin(angle)])
        if not visible(probes["maze_layout"][None], start[None], start[None])[0]:
            continue
        heading = angle + np.pi + rng.uniform(-1, 1)
        physics = real.physics
        assert physics is not None
        with physics.reset_context():
            physics.data.qpos[:] = [*(start - size / 2) * 2.0, 0.0, -heading, 0.0]
        real.task._current_target_ix = target
        match(fast, real)
        first: list[int | None] = [None, None]
        for step in range(APPROACH):
            rewards = (real.step(1)[0], float(fast.step_unseen(torch.tensor([1]))[0][0]))
            # the prompted target changes after a touch: only the first touch counts
            first = [step if f is None and r > 0 else f for f, r in zip(first, rewards, strict=True)]
        agreed.append(first[0] == first[1])
    real.close()
    fast.close()
    return agreed


def returns(
    episodes: int,
    workers: int,
    seed: int,
    sizes: Iterable[int] = SIZES,
    policies: Sequence[str] = ("random", "oracle"),
) -> list[dict[str, Any]]:
    """The rows `returns` of `measure`: each policy in each size, in the original (in worker processes) and the fast
    version."""
    jobs = [(size, policy) for size in sizes for policy in policies]
    rows = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        share = -(-episodes // workers)
        real = {
            job: [
                pool.submit(_play_real, *job, range(low, min(low + share, episodes)), seed)
                for low in range(0, episodes, share)
            ]
            for job in jobs
        }
        fast = {job: pool.submit(_play_fast, *job, episodes, seed) for job in jobs}
        for size, policy in jobs:
            steps = np.full(episodes, float(SIZES[size].seconds * 4))
            in_original = Returns.of(np.concatenate([part.result() for part in real[size, policy]]), steps).to_json()
            in_fast = Returns.of(fast[size, policy].result(), steps).to_json()
            rows.append(
                {
                    "size": size,
                    "policy": policy,
                    "real_mean": in_original["return_mean"],
                    "real_ci95": in_original["return_ci95"],
                    "fast_mean": in_fast["return_mean"],
                    "fast_ci95": in_fast["return_ci95"],
                    "agree": _within(in_original["return_mean"], in_fast["return_ci95"])
                    and _within(in_fast["return_mean"], in_original["return_ci95"]),
                }
            )
            print(
                f"returns of {policy} in {size}x{size}: "
                f"{in_original['return_mean']:.2f} and {in_fast['return_mean']:.2f}",
                file=sys.stderr,
            )
    return rows


def _play_real(size: int, policy: str, episodes: range, seed: int) -> np.ndarray:
    from longdream.envs.memory_maze.env import simulation_class

    real = simulation_class(draws=False)(size)
    totals = []
    for episode in episodes:
        rng = np.random.default_rng((seed, size, episode))
        player = Random(rng) if policy == "random" else Oracle()
        real.seed(int(rng.integers(2**31)))
        real.reset()
        player.reset(1)
        total = 0.0
        over = False
        while not over:
            reward, over = real.step(_ask(player, real))
            total += reward
        totals.append(total)
    real.close()
    return np.array(totals)


def _play_fast(size: int, policy: str, episodes: int, seed: int) -> np.ndarray:
    from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv

    torch.set_num_threads(1)  # one of many processes
    fast = FastMemoryMazeVecEnv(episodes, size)
    rng = np.random.default_rng((seed, size, 2))
    player = Random(rng) if policy == "random" else Oracle()
    fast.reset_tensors([int(s) for s in rng.integers(2**31, size=episodes)])
    player.reset(episodes)
    total = np.zeros(episodes)
    for _ in range(fast.max_steps):
        actions = player.act(fast.get_probes() if policy == "oracle" else {})
        total += fast.step_unseen(torch.from_numpy(actions))[0].numpy()
    fast.close()
    return total


def _pair(size: int) -> tuple[Simulation, FastMemoryMazeVecEnv]:
    import gymnasium as gym

    from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv

    real: Any = gym.make(f"longdream/MemoryMaze-{size}x{size}-v0").unwrapped
    fast = FastMemoryMazeVecEnv(1, size)
    fast.reset_tensors(0)
    return real.simulation, fast


def _roll(real: Simulation, action: int) -> bool:
    """Apply an action to the original's body alone. Returns whether it touched a wall in any of the substeps."""
    import mujoco

    physics: Any = real.physics
    model = physics.model.ptr
    data = physics.data.ptr
    real.task.before_step(physics, np.array(ACTION_CONTROLS[action]), real.random_state)
    touched = False
    for _ in range(real.substeps):
        mujoco.mj_step2(model, data)  # type: ignore[attr-defined]
        mujoco.mj_step1(model, data)  # type: ignore[attr-defined]
        target = real._is_target[data.contact.geom].any(1)
        touched |= bool((~target & (np.abs(data.contact.frame[:, 2]) < 0.5)).any())  # walls have horizontal normals
    return touched


def _within(value: float, interval: list[float]) -> bool:
    return interval[0] <= value <= interval[1]


def _position(fast: FastMemoryMazeVecEnv) -> np.ndarray:
    return fast.body[0, :2].numpy() / 2.0 - 1.0


def _ask(player: Policy, real: Simulation) -> int:
    probes = {} if isinstance(player, Random) else real.probes()
    return int(player.act({key: np.asarray(value)[None] for key, value in probes.items()})[0])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two images (64, 64, 3) uint8 without their borders."""
    inner = (slice(2, -2), slice(2, -2))
    mse = np.mean((a[inner].astype(float) - b[inner]) ** 2)
    return float(10 * np.log10(255**2 / max(mse, 1e-3)))


def _median(values: list[float]) -> float | None:
    return float(f"{np.median(values):.3g}") if values else None


def _sheet(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    rows = [
        np.concatenate([a, b, np.clip(4 * np.abs(a.astype(int) - b), 0, 255).astype(np.uint8)], 1) for a, b in pairs
    ]
    return np.concatenate(rows).repeat(3, 0).repeat(3, 1)
