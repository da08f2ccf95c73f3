"""What a run's M remembers of a maze: the offline probes of the Memory Maze benchmark."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from longdream.agent.bench.trained import table
from longdream.agent.config.schema import Config, Device
from longdream.agent.core.actor import build_model
from longdream.agent.core.device import resolve_device
from longdream.agent.data.video.library import open_library
from longdream.agent.evaluation import probes
from longdream.agent.evaluation.probes import Episodes, Reading
from longdream.agent.run.folder import load_agent, open_run
from longdream.agent.train.video import load_model
from longdream.envs.contract import EnvSpec, UserError
from longdream.worldmodel.model import WorldModel

DRAWN = (10, 100, 250, 500, 1000)
"""Rows of an episode at which the map is drawn as it is read."""


def measure(
    run_folder: Path,
    data: Path | None = None,
    episodes: int | None = None,
    share: float = 0.1,
    updates: int = 10_000,
    supervised: int = 0,
    clips: int = 4,
    seed: int = 0,
    out: Path | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """What M's memory knows of a maze: probes of its walls and targets, by age of the episode.

    The protocol of Memory Maze's offline benchmark (Pasukonis et al. 2022, arXiv 2210.13383): from features of M that
    stay as they are, and the agent's pose, an MLP of 4 x 1,024 with LayerNorm and ELU tells the layout of the maze
    (accuracy over its cells) and the place of each target (error in cells), after every frame of episodes that neither
    was trained on. The paper has, on 9x9, for a constant answer 80.8% and 4.9 cells, for an RSSM 94.0% and 2.5, trained
    end to end 99.7% and 0.5.

    Features of a constant answer, of V alone, of M with its scans erased at every step, and of M are compared. For runs
    of agents and on video. The probe of an agent's M stays in its run, and `longdream play` shows what it reads.

    examples
      longdream collect --env longdream/FastMemoryMaze-9x9-v0 --out mazes --episodes 400
      longdream bench probe runs/memory-maze-9x9-s0-1 --data mazes
      longdream bench probe runs/memory-maze-9x9-s0-1 --data mazes --supervised 5000 --json

    Args:
        run_folder: of the run, or the name of an agent that comes with the program
        data: folder of recorded episodes of Memory Maze: NPZ files of `longdream collect`, or of the published set
        episodes: of the recordings, in the order of their names (default: all)
        share: of them that the probes are tested on
        updates: of each probe, of 1,024 rows
        supervised: updates of V, M and probes trained together from nothing, on whole episodes; 0: without that row
        clips: episodes in each of these updates
        seed: of the probes
        out: the picture (default: probe.png in the run)
        device: where to compute (default: as in the run)

    Returns:
        rows: size, mixer, seed (of the probes), features ("constant", "V", "M erased", "M" or "supervised"), age (a
        range of steps; the last is the whole episode), walls_accuracy in percent and objects_error in cells.
        since_seen: objects_error by steps since the target was in view, for each kind of features. episodes: trained
        and tested on. picture.

    Raises:
        UserError: no run, no recordings with probes, or recordings that do not fit the run.
    """
    if data is None:
        raise UserError("bench probe needs --data DIR: episodes, as `longdream collect` records them")
    for flag, value, least in (("episodes", episodes, 2), ("updates", updates, 1), ("supervised", supervised, 0)):
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    if not 0 < share < 1:
        raise UserError(f"--share {share}: must be between 0 and 1")
    model, config, spec = _opened(run_folder, device)
    key, side = _images(spec, run_folder)
    library = open_library(data, "memory-maze", config.video.condition if config.kind == "video" else "actions")
    library = replace(library, recordings=library.recordings[:episodes])
    train, test = (probes.read(library, some, side) for some in library.held_out(share))
    if train.prev_action.shape[-1] != spec.action.size:
        raise UserError(f"{data} holds {train.prev_action.shape[-1]} actions, {run_folder} knows {spec.action.size}")
    readings = {"constant": probes.constant(train, test)}
    known = {name: _features(model, some, key, name) for name, some in (("train", train), ("test", test))}
    for name in ("V", "M erased", "M"):
        _say(f"training the probes of {name}: {updates:,} updates")
        probe = probes.fit(train, known["train"][name], updates, seed)
        readings[name] = probes.reading_of(probe, test, known["test"][name])
        if name == "M" and config.kind != "video":
            run = open_run(run_folder)
            saved = probes.save(run.folder, probe.cpu(), run.saved[1])
            _say(f"{saved}: longdream play {run_folder} shows what it reads")
    if supervised:
        _say(f"training V, M and probes together: {supervised:,} updates")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = build_model(config, spec).to(next(model.parameters()).device)
        readings["supervised"] = probes.supervised(fresh, train, test, key, supervised, clips, seed)
    about = {"size": f"{train.size}x{train.size}", "mixer": config.worldmodel.mixer, "seed": seed}
    rows = [about | {"features": name} | line for name, r in readings.items() for line in probes.score(test, r)]
    since = [about | {"features": name} | line for name, r in readings.items() for line in probes.score_since(test, r)]
    picture = _draw(test, readings, out or open_run(run_folder).folder / "probe.png")
    _print(rows, since)
    print(f"picture  {picture}")
    counts = {"train": len(train.pose), "test": len(test.pose)}
    return {"rows": rows, "since_seen": since, "episodes": counts, "picture": str(picture)}


def _opened(run_folder: Path, device: Device | None) -> tuple[WorldModel, Config, EnvSpec]:
    """V and M of a run of any kind."""
    if open_run(run_folder).config.kind == "video":
        model, config, spec, _ = load_model(run_folder, device)
    else:
        agent, run = load_agent(run_folder, device)
        model = agent.model
        config = agent.config
        spec = run.spec
    return model.to(resolve_device(config.device)), config, spec


def _images(spec: EnvSpec, run_folder: Path) -> tuple[str, int]:
    """The key and the side of the images that V sees."""
    images = {key: obs for key, obs in spec.obs.items() if obs.kind == "image"}
    if len(spec.obs) != 1 or not images:
        raise UserError(f"{run_folder} observes {', '.join(spec.obs)}: probes are of agents that see images alone")
    key, obs = next(iter(images.items()))
    return key, obs.shape[0]


def _features(model: WorldModel, episodes: Episodes, key: str, name: str) -> dict[str, torch.Tensor]:
    """Features of every row by what they are of."""
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        if time.monotonic() - began > 5:
            _say(f"M watches the episodes to {name} on: {done:,} of {total:,} rows")

    whole = probes.features(model, episodes, key, progress=progress)
    erased = probes.features(model, episodes, key, erased=True, progress=progress)
    return {"V": whole["V"], "M": whole["M"], "M erased": erased["M"]}


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print(rows: list[dict[str, Any]], since: list[dict[str, Any]]) -> None:
    ages = list(dict.fromkeys(row["age"] for row in rows))
    names = list(dict.fromkeys(row["features"] for row in rows))
    for key, title in (("walls_accuracy", "walls, % of cells right"), ("objects_error", "targets, error in cells")):
        cells = [[title, *ages[:-1], "all"]]
        for name in names:
            cells.append([name, *(f"{row[key]:.1f}" for row in rows if row["features"] == name)])
        print(table(cells) + "\n")
    bins = list(dict.fromkeys(row["since_seen"] for row in since))
    cells = [["targets by steps since seen", *bins]]
    for name in names:
        errors = {row["since_seen"]: row["objects_error"] for row in since if row["features"] == name}
        cells.append([name, *(f"{errors[b]:.1f}" if b in errors else "-" for b in bins)])
    print(table(cells) + "\n")


def _draw(test: Episodes, readings: dict[str, Reading], path: Path) -> Path:
    """Draw the first held-out episode's map as the probes read it over time, beside the true one."""
    names = [name for name in readings if name != "constant"]
    length = test.pose.shape[1]
    times = [t for t in DRAWN if t < length] or [length - 1]
    figure = Figure(figsize=(1.7 * (len(times) + 1), 1.75 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(times) + 1, squeeze=False)
    for name, line in zip(names, axes, strict=True):
        _map(line[0], test.walls[0], test.targets[0], test.pose[0, 0], test.size)
        line[0].set_ylabel(name)
        for t, axis in zip(times, line[1:], strict=True):
            _map(axis, readings[name].walls[0, t], readings[name].places[0, t], test.pose[0, t], test.size)
        if name == names[0]:
            for title, axis in zip(["truth", *(f"after {t}" for t in times)], line, strict=True):
                axis.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _map(axis: Any, walls: np.ndarray, targets: np.ndarray, pose: np.ndarray, size: int) -> None:
    """A map, y upwards: walls dark, targets as dots, the agent as an arrow."""
    axis.imshow(1 - walls, cmap="gray", vmin=0, vmax=1, origin="lower", extent=(0, size, 0, size))
    axis.scatter(*targets.T, c=range(len(targets)), cmap="tab10", vmin=0, vmax=9, s=30)
    (x, y), (dx, dy) = (pose[:2] + 1) * size / 2, pose[2:]
    axis.arrow(x, y, dx, dy, width=0.12, color="tab:red")
    axis.set(xticks=[], yticks=[], xlim=(0, size), ylim=(0, size))
