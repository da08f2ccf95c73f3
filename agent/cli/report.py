"""What a run came to, for people: the dream beside reality, the table at the end, the demo."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.evaluation.comparison import Comparison, compare
from longdream.agent.evaluation.plots import film, save_film, save_picture, sheet, stack
from longdream.agent.evaluation.rollout import EVALUATION_SEED
from longdream.agent.run import folder as run
from longdream.agent.train import online as loop
from longdream.envs.contract import UserError
from longdream.envs.make import World

Device = Literal["auto", "cpu", "cuda"]


# -- dream against reality --------------------------------------------------------------------------------------------


def dream(
    run_folder: Path,
    episodes: int = 1,
    context: int = 4,
    frames: int = 400,
    seed: int = 0,
    temperature: float = 1.0,
    steps: int | None = None,
    fps: float | None = None,
    out: Path | None = None,
    device: Device | None = None,
    console: bool = True,
) -> dict[str, Any]:
    """Dream real episodes again, and show dream and reality side by side as a video and as a picture.

    The agent acts greedily in its environment. M is shown the first frames of the episode (framed in blue) and dreams
    on alone (framed in orange) under the actions that were really taken.

    Args:
        episodes: real episodes, one after another
        context: frames at the beginning of each that M is shown
        frames: of an episode, at most
        seed: other seeds, other episodes
        temperature: randomness of the dream, 1 as learned
        steps: denoising steps per frame (default: the run's forcing.steps). One gives the mean of what may come where
            latents are continuous, several draw one of the possible futures
        fps: frames per second (default: by the length of the episode)
        out: the video, .mp4 or .gif; the picture is put beside it (default: videos/dream.mp4 in the run)
        device: where to compute (default: as in the run)

    Returns:
        paths and settings and, per episode, what Comparison.to_json says.

    Raises:
        UserError: a value out of its range, no run, nothing saved in it yet, an episode shorter than the context.
    """
    least = {"episodes": (episodes, 1), "seed": (seed, 0), "temperature": (temperature, 0)}
    least |= {"steps": (steps, 1)} if steps is not None else {}
    for flag, (value, bound) in least.items():
        if value < bound:
            raise UserError(f"--{flag} {value}: must be at least {bound}")
    if fps is not None and not 0 < fps <= 120:
        raise UserError(f"--fps {fps:g}: must be more than 0 and at most 120")
    video = out or Path(run_folder) / "videos" / "dream.mp4"
    if video.suffix not in (".mp4", ".gif"):
        raise UserError(f"--out {video}: videos are written as .mp4 or .gif")
    agent, config, _, trained = run.load_agent(run_folder, device)
    env, comparisons = config.env, []
    for i in range(seed, seed + episodes):
        arguments = (env.id, 1, config.seed + EVALUATION_SEED + i, env.kwargs, env.workers, env.timeout_s)
        with closing(World(*arguments)) as world:
            comparisons.append(compare(agent, world, context, frames, i, temperature, steps))
    fps = fps or min(max(max(map(len, comparisons)) / 10, 2.0), 15.0)
    shown = f"{context} frames" if context > 1 else "1 frame"
    title = f"{env.id}   {shown} of reality, then a dream under the same actions"
    save_film(video, (picture for comparison in comparisons for picture in film(comparison, title)), fps)
    picture = video.with_suffix(".png")
    save_picture(picture, stack([sheet(comparison, title) for comparison in comparisons]))
    steps = steps or config.forcing.steps
    if console:
        for i, comparison in enumerate(comparisons):
            print(_sentence(i, comparison))
        if steps == 1:
            print("(One denoising step: continuous latents are then the mean of what may come; see --steps.)")
        print(f"video    {video}\npicture  {picture}")
    return {
        "run": str(run_folder),
        "env": env.id,
        "env_steps": trained,
        "seed": seed,
        "temperature": temperature,
        "denoising_steps": steps,
        "video": str(video),
        "picture": str(picture),
        "fps": fps,
        "episodes": [comparison.to_json() for comparison in comparisons],
    }


def _sentence(i: int, comparison: Comparison) -> str:
    dreamt = slice(comparison.context, None)
    parts = [f"episode {i}: {len(comparison)} frames, return {_number(comparison.reward.sum())}"]
    for key, spec in comparison.spec.obs.items():
        unit = {"image": "dB PSNR", "vector": "rms error", "discrete": "of it wrong"}[spec.kind]
        dream, alone = (f"{comparison.error(key, of)[dreamt].mean():.3g}" for of in ("dreamt", "kept"))
        parts.append(f"{key!r} dreamt at {dream} {unit} (V alone {alone})")
    expected, real = (_number(values[dreamt].sum()) for values in (comparison.expected, comparison.reward))
    return ", ".join([*parts, f"reward dreamt {expected}, real {real}"])


# -- the demo ---------------------------------------------------------------------------------------------------------


def demo(preset: str = "quickstart", name: str = "demo", seed: int = 0, device: Device | None = None) -> dict[str, Any]:
    """Train a preset from nothing, evaluate it, dream beside reality, and say in a table what came of it.

    Args:
        preset: what to train
        name: of the folder below runs/; NAME-2, NAME-3, ... where it is taken
        seed: of everything random
        device: where to compute (default: as in the preset)

    Returns:
        the summary of the run, and the paths of video and picture.

    Raises:
        UserError: no such preset, or a value that cannot be used. Otherwise as loop.train.
    """
    config = options.load(preset)
    config = dataclasses.replace(config, seed=seed, device=device or config.device)
    options.check(config)
    names = (name if i == 1 else f"{name}-{i}" for i in count(1))
    folder = run.unused(next(name for name in names if not (Path("runs") / name).exists()), preset, seed)
    print(f"training {preset} in {folder}: {options.presets().get(preset, config.env.id)}", file=sys.stderr)
    try:
        summary = loop.train(config, folder)
    except Exception as error:
        if folder.exists():
            error.add_note(f"go on with: longdream train --resume {folder}")
        raise
    print("dreaming beside reality", file=sys.stderr)
    made = dream(folder, console=False)
    summary = told(summary, config) | {key: made[key] for key in ("run", "video", "picture")}
    summary_table(summary)
    print(_next_steps(folder, preset))
    return summary


def told(summary: dict[str, Any], config: Config) -> dict[str, Any]:
    """The summary, and what can be said beyond it: chance and optimum where they are known."""
    with closing(World(config.env.id, 1, 0, config.env.kwargs)) as world:
        known = {key: getattr(world.vector, key, None) for key in ("chance", "optimum")}
    return known | summary


def _next_steps(folder: Path, preset: str) -> str:
    commands = {
        f"longdream dream {folder} --episodes 3 --seed 1": "more dreams beside reality",
        f"longdream train {preset} --worldmodel.mixer window": "the same without long memory: watch it fail",
        "longdream train cartpole": "another environment; --env takes yours, by id or module:Id",
    }
    wide = max(map(len, commands))
    lines = [f"  {command:{wide}}   {why}" for command, why in commands.items()]
    return "\n".join(["\nWhat to type next, after `source .venv/bin/activate`:", *lines])


# -- the table --------------------------------------------------------------------------------------------------------


REFERENCES = {
    "random": ("known: random", "uniform random actions, docs/memory-maze.md"),
    "human": ("known: human", "people, by Pasukonis et al. 2022"),
    "oracle": ("known: oracle", "the most that can be had, by Pasukonis et al. 2022"),
}
"""Label and remark of each mean return that is known of an environment."""


def summary_table(summary: dict[str, Any]) -> None:
    """Print what a summary.json says: a table where stdout is a terminal, plain lines elsewhere.

    It shows what it finds of the keys of summary.json and of `told`, and of run, video and picture (paths).
    """
    show_table(summary["env"], _rows(summary))


def show_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print (what, value, remark) line by line, the first one standing out where stdout is a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal or os.environ.get("TERM") == "dumb":
        print(title)
        first, second = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows if "/" not in row[1])
        for label, value, remark in rows:
            print(f"  {label:{first}}  {value:{second}}  {remark}".rstrip())
        return
    table = Table(title=f"[bold]{title}[/]", title_justify="left", show_header=False, border_style="bright_black")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", style="bold")
    table.add_column(style="bright_black")
    for i, (label, value, remark) in enumerate(rows):
        table.add_row(label, f"[green]{value}[/]" if i == 0 else value, remark)
    console.print(table)


def _rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, value, remark) of each line of the table."""
    low, high = map(_number, summary["return_ci95"])
    over = f"95% interval {low} to {high}, {summary['episodes']} real episodes, {summary.get('policy', 'greedy')}"
    rows = [("return", _number(summary["return_mean"]), over)]
    for key, label, remark in (
        ("optimum", "  optimum", "the most that can be had"),
        ("chance", "  chance", "the most that can be had without memory"),
        ("random_mean", "  random actions", ""),
        ("without_memory_mean", "  without long memory", "the same agent, M's scan states erased at every step"),
    ):
        if summary.get(key) is not None:
            rows.append((label, _number(summary[key]), remark))
    for key, value in summary.get("references", {}).items():
        rows.append((f"  {REFERENCES[key][0]}", _number(value), REFERENCES[key][1]))
    rows.append(("real steps", f"{summary['env_steps']:,}", ""))
    if summary.get("dream_steps"):
        rows.append(("dreamt steps", f"{summary['dream_steps']:,}", "C learned from these"))
    if "wall_s" in summary:
        minutes, seconds = divmod(round(summary["wall_s"]), 60)
        took = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
        rows.append(("time", took, f"{summary['updates']:,} updates" if "updates" in summary else ""))
    for key, label, remark in (
        ("run", "run", "metrics.jsonl, summary.json, checkpoints/, tensorboard/"),
        ("video", "video", "dream beside reality"),
        ("picture", "picture", "the same at one glance"),
    ):
        if summary.get(key):
            rows.append((label, str(summary[key]), remark))
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{round(float(value), 2) + 0.0:.2f}"  # + 0.0: no -0.00
