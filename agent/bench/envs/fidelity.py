"""`longdream bench fidelity`: the twin of Memory Maze beside the real one, in pictures, body, touches and returns."""

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
from longdream.envs.contract import UserError
from longdream.envs.memory_maze import policies as navigate
from longdream.envs.memory_maze.sizes import ACTION_CONTROLS, ACTIONS, SIZES

if TYPE_CHECKING:
    from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv
    from longdream.envs.memory_maze.simulation import Simulation

ACTIONS_AFTER = 10  # over which poses are compared
SHOWN = 6  # pairs of pictures of each size in the file
APPROACH = 8  # actions in which a target is reached or missed
STATES_PER_MAZE = 10


def measure(
    states: int = 130,
    approaches: int = 100,
    episodes: int = 100,
    workers: int | None = None,
    seed: int = 0,
    out: Path = Path("runs/fidelity"),
) -> dict[str, Any]:
    """How faithful the twin of Memory Maze is to the real one.

    Pictures: the twin is put into the real one's states (maze, textures, pose, targets), which a noisy player has come
    to; peak signal-to-noise ratio of each picture, its frame left out. Body: both take the same actions from there,
    random ones or the player's; distance of the places they come to, in cells, in the open and where the real body had
    contact with a wall. Touches: both roll towards a target, off its middle by up to a cell; whether they touch it at
    the same action or both miss it. Returns: of uniform random actions and of the oracle, in mazes of their own.

    Args:
        states: compared per size, 10 in each maze
        approaches: to targets, per size
        episodes: per size, policy and environment; 0 leaves returns out
        workers: processes that play for the returns (default: one per processor)
        seed: of mazes, players and actions
        out: folder for pictures, side by side: real, twin, four times their difference

    Returns:
        psnr_mean, psnr_p05 (dB); pose_error_1, pose_error_10_open, pose_error_10_contact: medians, in cells;
        touch_agreement: share of approaches; returns: rows of size, policy, real_mean, real_ci95, twin_mean,
        twin_ci95, agree (each mean lies in the other's 95% interval). How many there were of each stands in counts.
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
    found = {
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
    print("Twin of Memory Maze beside the real one")
    for key in ("psnr_mean", "psnr_p05", "pose_error_1", "pose_error_10_open", "pose_error_10_contact"):
        print(f"  {key:22} {found[key]}")
    print(f"  touch_agreement        {found['touch_agreement']}")
    for row in found["returns"]:
        told = [f"{who} {row[f'{who}_mean']:.2f} ± {np.ptp(row[f'{who}_ci95']) / 2:.2f}" for who in ("real", "twin")]
        print(f"  {row['size']}x{row['size']} {row['policy']:6} {', '.join(told)}")
    return found


def match(twin: FastMemoryMazeVecEnv, real: Simulation) -> None:
    """Put the twin's one copy, which has been reset, into the real one's state: maze, textures, targets and body."""
    from longdream.envs.fast_memory_maze import scene, textures

    arena, physics = real.arena, real.physics
    if physics is None:
        raise RuntimeError("match before the real one's reset")
    entities, floors = np.array(arena.maze.entity_layer), np.array(arena.maze.variations_layer)
    cells = np.where(floors == ".", textures.CORRIDOR, textures.ROOM)
    for char, texture in arena._current_wall_texture.items():
        cells[entities == char] = scene.WALL + textures.WALLS.index(texture.name)
    twin.cells[0] = torch.from_numpy(cells[::-1].astype(np.int32))
    outer = len(cells)
    colours = np.array(real.task._target_colors[: twin.count])
    for k, target in enumerate(real.task._targets):
        place = np.array(physics.bind(target.geom).xpos) / scene.CELL
        twin.spheres[0, k, :3] = torch.from_numpy(place + np.array([outer / 2, outer / 2, 0.0]))
    twin.spheres[0, : twin.count, 3:6] = torch.from_numpy(np.floor(colours * 255.0)).float()
    twin.colours[0] = torch.from_numpy(colours)
    twin.prompt[0] = int(real.task._current_target_ix)
    q, v = np.array(physics.data.qpos), np.array(physics.data.qvel)  # x, y, z, steering (clockwise), rolling
    middle = outer * scene.CELL / 2
    body = [q[0] + middle, q[1] + middle, q[2] + scene.BALL_RADIUS, -q[3], v[0], v[1], v[2], -v[3], v[4]]
    twin.body[0] = torch.tensor(body, dtype=torch.float64)


def _compare(
    size: int, states: int, seed: int, ratios: list[float], errors: dict[str, list[float]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Adds the ratios and errors at so many states; returns a few pairs of pictures."""
    real, twin = _pair(size)
    rng, shown = np.random.default_rng((seed, size)), []
    for state in range(states):
        if state % STATES_PER_MAZE == 0:
            real.seed(int(rng.integers(2**31)))
            real.reset()
            player = navigate.Navigator(rng)
            player.reset(1)
        for _ in range(int(rng.integers(3, 12))):
            real.step(_ask(player, real))
        match(twin, real)
        pictures = real.image(), twin.observe()[0].numpy()
        ratios.append(psnr(*pictures))
        if len(shown) < SHOWN and state % STATES_PER_MAZE == 0:
            shown.append(pictures)
        walled = False
        for step in range(1, ACTIONS_AFTER + 1):
            action = _ask(player, real) if state % 2 else int(rng.integers(len(ACTIONS)))
            walled |= _roll(real, action)
            twin.step_unseen(torch.tensor([action]))
            away = np.hypot(*(real.probes()["agent_pos"] - _place(twin)))
            if step == 1:
                errors["1"].append(float(away))
        errors["contact" if walled else "open"].append(float(away))
    real.close()
    twin.close()
    return shown


def _touches(size: int, approaches: int, seed: int) -> list[bool]:
    """Of each approach to a target whether both touch it at the same action, or neither does."""
    real, twin = _pair(size)
    rng, agreed = np.random.default_rng((seed, size, 1)), []
    while len(agreed) < approaches:
        if len(agreed) % STATES_PER_MAZE == 0:
            real.seed(int(rng.integers(2**31)))
            real.reset()
        probes = real.probes()
        target = int(rng.integers(twin.count))
        away, angle = rng.uniform(0.5, 1.2), rng.uniform(-np.pi, np.pi)
        start = probes["targets_pos"][target] + away * np.array([np.cos(angle), np.sin(angle)])
        if not navigate.visible(probes["maze_layout"][None], start[None], start[None])[0]:
            continue
        heading = angle + np.pi + rng.uniform(-1, 1)
        physics, middle = real.physics, size / 2
        assert physics is not None
        with physics.reset_context():
            physics.data.qpos[:] = [*(start - middle) * 2.0, 0.0, -heading, 0.0]
        real.task._current_target_ix = target
        match(twin, real)
        first: list[int | None] = [None, None]
        for step in range(APPROACH):
            reward = real.step(1)[0], float(twin.step_unseen(torch.tensor([1]))[0][0])
            # the prompt changes with a touch: only the first one counts
            first = [step if f is None and r > 0 else f for f, r in zip(first, reward, strict=True)]
        agreed.append(first[0] == first[1])
    real.close()
    twin.close()
    return agreed


def returns(
    episodes: int,
    workers: int,
    seed: int,
    sizes: Iterable[int] = SIZES,
    policies: Sequence[str] = ("random", "oracle"),
) -> list[dict[str, Any]]:
    """Rows of `measure`'s returns: each policy in each size, on the real one in worker processes and on the twin."""
    jobs = [(size, policy) for size in sizes for policy in policies]
    rows = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        share = -(-episodes // workers)
        real = {
            job: [
                pool.submit(_play_real, *job, range(low, min(low + share, episodes)), seed)
                for low in range(0, episodes, share)
            ]
            for job in jobs
        }
        twin = {job: pool.submit(_play_twin, *job, episodes, seed) for job in jobs}
        for size, policy in jobs:
            steps = np.full(episodes, float(SIZES[size].seconds * 4))
            theirs = Returns.of(np.concatenate([part.result() for part in real[size, policy]]), steps).to_json()
            ours = Returns.of(twin[size, policy].result(), steps).to_json()
            rows.append(
                {
                    "size": size,
                    "policy": policy,
                    "real_mean": theirs["return_mean"],
                    "real_ci95": theirs["return_ci95"],
                    "twin_mean": ours["return_mean"],
                    "twin_ci95": ours["return_ci95"],
                    "agree": _within(theirs["return_mean"], ours["return_ci95"])
                    and _within(ours["return_mean"], theirs["return_ci95"]),
                }
            )
            print(
                f"returns of {policy} in {size}x{size}: {theirs['return_mean']:.2f} and {ours['return_mean']:.2f}",
                file=sys.stderr,
            )
    return rows


def _play_real(size: int, policy: str, episodes: range, seed: int) -> np.ndarray:
    from longdream.envs.memory_maze.env import simulation_class

    real, totals = simulation_class(draws=False)(size), []
    for episode in episodes:
        rng = np.random.default_rng((seed, size, episode))
        player = navigate.Random(rng) if policy == "random" else navigate.Oracle()
        real.seed(int(rng.integers(2**31)))
        real.reset()
        player.reset(1)
        total, over = 0.0, False
        while not over:
            reward, over = real.step(_ask(player, real))
            total += reward
        totals.append(total)
    real.close()
    return np.array(totals)


def _play_twin(size: int, policy: str, episodes: int, seed: int) -> np.ndarray:
    from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv

    torch.set_num_threads(1)  # one of many processes
    twin = FastMemoryMazeVecEnv(episodes, size)
    rng = np.random.default_rng((seed, size, 2))
    player = navigate.Random(rng) if policy == "random" else navigate.Oracle()
    twin.reset_tensors([int(s) for s in rng.integers(2**31, size=episodes)])
    player.reset(episodes)
    total = np.zeros(episodes)
    for _ in range(twin.max_steps):
        actions = player.act(twin.get_probes() if policy == "oracle" else {})
        total += twin.step_unseen(torch.from_numpy(actions))[0].numpy()
    twin.close()
    return total


def _pair(size: int) -> tuple[Simulation, FastMemoryMazeVecEnv]:
    import gymnasium as gym

    from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv

    real: Any = gym.make(f"longdream/MemoryMaze-{size}x{size}-v0").unwrapped
    twin = FastMemoryMazeVecEnv(1, size)
    twin.reset_tensors(0)
    return real.simulation, twin


def _roll(real: Simulation, action: int) -> bool:
    """An action of the real one's body alone: whether it had contact with a wall at any of the substeps."""
    import mujoco

    physics: Any = real.physics
    model, data = physics.model.ptr, physics.data.ptr
    real.task.before_step(physics, np.array(ACTION_CONTROLS[action]), real.random_state)
    walled = False
    for _ in range(real.substeps):
        mujoco.mj_step2(model, data)  # type: ignore[attr-defined]
        mujoco.mj_step1(model, data)  # type: ignore[attr-defined]
        target = real._is_target[data.contact.geom].any(1)
        walled |= bool((~target & (np.abs(data.contact.frame[:, 2]) < 0.5)).any())  # level normals
    return walled


def _within(value: float, interval: list[float]) -> bool:
    return interval[0] <= value <= interval[1]


def _place(twin: FastMemoryMazeVecEnv) -> np.ndarray:
    return twin.body[0, :2].numpy() / 2.0 - 1.0


def _ask(player: navigate.Policy, real: Simulation) -> int:
    probes = {} if isinstance(player, navigate.Random) else real.probes()
    return int(player.act({key: np.asarray(value)[None] for key, value in probes.items()})[0])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio, dB, of two pictures (64, 64, 3) uint8 without their frames."""
    inner = (slice(2, -2), slice(2, -2))
    square = np.mean((a[inner].astype(float) - b[inner]) ** 2)
    return float(10 * np.log10(255**2 / max(square, 1e-3)))


def _median(values: list[float]) -> float | None:
    return float(f"{np.median(values):.3g}") if values else None


def _sheet(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    rows = [
        np.concatenate([a, b, np.clip(4 * np.abs(a.astype(int) - b), 0, 255).astype(np.uint8)], 1) for a, b in pairs
    ]
    return np.concatenate(rows).repeat(3, 0).repeat(3, 1)
