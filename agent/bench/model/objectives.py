"""`longdream bench objectives`: agents trained with each objective of M, compared."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from longdream.agent.bench import trained
from longdream.agent.bench.common import config_of
from longdream.agent.config.schema import Device
from longdream.envs.contract import UserError


def measure(
    preset: str = "quickstart",
    kinds: tuple[str, ...] = ("flow/clean", "flow/noisy", "mask/clean", "teacher/clean"),
    seeds: tuple[int, ...] = (1, 2, 3),
    steps: int | None = None,
    threshold: float = 0.9,
    parallel: int = 1,
    out: Path = Path("runs/objectives"),
    device: Device | None = None,
) -> dict[str, Any]:
    """Compare the objectives of M: a preset is trained with each of them, over several seeds.

    Each run is trained by `longdream train` in its own folder below OUT. Finished runs are not repeated and interrupted
    ones are resumed, so the same command continues a comparison.

    Args:
        preset: preset or .yaml file
        kinds: forcing.objective/forcing.history of each; teacher forcing adds no noise, and ignores the history
        seeds: seeds of the runs of each kind
        steps: real steps of each run (default: the preset's)
        threshold: mean greedy return to be reached
        parallel: runs in parallel
        out: folder of the runs and of their logs
        device: where to compute (default: as in the preset)

    Returns:
        rows: of each run objective, history, seed, return_mean, env_steps, updates, wall_s and, from the evaluations
        during training, steps_to_threshold and seconds_to_threshold (null if it was never reached).

    Raises:
        UserError: a training failed; the message names its log file.
    """
    if parallel < 1 or not seeds or not all("/" in kind for kind in kinds):
        raise UserError(
            f"--parallel {parallel}, --seeds {seeds}, --kinds {kinds}: must be like 1, 1,2,3 and flow/clean"
        )
    config_of(preset, device)  # an unknown preset is an error here, not in each of the runs
    preset = str(Path(preset).resolve()) if Path(preset).suffix else preset
    flags = [*(("--device", device) if device else ()), *(("--steps", str(steps)) if steps else ())]
    out.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, int]) -> dict[str, Any]:
        row = _trained(out, preset, flags, threshold, *job)
        print("{objective} {history}, seed {seed}: {return_mean:.3f} in {wall_s:.0f} s".format(**row), file=sys.stderr)
        return row

    with ThreadPoolExecutor(parallel) as pool:
        rows = list(pool.map(one, [(kind, seed) for kind in kinds for seed in seeds]))
    print(markdown(rows, threshold))
    return {"preset": preset, "threshold": threshold, "rows": rows}


def _trained(out: Path, preset: str, flags: list[str], threshold: float, kind: str, seed: int) -> dict[str, Any]:
    """The row of one run, which is trained now if it is not finished."""
    objective, _, history = kind.rpartition("/")
    name = f"{objective}-{history}-s{seed}"
    settings = {"seed": seed, "forcing.objective": objective, "forcing.history": history}
    summary = trained.finished(out, name, ["train", preset, *flags, *trained.flags(settings)])
    steps, seconds = reached_at(out / "runs" / name / "metrics.jsonl", threshold)
    row = {"objective": objective, "history": history, "seed": seed}
    row |= {key: summary[key] for key in ("return_mean", "env_steps", "updates", "wall_s")}
    return row | {"steps_to_threshold": steps, "seconds_to_threshold": seconds}


def reached_at(record: Path, threshold: float) -> tuple[int, float] | tuple[None, None]:
    """Real step and wall-clock seconds at a run's first evaluation with at least that mean return; None if there is
    none.

    Args:
        record: the run's metrics.jsonl.
    """
    wall = 0.0
    for line in record.read_text().splitlines():
        values = json.loads(line)
        wall = values.get("time/wall") or wall
        value = values.get("evaluate/return_mean")
        if value is not None and value >= threshold:
            return values["step"], round(wall, 1)
    return None, None


def markdown(rows: Sequence[dict[str, Any]], threshold: float) -> str:
    """The comparison as two tables: one line per objective, over seeds, and one line per run."""
    to = [f"real steps to {threshold:g}", f"seconds to {threshold:g}"]
    over_seeds = [["objective", "history", "return, mean", "lowest", "runs that got there", *to, "seconds in all"]]
    for kind in dict.fromkeys((row["objective"], row["history"]) for row in rows):
        group = [row for row in rows if (row["objective"], row["history"]) == kind]
        hits = [row for row in group if row["steps_to_threshold"] is not None]
        returns = [row["return_mean"] for row in group]
        medians = [
            f"{statistics.median(row[key] for row in some):,.0f}" if some else "–"
            for key, some in (("steps_to_threshold", hits), ("seconds_to_threshold", hits), ("wall_s", group))
        ]
        reached = f"{len(hits)} of {len(group)}"
        over_seeds.append([*kind, f"{statistics.mean(returns):.3f}", f"{min(returns):.3f}", reached, *medians])
    runs = [["objective", "history", "seed", "return", *to, "real steps", "updates", "seconds in all"]]
    for row in rows:
        keys = ("steps_to_threshold", "seconds_to_threshold", "env_steps", "updates", "wall_s")
        numbers = ["–" if row[key] is None else f"{row[key]:,.0f}" for key in keys]
        runs.append([row["objective"], row["history"], str(row["seed"]), f"{row['return_mean']:.3f}", *numbers])
    between = "Steps and seconds are medians over runs. Each of them:"
    return "\n\n".join([trained.table(over_seeds), between, trained.table(runs)])
