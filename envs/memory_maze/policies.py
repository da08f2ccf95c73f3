"""Scripted policies for Memory Maze, original or fast. They observe the probes: the maze, the agent and the targets.

A policy maps the probes of n copies to n actions. The probes are stacked as in the `info` of a vector environment
(docs/memory-maze.md). A policy uses only `maze_layout`, `agent_pos`, `agent_dir`, `targets_pos` and `target_index`. All
copies must begin and end their episodes together; all episodes of a size have the same length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Probes = Mapping[str, np.ndarray]

NOOP, FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(6)
TURN = np.deg2rad(18.4)
"""Total rotation caused by one turning action (radians), measured in the original at 4 steps per second."""
TURN_DELAYED = np.deg2rad(2.9)
"""The part of TURN that takes effect only in the next step, because of the body's inertia."""
CLEARANCE = 0.12
"""Distance that a straight line keeps from walls, in cells: slightly more than the ball's radius, 0.1."""
LOOK_AHEAD = 12
"""Number of cells of the shortest path that `aim` considers."""


class Policy(Protocol):
    """A policy that acts in n copies at once."""

    def reset(self, n: int) -> None:
        """Start new episodes in all n copies."""
        ...

    def act(self, probes: Probes) -> np.ndarray:
        """Choose the actions, (n,) int64, for these probes (n, ...)."""
        ...


class Random:
    """Draws uniform random actions. `actions` is their number, so it also works in other environments."""

    def __init__(self, rng: np.random.Generator, actions: int = 6) -> None:
        self.rng = rng
        self.actions = actions
        self.n = 0

    def reset(self, n: int) -> None:
        self.n = n

    def act(self, probes: Probes) -> np.ndarray:
        return self.rng.integers(self.actions, size=self.n)


class Oracle:
    """Follows the shortest path to the prompted target, and takes straight lines where no wall is in the way."""

    def __init__(self) -> None:
        self.follower = PathFollower()

    def reset(self, n: int) -> None:
        self.follower.reset(n)

    def act(self, probes: Probes) -> np.ndarray:
        prompted = probes["targets_pos"][np.arange(len(probes["target_index"])), probes["target_index"]]
        return self.follower.act(probes, prompted)


class Navigator:
    """Navigates to random points of the maze, with noise in its actions; it reaches targets only by chance.

    This is the policy of the published offline data, as far as its authors describe it. Our choices for the rest: a
    goal is the centre of a uniformly drawn free cell. A new goal is drawn when the agent is closer than half a cell, or
    after about twice the steps that the path should take. Each action is replaced by a uniform random action with
    probability `noise`.
    """

    def __init__(self, rng: np.random.Generator, noise: float = 0.2) -> None:
        self.rng = rng
        self.noise = noise
        self.follower = PathFollower()

    def reset(self, n: int) -> None:
        self.follower.reset(n)
        self.goal = np.full((n, 2), np.nan)
        self.steps_left = np.zeros(n)

    def act(self, probes: Probes) -> np.ndarray:
        position = probes["agent_pos"]
        layout = probes["maze_layout"]
        arrived = np.hypot(*(self.goal - position).T) < 0.5
        for i in np.flatnonzero(arrived | (self.steps_left <= 0)):
            free = np.argwhere(layout[i])  # rows of (y, x)
            self.goal[i] = free[self.rng.integers(len(free))][::-1] + 0.5
            cell = tuple(cells(position, layout)[i][::-1])
            path_length = distances(layout[i : i + 1], self.goal[i : i + 1])[0][cell]
            self.steps_left[i] = 20 + 2 * 4 * path_length  # a cell takes about four steps
        self.steps_left -= 1
        action = self.follower.act(probes, self.goal)
        replaced = self.rng.random(len(action)) < self.noise
        return np.where(replaced, self.rng.integers(6, size=len(action)), action)


class PathFollower:
    """Steers n agents to goals along shortest paths. It takes the body's inertia into account."""

    def reset(self, n: int) -> None:
        self.turning = np.zeros(n)  # direction of the previous action: 1 left, -1 right, 0 neither
        self.goal = np.full((n, 2), np.nan)
        self.distance: np.ndarray | None = None

    def act(self, probes: Probes, goal: np.ndarray) -> np.ndarray:
        """Actions (n,) that move the agents towards `goal`, (n, 2) in cells."""
        layout = probes["maze_layout"]
        position = probes["agent_pos"]
        direction = probes["agent_dir"]
        if self.distance is None:
            self.distance = np.zeros(layout.shape)
        new = np.flatnonzero((self.goal != goal).any(1))
        if len(new):
            self.goal[new] = goal[new]
            self.distance[new] = distances(layout[new], goal[new])
        offset = aim(layout, self.distance, position, goal) - position
        heading = np.arctan2(direction[:, 1], direction[:, 0]) + TURN_DELAYED * self.turning
        error = (np.arctan2(offset[:, 1], offset[:, 0]) - heading + np.pi) % (2 * np.pi) - np.pi
        self.turning = np.where(np.abs(error) > TURN / 2, np.sign(error), 0.0)
        forward = np.abs(error) < np.deg2rad(np.where(np.hypot(*offset.T) < 0.6, 40, 60))
        with_forward = np.array([FORWARD, FORWARD_LEFT, FORWARD_RIGHT])  # indexed by 0, 1, -1
        without_forward = np.array([NOOP, LEFT, RIGHT])
        turning = self.turning.astype(np.int64)
        return np.where(forward, with_forward[turning], without_forward[turning])


def cells(points: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """The cells (x, y) that contain the points (..., 2), int64, clipped to the maze."""
    return np.clip(np.floor(points).astype(np.int64), 0, layout.shape[-1] - 1)


def distances(layout: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Length of the shortest path from every cell to the goal's cell, through free cells with four neighbours each.

    Args:
        layout: (n, S, S), 1 = free, indexed [y, x].
        goal: (n, 2), (x, y) in cells.

    Returns:
        (n, S, S) float64; infinite for walls and for cells without a path to the goal.
    """
    n, size, _ = layout.shape
    padded = np.full((n, size + 2, size + 2), np.inf)
    x, y = cells(goal, layout).T
    padded[np.arange(n), y + 1, x + 1] = 0
    inner = padded[:, 1:-1, 1:-1]
    while True:
        neighbours = (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
        updated = np.where(layout, np.minimum(inner, np.minimum.reduce(neighbours) + 1), np.inf)
        updated[np.arange(n), y, x] = 0
        if np.array_equal(updated, inner):
            return updated
        inner[:] = updated


def aim(layout: np.ndarray, distance: np.ndarray, position: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The point to head for: the goal if it is visible, else the farthest visible cell of the shortest path to it.

    Args:
        layout, distance: (n, S, S), as `distances` takes and returns them.
        position, goal: (n, 2), (x, y) in cells.

    Returns:
        (n, 2), (x, y) in cells.
    """
    copies = np.arange(len(layout))
    padded = np.pad(distance, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)
    moves = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
    cell = cells(position, layout)
    best = None
    for ahead in range(LOOK_AHEAD):
        reachable = cell[:, None] + moves
        choice = padded[copies[:, None], reachable[..., 1] + 1, reachable[..., 0] + 1].argmin(1)
        cell = reachable[copies, choice]
        arrived = distance[copies, cell[:, 1], cell[:, 0]] == 0
        point = np.where(arrived[:, None], goal, cell + 0.5)
        # the next cell is always accepted: an agent that is too close to a wall sees no cell
        best = point if best is None else np.where(visible(layout, position, point)[:, None], point, best)
        if arrived.all() and ahead:
            break
    return best if best is not None else goal


def visible(layout: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether a ball of radius CLEARANCE can roll in a straight line from a to b, both (n, 2): (n,) bool."""
    n, size, _ = layout.shape
    along = b - a
    length = np.hypot(*along.T)[:, None]
    aside = np.stack([-along[:, 1], along[:, 0]], 1) / np.maximum(length, 1e-9) * CLEARANCE
    fraction = np.linspace(0, 1, 4 * size)[:, None]
    line = a[:, None] + fraction * along[:, None]  # (n, points, 2)
    points = np.concatenate([line - aside[:, None], line + aside[:, None]], axis=1)
    inside = ((points >= 0) & (points < size)).all(2)
    x, y = np.moveaxis(cells(points, layout), 2, 0)
    return (inside & (layout[np.arange(n)[:, None], y, x] > 0)).all(1)
