"""`longdream bench temperature`: the effect of a dream's temperature on the C that learns in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from longdream.agent.config.schema import Device
from longdream.agent.core.agent import Agent
from longdream.agent.core.device import own_randomness
from longdream.agent.data.replay import Replay
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.dream_env.starts import Moments, initial_moments, open_replay
from longdream.agent.evaluation.policy import play
from longdream.agent.evaluation.rollout import Returns
from longdream.agent.run.folder import load_agent
from longdream.envs.contract import UserError
from longdream.worldmodel.dream import imagine
from longdream.worldmodel.types import Batch

COPIES = 256
"""Number of dreams in parallel when a score is computed."""


def measure(
    run_folder: Path,
    temperatures: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    updates: int = 300,
    episodes: int = 100,
    steps: int = 4,
    horizon: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """Scores in dreams and in reality over the temperature of dreams, for one run.

    At each temperature a new C learns in the dreams of the run's V and M, which stay fixed; the dreams start from
    moments of its replay. C then plays greedily: complete dreams of that temperature from first frames of episodes, and
    complete real episodes. As in Ha and Schmidhuber (2018, arXiv 1803.10122), a C that learns in dreams without enough
    randomness may exploit M's errors; its score is then high in dreams and low in reality.

    With --updates 0, the run's own C is scored at each temperature.

    examples
      longdream bench temperature runs/quickstart-s0-1
      longdream bench temperature runs/quickstart-s0-1 --updates 0 --temperatures 0.5,1,2 --json

    Args:
        run_folder: folder of the run
        temperatures: temperatures of the dreams, each more than 0
        updates: updates of each new C; 0 for the run's own C
        episodes: number of dreams, and of real episodes, for each score
        steps: denoising steps per dreamt frame. With 1, temperature has no effect on continuous latents
        horizon: steps after which a dream is truncated (default: the length of the longest episode in the replay)
        seed: random seed of the new Cs, the dreams and the real episodes
        out: the picture (default: temperature.png in the run)
        device: where to compute (default: as in the run)

    Returns:
        rows: temperature, dream_mean, dream_ci95, real_mean, real_ci95, dream_length and real_length. horizon, picture.
    """
    if not temperatures or min(temperatures) <= 0 or min(episodes, steps) < 1 or updates < 0:
        raise UserError(
            f"--temperatures {temperatures}, --episodes {episodes}, --steps {steps}, --updates {updates}: temperatures "
            f"must be greater than 0, episodes and steps at least 1, updates not negative"
        )
    if horizon is not None and horizon < 1:
        raise UserError(f"--horizon {horizon}: must be at least 1")
    agent, run = load_agent(run_folder, device)
    config = agent.config
    replay = open_replay(run)
    horizon = horizon or replay.longest_episode()
    if not horizon:
        raise UserError(f"the replay in {replay.folder} holds no whole episode: say how long dreams are with --horizon")
    moments = initial_moments(agent, replay, episodes, seed)
    rows = []
    for temperature in temperatures:
        player = learned(agent, replay, temperature, steps, updates, seed) if updates else agent
        dreamt = dream_returns(player, moments, episodes, temperature, steps, horizon, seed)
        real = play(player, config.evaluation_env, episodes, seed, "agent", config.evaluate)
        row = {"temperature": temperature}
        for name, score in (("dream", dreamt), ("real", real)):
            row |= {f"{name}_mean": score.return_mean, f"{name}_ci95": list(score.return_ci95)}
            row |= {f"{name}_length": score.length_mean}
        rows.append(row)
        text = "temperature {temperature:g}: dream {dream_mean:.3f}, real {real_mean:.3f}"
        print(text.format(**row), file=sys.stderr)
    replay.close()
    picture = out or run_folder / "temperature.png"
    draw(rows, f"{config.env.id}   {'a C per temperature' if updates else 'one C'}, {episodes} episodes", picture)
    print(
        f"run {run_folder}: {updates} updates of C per temperature, {steps} denoising steps, dreams of up to {horizon}"
    )
    print("| temperature | dream score | 95% | real score | 95% |\n|---|---|---|---|---|")
    for row in rows:
        scores = (f"{row[f'{k}_mean']:.3f} | {_interval(row[f'{k}_ci95'])}" for k in ("dream", "real"))
        print(f"| {row['temperature']:g} | {' | '.join(scores)} |")
    print(f"picture  {picture}")
    settings = {"run": str(run_folder), "env": config.evaluation_env.id, "updates": updates, "denoising_steps": steps}
    return settings | {"episodes": episodes, "horizon": horizon, "seed": seed, "picture": str(picture), "rows": rows}


def _interval(ends: list[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def learned(agent: Agent, replay: Replay, temperature: float, steps: int, updates: int, seed: int) -> Agent:
    """The agent's V and M with a new C that has learned in their dreams at that temperature."""
    config = agent.config
    with own_randomness(seed, agent.device):
        fresh = Agent(config, agent.spec)
        fresh.model.load_state_dict(agent.model.state_dict())
        rng = np.random.default_rng(seed)
        learn = config.controller
        clips = config.replay
        for _ in range(updates):
            rows = replay.sample(rng, clips.batch, clips.length, clips.episode_start_fraction, clips.priority_fraction)
            with torch.no_grad():
                _, starts, _ = fresh.model.loss(Batch.of(rows, agent.device), learn.imagination_starts)
            policy = lambda feat: fresh.controller.act(feat, greedy=False)  # noqa: E731
            dream = imagine(fresh.model, starts, policy, learn.horizon, temperature, steps)
            fresh.optimizers["controller"].step(fresh.controller.loss(dream).value)
            fresh.controller.after_update()
    return fresh


@torch.no_grad()
def dream_returns(
    agent: Agent, moments: Moments, episodes: int, temperature: float, steps: int, horizon: int, seed: int
) -> Returns:
    """Returns of `episodes` complete dreams with greedy actions. Each copy plays the same number of dreams, so that
    short ones are not overrepresented."""
    copies = min(COPIES, episodes)
    env = DreamVecEnv(copies, agent, "feature", temperature, steps, horizon, moments)
    returns = []
    lengths = []
    for round in range(-(-episodes // copies)):
        total = np.zeros(copies)
        length = np.zeros(copies)
        alive = np.ones(copies, bool)
        feat, _ = env.reset(seed=seed + round)
        with own_randomness(seed + round, agent.device):
            while alive.any():
                action = agent.controller.act(torch.from_numpy(feat).to(agent.device), greedy=True)
                native = agent.spec.action.decode(action.clamp(-1, 1).cpu().numpy())
                feat, reward, terminated, truncated, _ = env.step(native)
                total += reward * alive
                length += alive
                alive &= ~(terminated | truncated)
        returns.append(total)
        lengths.append(length)
    return Returns.of(np.concatenate(returns)[:episodes], np.concatenate(lengths)[:episodes])


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot both scores with their confidence intervals over temperature."""
    figure = Figure(figsize=(7, 4.2), dpi=120)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, colour in (("dream", "#f0883e"), ("real", "#388bfd")):
        mean = np.array([row[f"{name}_mean"] for row in rows])
        low, high = np.array([row[f"{name}_ci95"] for row in rows]).T
        at = [row["temperature"] for row in rows]
        axes.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(at, mean, "o-", color=colour, label={"dream": "in the dream", "real": "in reality"}[name])
    axes.set_xlabel("temperature of the dream")
    axes.set_ylabel("mean return, 95% interval")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(path)
