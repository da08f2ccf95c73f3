"""`longdream bench controllers`: every kind of C in the dreams of the same runs, and model-free baselines."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from longdream.agent.bench import trained
from longdream.agent.bench.common import config_of
from longdream.agent.config.schema import Config, Device
from longdream.envs.contract import UserError
from longdream.envs.make import World

UPDATES = {"actor_critic": 300, "tree": 300, "planner/mppi": 300, "planner/cem": 1, "evolution": 200}
UPDATES |= {"stable_baselines3:PPO": 150}
"""Updates of C of each kind."""
LONGER = {"pendulum": 3}
"""Factor on the updates of kinds that learn by gradient, by preset."""
FIXED = ("planner/cem", "evolution")
"""Kinds that do not learn by gradient."""
REAL = "real/"
"""Prefix of the names of algorithms that learn in the real environment."""


class Job(NamedTuple):
    """A run: its row in the table, and the command that trains it."""

    controller: str
    preset: str
    seed: int
    command: list[str]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{Path(self.preset).stem}-{re.sub('[ /:]', '-', self.controller)}-s{self.seed}"


def measure(
    presets: tuple[str, ...] = ("quickstart", "pendulum"),
    kinds: tuple[str, ...] = (*UPDATES, f"{REAL}PPO", f"{REAL}PPOx10", f"{REAL}RecurrentPPO"),
    seeds: tuple[int, ...] = (1, 2, 3),
    episodes: int = 100,
    updates: int | None = None,
    parallel: int = 1,
    out: Path = Path("runs/controllers"),
    device: Device | None = None,
) -> dict[str, Any]:
    """Compare kinds of C, each trained in the dreams of the same runs, with model-free baselines.

    For every preset and seed, a run is trained by `longdream train` (the row `with M`). Every kind of C then learns
    only in the dreams of that run's V and M, which stay fixed (`longdream train --world`). `real/PPO` takes as many
    real steps as that run, `real/PPOx10` ten times as many (`longdream baseline`). Every run has its own folder below
    OUT. Finished runs are not repeated and interrupted ones are resumed, so the same command continues.

    Args:
        presets: presets or .yaml files
        kinds: kinds of C, as controller.kind, planner/METHOD, or real/ALGORITHM
        seeds: seeds of the runs of each kind
        episodes: real episodes of each evaluation
        updates: updates of each C (default: 300, 200 generations, 150 of SB3; on pendulum three times as many, except
            of generations)
        parallel: runs in parallel
        out: folder of the runs and of their logs
        device: where to compute (default: as in the preset)

    Returns:
        rows: of each run controller, env, seed, return_mean, return_ci95, env_steps, dream_steps, wall_s. For a C that
        learns in dreams, env_steps are those of its M, and wall_s does not include the training of M.

    Raises:
        UserError: a training failed; the message names its log file.
    """
    if parallel < 1 or episodes < 1 or not (seeds and presets):
        raise UserError(f"--parallel {parallel}, --episodes {episodes}, --seeds {seeds}: must be like 1, 100 and 1,2,3")
    rows: list[dict[str, Any]] = []

    def one(job: Job) -> dict[str, Any]:
        summary = trained.finished(out, job.name, job.command)
        row = {"controller": job.controller, "env": summary["env"], "seed": job.seed}
        row |= {key: summary[key] for key in ("return_mean", "return_ci95", "env_steps", "wall_s", "random_mean")}
        print(f"{job.name}: {row['return_mean']:.2f} in {row['wall_s']:.0f} s", file=sys.stderr)
        return row | {"dream_steps": summary.get("dream_steps", 0)}

    worlds = []
    others = []
    for preset in presets:
        config = config_of(preset, device)  # an unknown preset is an error here, not in each of the runs
        discrete = _discrete(config)
        for seed in seeds:
            world = _world(preset, seed, episodes, device)
            worlds.append(world)
            for kind in kinds:
                if kind == "tree" and not discrete:
                    print(f"{preset}: no tree, its actions are not discrete", file=sys.stderr)
                elif kind == f"{REAL}RecurrentPPO" and find_spec("sb3_contrib") is None:
                    print(f"{preset}: no RecurrentPPO, pip install sb3-contrib brings it", file=sys.stderr)
                elif kind.startswith(REAL):
                    others.append(_in_reality(kind, preset, config, seed, episodes))
                else:
                    others.append(_in_dreams(kind, preset, world, seed, episodes, updates, device))
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(parallel) as pool:
        for jobs in (worlds, others):
            rows += pool.map(one, jobs)
    random_mean = {row["env"]: row["random_mean"] for row in rows}
    print(markdown(rows))
    rows = [{key: value for key, value in row.items() if key != "random_mean"} for row in rows]
    return {"presets": list(presets), "random_mean": random_mean, "rows": rows}


def _discrete(config: Config) -> bool:
    with closing(World(config.env.id, 1, 0, config.env.kwargs)) as world:
        return bool(world.spec.action.parts)


def _world(preset: str, seed: int, episodes: int, device: Device | None) -> Job:
    settings = {"seed": seed, "evaluate.final_episodes": episodes} | ({"device": device} if device else {})
    source = str(Path(preset).resolve()) if Path(preset).suffix else preset
    return Job("with M", preset, seed, ["train", source, *trained.flags(settings)])


def _in_dreams(
    kind: str, preset: str, world: Job, seed: int, episodes: int, updates: int | None, device: Device | None
) -> Job:
    name, _, method = kind.partition("/")
    count = updates or UPDATES.get(kind, 300) * (1 if kind in FIXED else LONGER.get(preset, 1))
    settings: dict[str, Any] = {"world": f"runs/{world.name}", "controller.kind": name, "seed": seed}
    settings |= {"controller.replay_value": 0}  # learn from dreams alone, whatever the preset says
    settings |= {"learn.updates": count, "evaluate.final_episodes": episodes, "evaluate.times": 0}
    settings |= ({"controller.kwargs.method": method} if method else {}) | ({"device": device} if device else {})
    if name == "planner":  # it plans by dreaming at every step: faster for all episodes at once
        settings["evaluate.copies"] = episodes
    return Job(kind, preset, seed, ["train", *trained.flags(settings)])


def _in_reality(kind: str, preset: str, config: Config, seed: int, episodes: int) -> Job:
    algorithm, _, times = kind.removeprefix(REAL).partition("x")
    package = "sb3_contrib" if algorithm == "RecurrentPPO" else "stable_baselines3"
    settings = {"env": config.env.id, "algo": f"{package}:{algorithm}", "env_kwargs": json.dumps(config.env.kwargs)}
    settings |= {"steps": config.learn.steps * int(times or 1), "seed": seed, "final_episodes": episodes}
    return Job(kind, preset, seed, ["baseline", *trained.flags(settings | {"evaluate_every": 0})])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as two tables: one line per environment and controller, over seeds, and one line per run."""
    steps = ["real steps", "dreamt steps"]
    over_seeds = [["environment", "controller", "return, mean", "lowest", "runs", *steps, "minutes"]]
    runs = [["environment", "controller", "seed", "return", "95% interval", *steps, "seconds"]]
    for env, controller in dict.fromkeys((row["env"], row["controller"]) for row in rows):
        group = [row for row in rows if (row["env"], row["controller"]) == (env, controller)]
        returns = [row["return_mean"] for row in group]
        numbers = [f"{statistics.median(row[key] for row in group):,.0f}" for key in ("env_steps", "dream_steps")]
        minutes = f"{statistics.median(row['wall_s'] for row in group) / 60:.1f}"
        line = [env, controller, f"{statistics.mean(returns):.2f}", f"{min(returns):.2f}", str(len(group))]
        over_seeds.append([*line, *numbers, minutes])
        for row in group:
            low, high = row["return_ci95"]
            numbers = [f"{row[key]:,.0f}" for key in ("env_steps", "dream_steps", "wall_s")]
            line = [env, controller, str(row["seed"]), f"{row['return_mean']:.2f}", f"{low:.2f} to {high:.2f}"]
            runs.append([*line, *numbers])
    for env in dict.fromkeys(row["env"] for row in rows):
        random = statistics.mean(row["random_mean"] for row in rows if row["env"] == env)
        over_seeds.append([env, "random actions", f"{random:.2f}", "", "", "", "", ""])
    between = "Steps and minutes are medians over runs. Each of them:"
    return "\n\n".join([trained.table(over_seeds), between, trained.table(runs)])
