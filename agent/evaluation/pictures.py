"""What an evaluation shows: a dream beside reality, V's reconstructions, surprise, and in Memory Maze the path.

They are for people who look at TensorBoard or `longdream watch`; nothing is learned or decided from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import imageio.v3 as iio
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from longdream.agent.config.schema import EnvConfig
from longdream.agent.core.agent import Agent
from longdream.agent.core.device import own_randomness
from longdream.agent.evaluation.comparison import Comparison, compare, steps_to_show
from longdream.agent.evaluation.plots import (
    BACKGROUND,
    CONTEXT,
    IMAGINED,
    MUTED,
    PANEL,
    TEXT,
    bars,
    beside,
    gif,
    hex_of,
    sheet,
)
from longdream.agent.evaluation.policy import WatchedWorld, make_world
from longdream.agent.evaluation.rollout import EVALUATION_SEED
from longdream.agent.run.logger import Drawn
from longdream.agent.run.signals import Signals
from longdream.envs.images import rgb

ROWS = 100
"""Rows of the episode that is dreamt again, at most."""
PATH_ROWS = 1000
"""Rows of the episode whose path is drawn, at most."""
SEEN = 4
"""Rows that M sees before it dreams."""
FPS = 8
RECONSTRUCTED = 8
"""Rows of which V's reconstruction is shown."""


@torch.no_grad()
def evaluation_pictures(
    agent: Agent, env: EnvConfig, seed: int, greedy: bool, signals: Signals | None = None
) -> dict[str, Drawn]:
    """Pictures by name of one more episode of an evaluation.

    The random streams of training are as they were afterwards. What the agent has compiled runs uncompiled: these
    shapes are others than those of training.

    Raises:
        EnvError: the environment failed. Interrupted: a signal was received.
    """
    steps = steps_to_show(agent.model.objective, agent.config.forcing.steps)
    seed += EVALUATION_SEED
    with closing(make_world(WatchedWorld, env, 1, seed, signals)) as world, torch.compiler.set_stance("force_eager"):
        world.signals = signals
        world.label = ""
        pictures = drawings(compare(agent, world, SEEN, ROWS, seed, steps=steps, greedy=greedy))
        if world.probes():
            pictures["path"] = still(path(*_walk(agent, world, seed, greedy)))
    return pictures


def drawings(comparison: Comparison) -> dict[str, Drawn]:
    """A comparison in pictures: `dream`, `reconstruction` of images, and `surprise` where it was measured."""
    pictures = {}
    if comparison.keys(image=True):
        pictures["dream"] = moving(_dream(comparison))
        pictures["reconstruction"] = still(_reconstruction(comparison))
    else:
        pictures["dream"] = still(sheet(comparison, "reality, and a dream of it under the same actions"))
    if comparison.surprise is not None:
        pictures["surprise"] = still(_surprise(comparison))
    return pictures


def still(picture: np.ndarray) -> Drawn:
    """A picture `(H, W, 3)` as a PNG."""
    return Drawn(iio.imwrite("<bytes>", picture, extension=".png"), *picture.shape[:2])


def moving(frames: Sequence[np.ndarray]) -> Drawn:
    """Frames `(H, W, 3)` of one size as a GIF that repeats."""
    return Drawn(gif(frames, FPS), *frames[0].shape[:2])


def _dream(comparison: Comparison) -> list[np.ndarray]:
    """Reality, what V keeps of it, and the dream: a frame per row."""
    key = comparison.keys(image=True)[0]
    views = [rgb(images[key]) for images in (comparison.real, comparison.kept, comparison.dreamt)]
    frames = []
    for t in range(len(comparison)):
        imagined = t >= comparison.context
        captions = ["reality", "through V", "dream" if imagined else "shown to M"]
        colours = [PANEL, PANEL, IMAGINED if imagined else CONTEXT]
        frames.append(beside([view[t] for view in views], captions, colours, 96))
    return frames


def _reconstruction(comparison: Comparison) -> np.ndarray:
    """Rows of the episode, evenly over it, above their reconstructions by V."""
    key = comparison.keys(image=True)[0]
    chosen = np.unique(np.linspace(0, len(comparison) - 1, RECONSTRUCTED).round().astype(int))
    real, kept = (rgb(images[key])[chosen] for images in (comparison.real, comparison.kept))
    error = comparison.error(key, "kept")
    pairs = [np.concatenate(pair) for pair in zip(real, kept, strict=True)]
    return beside(pairs, [f"{error[t]:.0f} dB" for t in chosen], [PANEL] * len(chosen), 192)


def _surprise(comparison: Comparison) -> np.ndarray:
    """The three parts of surprise over the rows, with the rewards that came."""
    assert comparison.surprise is not None
    names = ("latent", "reward", "end")
    lines = [(f"surprise, {name}", comparison.surprise[:, i], IMAGINED) for i, name in enumerate(names)]
    return bars([*lines, ("reward, its size", np.abs(comparison.reward), TEXT)])


@torch.no_grad()
def _walk(
    agent: Agent, world: WatchedWorld, seed: int, greedy: bool
) -> tuple[list[Mapping[str, np.ndarray]], np.ndarray]:
    """The probes of each row of an episode, and its rewards."""
    rewards = []
    probes = []
    with own_randomness(seed, agent.device):
        row = world.reset()
        carry = agent.initial(1)
        while True:
            probes.append(world.probes())
            rewards.append(float(row.reward[0]))
            if row.terminated[0] or row.truncated[0] or len(rewards) == PATH_ROWS:
                return probes, np.array(rewards)
            carry, _ = agent.observe(carry, row, measure=False)
            action = agent.act(carry, greedy)
            carry = agent.acted(carry, action)
            row = world.step(action)


def path(probes: Sequence[Mapping[str, np.ndarray]], reward: np.ndarray) -> np.ndarray:
    """The true map of a maze with the agent's path, coloured from early to late, the targets, and where rewards came.

    Args:
        probes: of each row (docs/memory-maze.md). reward: `(T,)`.
    """
    layout = probes[0]["maze_layout"]
    places = np.stack([row["agent_pos"] for row in probes])
    figure = Figure(figsize=(5.0, 5.2), dpi=80, facecolor=hex_of(BACKGROUND))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = len(layout)
    axes.set_facecolor(hex_of(PANEL))
    tones = ListedColormap([hex_of(PANEL), hex_of(BACKGROUND)])
    axes.imshow(layout, origin="lower", extent=(0, size, 0, size), cmap=tones, vmin=0, vmax=1)
    axes.scatter(*places.T, c=np.arange(len(places)), cmap="viridis", s=3, zorder=2)
    colours = {int(row["target_index"]): np.asarray(row["target_color"]) for row in probes}
    for i, place in enumerate(probes[0]["targets_pos"]):
        colour = colours.get(i, np.full(3, 0.55))
        axes.scatter(*place, color=np.clip(colour, 0, 1)[None], s=140, edgecolors=hex_of(TEXT), zorder=3)
    rewarded = places[np.flatnonzero(reward > 0)]
    if len(rewarded):
        axes.scatter(*rewarded.T, marker="*", s=60, color=hex_of(TEXT), zorder=4)
    axes.scatter(*places[0], marker="s", s=30, color=hex_of(CONTEXT), zorder=4)
    title = f"{len(probes) - 1} steps from the blue square, {int((reward > 0).sum())} rewards (stars)"
    axes.set_title(title, color=hex_of(MUTED), fontsize=9, loc="left")
    axes.set_xlim(-0.5, size + 0.5)
    axes.set_ylim(-0.5, size + 0.5)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.subplots_adjust(0.02, 0.02, 0.98, 0.94)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
