"""`longdream dream` and `longdream demo`: a dream beside reality; training, evaluation and a dream in one command."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longdream.envs.contract import UserError
from longdream.envs.make import World

# what brings torch and matplotlib is imported in the functions, so that --help is quick
if TYPE_CHECKING:
    from longdream.agent.config.schema import Config
    from longdream.agent.evaluation.comparison import Comparison

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

    The agent plays greedily in its environment. M receives the first frames of the episode (framed in blue) and then
    dreams (framed in orange) under the actions that were taken in reality.

    Args:
        episodes: number of real episodes
        context: frames at the start of each episode that M receives; of a shorter episode, all but the last
        frames: maximum number of frames of an episode
        seed: selects the episodes
        temperature: randomness of the dream; 1 as learned
        steps: denoising steps per frame (default: 4, or the run's forcing.steps if that is more). With continuous
            latents, one step gives the mean of the possible futures; several steps sample one of them
        fps: frames per second (default: chosen by the length of the episodes)
        out: the video, .mp4 or .gif; the picture is written beside it (default: videos/dream.mp4 in the run, then
            dream-2.mp4, ...)
        device: where to compute (default: as in the run)

    Returns:
        paths, settings, and for each episode the result of Comparison.to_json.

    Raises:
        UserError: a value is out of its range, there is no such run, or nothing has been saved in it yet.
    """
    from longdream.agent.evaluation.comparison import compare, steps_to_show
    from longdream.agent.evaluation.plots import film, save_film, save_picture, sheet, stack
    from longdream.agent.evaluation.policy import check_fit
    from longdream.agent.evaluation.rollout import EVALUATION_SEED
    from longdream.agent.run.files import check_own_path
    from longdream.agent.run.folder import load_agent

    least = {"episodes": (episodes, 1), "seed": (seed, 0), "temperature": (temperature, 0)}
    least |= {"steps": (steps, 1)} if steps is not None else {}
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise UserError(f"--{flag} {value}: must be at least {minimum}")
    if fps is not None and not 0 < fps <= 120:
        raise UserError(f"--fps {fps:g}: must be more than 0 and at most 120")
    video = out or _unused(Path(run_folder) / "videos")
    if video.suffix not in (".mp4", ".gif"):
        raise UserError(f"--out {video}: videos are written as .mp4 or .gif")
    replaced = video.exists()
    if out is None:
        check_own_path(run_folder, video)
    agent, run = load_agent(run_folder, device)
    config = agent.config
    steps = steps or steps_to_show(agent.model.objective, config.forcing.steps)
    env = config.env
    comparisons = []
    for i in range(seed, seed + episodes):
        arguments = (env.id, 1, config.seed + EVALUATION_SEED + i, env.kwargs, env.mode, env.timeout_s)
        with closing(World(*arguments)) as world:
            check_fit(world, agent.spec)
            comparisons.append(compare(agent, world, context, frames, i, temperature, steps))
    fps = fps or min(max(max(map(len, comparisons)) / 10, 2.0), 15.0)
    titles = [_title(env.id, comparison) for comparison in comparisons]
    pairs = list(zip(comparisons, titles, strict=True))
    save_film(video, (picture for comparison, title in pairs for picture in film(comparison, title)), fps)
    picture = video.with_suffix(".png")
    save_picture(picture, stack([sheet(comparison, title) for comparison, title in pairs]))
    if console:
        for i, comparison in enumerate(comparisons):
            print(_sentence(i, comparison, context))
        print(f"video    {video}{' (replaced)' if replaced else ''}\npicture  {picture}")
    return {
        "run": str(run_folder),
        "env": env.id,
        "env_steps": run.saved[1],
        "seed": seed,
        "temperature": temperature,
        "denoising_steps": steps,
        "video": str(video),
        "picture": str(picture),
        "fps": fps,
        "episodes": [comparison.to_json() for comparison in comparisons],
    }


def _unused(folder: Path) -> Path:
    """The first of dream.mp4, dream-2.mp4, ... in the folder that is not there; .gif where mp4 cannot be written."""
    from longdream.agent.evaluation.plots import film_path

    names = (film_path(folder / ("dream.mp4" if i == 1 else f"dream-{i}.mp4")) for i in count(1))
    return next(name for name in names if not name.exists() and not name.with_suffix(".png").exists())


def _title(env: str, comparison: Comparison) -> str:
    shown = f"{comparison.context} frames" if comparison.context > 1 else "1 frame"
    return f"{env}   {shown} of reality, then a dream under the same actions"


def _sentence(i: int, comparison: Comparison, context: int) -> str:
    from longdream.agent.evaluation.tables import number

    dreamt = slice(comparison.context, None)
    parts = [f"episode {i}: {len(comparison)} frames, return {number(comparison.reward.sum())}"]
    if comparison.context < context:
        parts.append(f"so short that M is shown {comparison.context} in place of {context}")
    for key, spec in comparison.spec.obs.items():
        dream = comparison.error(key, "dreamt")[dreamt].mean()
        alone = comparison.error(key, "kept")[dreamt].mean()
        if spec.kind in ("image", "vector"):
            unit = "dB PSNR" if spec.kind == "image" else "rms error"
            parts.append(f"{key!r} dreamt at {dream:.3g} {unit} (V alone {alone:.3g})")
        else:
            parts.append(f"{key!r} dreamt wrongly in {dream:.0%} (V alone {alone:.0%})")
    expected = number(comparison.expected[dreamt].sum())
    real = number(comparison.reward[dreamt].sum())
    return ", ".join([*parts, f"reward dreamt {expected}, real {real}"])


# -- the demo ---------------------------------------------------------------------------------------------------------


def demo(preset: str = "quickstart", name: str = "demo", seed: int = 0, device: Device | None = None) -> dict[str, Any]:
    """Train a preset from scratch, evaluate it, show a dream beside reality, and print the results in a table.

    Args:
        preset: the preset to train
        name: name of the folder below runs/; if it exists, NAME-2, NAME-3, ...
        seed: random seed
        device: where to compute (default: as in the preset)

    Returns:
        the summary of the run, and the paths of video and picture.

    Raises:
        UserError: there is no such preset, or a value cannot be used. Other errors as in Trainer.train.
    """
    from longdream.agent.config import options
    from longdream.agent.config.checks import check
    from longdream.agent.evaluation.tables import summary_table
    from longdream.agent.run.folder import claim, unused
    from longdream.agent.train.trainer import OnlineTrainer

    config = options.load(preset)
    config = dataclasses.replace(config, seed=seed, device=device or config.device)
    check(config)

    def choose() -> Path:
        names = (name if i == 1 else f"{name}-{i}" for i in count(1))
        return unused(next(name for name in names if not (Path("runs") / name).exists()), preset, seed)

    def start(folder: Path) -> tuple[Path, dict[str, Any]]:
        print(f"training {preset} in {folder}: {options.presets().get(preset, config.env.id)}", file=sys.stderr)
        try:
            return folder, OnlineTrainer.train(config, folder)
        except Exception as error:
            if folder.exists() and not isinstance(error, UserError):
                error.add_note(f"go on with: longdream train --resume {folder}")
            raise

    folder, summary = claim(choose, start, fixed=False)
    print("dreaming beside reality", file=sys.stderr)
    result = dream(folder, console=False)
    summary = with_bounds(summary, config) | {key: result[key] for key in ("run", "video", "picture")}
    summary_table(summary)
    print(_next_steps(folder, preset))
    return summary


def with_bounds(summary: dict[str, Any], config: Config) -> dict[str, Any]:
    """The summary with the returns `chance` and `optimum`; None where the environment does not state them."""
    with closing(World(config.env.id, 1, 0, config.env.kwargs)) as world:
        bounds = {key: getattr(world.vector, key, None) for key in ("chance", "optimum")}
    return bounds | summary


def _next_steps(folder: Path, preset: str) -> str:
    commands = {
        f"longdream dream {folder} --episodes 3 --seed 1": "more dreams beside reality",
        f"longdream train {preset} --worldmodel.mixer window": "the same without long memory: watch it fail",
        "longdream train cartpole": "another environment; --env takes yours, by id or module:Id",
    }
    width = max(map(len, commands))
    lines = [f"  {command:{width}}   {purpose}" for command, purpose in commands.items()]
    return "\n".join(["\nWhat to type next, after `source .venv/bin/activate`:", *lines])
