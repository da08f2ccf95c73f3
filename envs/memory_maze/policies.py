"""Scripted policies for Memory Maze, real or twin: they are told what a player has to remember (the probes).

A policy sees the probes of n copies, stacked as vector environments stack them in their `info` (docs/memory-maze.md),
and answers with n actions. It needs `maze_layout`, `agent_pos`, `agent_dir`, `targets_pos` and `target_index` alone.
All copies begin and end their episodes together, as all episodes of a size are equally long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Probes = Mapping[str, np.ndarray]

NOOP, FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(6)
TURN = np.deg2rad(18.4)
"""What one step of turning turns in the end: measured on the real environment, at 4 steps per second."""
AFTER = np.deg2rad(2.9)
"""The part of it that only shows in the step after."""
CLEARANCE = 0.12
"""Cells that a straight way keeps from walls: a little more than the ball's radius, 0.1."""
LOOK_AHEAD = 12
"""Cells of the shortest path among which the farthest visible one is aimed at."""


class Policy(Protocol):
    """Acts in n copies at once."""

    def reset(self, n: int) -> None:
        """New episodes begin in all n copies."""
        ...

    def act(self, probes: Probes) -> np.ndarray:
        """Probes (n, ...) -> actions (n,) int64."""
        ...


class Random:
    """Uniform random actions, of Memory Maze or of whatever else has n of them."""

    def __init__(self, rng: np.random.Generator, actions: int = 6) -> None:
        self.rng, self.actions, self.n = rng, actions, 0

    def reset(self, n: int) -> None:
        self.n = n

    def act(self, probes: Probes) -> np.ndarray:
        return self.rng.integers(self.actions, size=self.n)


class Oracle:
    """Knows maze and targets: takes the shortest way to the prompted one, cutting corners where it can."""

    def __init__(self) -> None:
        self.pilot = Pilot()

    def reset(self, n: int) -> None:
        self.pilot.reset(n)

    def act(self, probes: Probes) -> np.ndarray:
        prompted = probes["targets_pos"][np.arange(len(probes["target_index"])), probes["target_index"]]
        return self.pilot.act(probes, prompted)


class Navigator:
    """The policy of the published offline data as its authors describe it: goes to points chosen at random in the
    maze, under noise in its actions, and collects no rewards but by chance.

    What they leave open is chosen here: a point is the middle of a uniformly drawn free cell, another is drawn once it
    is closer than half a cell or after as many steps as twice the way should take, and each action is replaced by a
    uniform random one with probability `noise`.
    """

    def __init__(self, rng: np.random.Generator, noise: float = 0.2) -> None:
        self.rng, self.noise, self.pilot = rng, noise, Pilot()

    def reset(self, n: int) -> None:
        self.pilot.reset(n)
        self.goal, self.patience = np.full((n, 2), np.nan), np.zeros(n)

    def act(self, probes: Probes) -> np.ndarray:
        here, layout = probes["agent_pos"], probes["maze_layout"]
        there = np.hypot(*(self.goal - here).T) < 0.5
        for i in np.flatnonzero(there | (self.patience <= 0)):
            free = np.argwhere(layout[i])  # rows of (y, x)
            self.goal[i] = free[self.rng.integers(len(free))][::-1] + 0.5
            way = distances(layout[i : i + 1], self.goal[i : i + 1])[0][tuple(cells(here, layout)[i][::-1])]
            self.patience[i] = 20 + 2 * 4 * way  # about four steps a cell
        self.patience -= 1
        action = self.pilot.act(probes, self.goal)
        noisy = self.rng.random(len(action)) < self.noise
        return np.where(noisy, self.rng.integers(6, size=len(action)), action)


class Pilot:
    """Steers n agents to goals along shortest paths, with the six actions and the body's inertia."""

    def reset(self, n: int) -> None:
        self.turning = np.zeros(n)  # of the action before: 1 left, -1 right
        self.goal = np.full((n, 2), np.nan)
        self.distance: np.ndarray | None = None

    def act(self, probes: Probes, goal: np.ndarray) -> np.ndarray:
        """Actions (n,) that bring the agents of `probes` closer to `goal`, (n, 2) in cells."""
        layout, here, ahead = probes["maze_layout"], probes["agent_pos"], probes["agent_dir"]
        if self.distance is None:
            self.distance = np.zeros(layout.shape)
        new = np.flatnonzero((self.goal != goal).any(1))
        if len(new):
            self.goal[new] = goal[new]
            self.distance[new] = distances(layout[new], goal[new])
        way = aim(layout, self.distance, here, goal) - here
        heading = np.arctan2(ahead[:, 1], ahead[:, 0]) + AFTER * self.turning
        error = (np.arctan2(way[:, 1], way[:, 0]) - heading + np.pi) % (2 * np.pi) - np.pi
        self.turning = np.where(np.abs(error) > TURN / 2, np.sign(error), 0.0)
        going = np.abs(error) < np.deg2rad(np.where(np.hypot(*way.T) < 0.6, 40, 60))
        moving = np.array([FORWARD, FORWARD_LEFT, FORWARD_RIGHT])  # indexed by 0, 1, -1
        standing = np.array([NOOP, LEFT, RIGHT])
        turning = self.turning.astype(np.int64)
        return np.where(going, moving[turning], standing[turning])


def cells(places: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """The cells (x, y) that places (..., 2) lie in, int64; none lies outside."""
    return np.clip(np.floor(places).astype(np.int64), 0, layout.shape[-1] - 1)


def distances(layout: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Steps from every cell to the goal's, through free cells and their four sides.

    Args:
        layout: (n, S, S), 1 = free, indexed [y, x].
        goal: (n, 2), (x, y) in cells.

    Returns:
        (n, S, S) float64; infinite for walls and where no way leads.
    """
    n, size, _ = layout.shape
    wide = np.full((n, size + 2, size + 2), np.inf)
    x, y = cells(goal, layout).T
    wide[np.arange(n), y + 1, x + 1] = 0
    inner = wide[:, 1:-1, 1:-1]
    while True:
        sides = (wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:])
        nearer = np.where(layout, np.minimum(inner, np.minimum.reduce(sides) + 1), np.inf)
        nearer[np.arange(n), y, x] = 0
        if np.array_equal(nearer, inner):
            return nearer
        inner[:] = nearer


def aim(layout: np.ndarray, distance: np.ndarray, here: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Where to go straight: the goal, if it can be seen, or the farthest visible cell of the shortest path to it.

    Args:
        layout, distance: (n, S, S), as `distances` takes and returns them.
        here, goal: (n, 2), (x, y) in cells.

    Returns:
        (n, 2), a place.
    """
    every = np.arange(len(layout))
    wide = np.pad(distance, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)
    steps = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
    at, best = cells(here, layout), None
    for ahead in range(LOOK_AHEAD):
        around = at[:, None] + steps
        choice = wide[every[:, None], around[..., 1] + 1, around[..., 0] + 1].argmin(1)
        at = around[every, choice]
        arrived = distance[every, at[:, 1], at[:, 0]] == 0
        place = np.where(arrived[:, None], goal, at + 0.5)
        # the next cell is always worth going to: the agent may stand too close to a wall to see it
        best = place if best is None else np.where(visible(layout, here, place)[:, None], place, best)
        if arrived.all() and ahead:
            break
    return best if best is not None else goal


def visible(layout: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether a ball of radius CLEARANCE rolls straight from a to b, both (n, 2): (n,) bool."""
    n, size, _ = layout.shape
    along = b - a
    length = np.hypot(*along.T)[:, None]
    aside = np.stack([-along[:, 1], along[:, 0]], 1) / np.maximum(length, 1e-9) * CLEARANCE
    share = np.linspace(0, 1, 4 * size)[:, None]
    line = a[:, None] + share * along[:, None]  # (n, points, 2)
    points = np.concatenate([line - aside[:, None], line + aside[:, None]], axis=1)
    inside = ((points >= 0) & (points < size)).all(2)
    x, y = np.moveaxis(cells(points, layout), 2, 0)
    return (inside & (layout[np.arange(n)[:, None], y, x] > 0)).all(1)
