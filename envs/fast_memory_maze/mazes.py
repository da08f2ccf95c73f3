"""Initial states of episodes: mazes from labmaze's generator, under the rules of the original Memory Maze."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import labmaze
import numpy as np

from longdream.envs.fast_memory_maze.scene import WALL
from longdream.envs.fast_memory_maze.textures import CORRIDOR, ROOM, WALLS
from longdream.envs.memory_maze.sizes import SIZES

COLOURS = np.array(
    [(170, 38, 30), (99, 170, 88), (39, 140, 217), (93, 105, 199), (220, 193, 59), (220, 128, 107)]
) / np.float64(220)
"""Colours of targets, 0 to 1: red, green, blue, purple, yellow, salmon."""
BLOCKS = 3  # the walls are divided into BLOCKS x BLOCKS blocks, each with its own texture
KEY_BITS = 31


@dataclass(frozen=True)
class Episode:
    """The initial state of an episode with K targets. N = size + 2 is the number of cells along a side, outer walls
    included.

    Attributes:
        cells: (N, N) int32, indexed [y, x] from the bottom left: the texture's index, plus WALL for a wall.
        spawn: (2,), position (x, y) of the agent in cells.
        targets: (K, 2), positions (x, y) of the targets in cells.
        heading: direction of view, radians anticlockwise from x.
        colours: (K,), index of each target's colour.
        prompt: index of the first target to find.
        key: seed of the later prompts.
    """

    cells: np.ndarray
    spawn: np.ndarray
    targets: np.ndarray
    heading: float
    colours: np.ndarray
    prompt: int
    key: int


def episode(size: int, randomize_colors: bool, seed: int, index: int) -> Episode:
    """Episode `index` of the copy seeded with `seed`. It depends on nothing but the arguments.

    labmaze generates the maze from one of 2^31 seeds, and again until there is a room for every target. A room has one
    spawn point and one place for a target. The walls are divided into 3 x 3 blocks, and a block's texture is drawn
    from eight. Corridors and rooms have different floors.
    """
    kind = SIZES[size]
    rng = np.random.default_rng((seed, index))
    outer = size + 2
    low, high = kind.room_sides
    maze = labmaze.RandomMaze(
        height=outer,
        width=outer,
        max_rooms=kind.rooms,
        room_min_size=low,
        room_max_size=high,
        max_variations=26,
        spawns_per_room=1,
        objects_per_room=1,
        simplify=True,
        random_seed=int(rng.integers(1, 2**31)),
    )
    entities = np.array(maze.entity_layer)
    while (entities == "G").sum() < kind.targets:
        maze.regenerate()
        entities = np.array(maze.entity_layer)
    entities = entities[::-1]
    floors = np.where(np.array(maze.variations_layer)[::-1] == ".", CORRIDOR, ROOM)
    wall_textures = WALL + rng.integers(len(WALLS), size=(BLOCKS, BLOCKS))
    # block b begins at row b * N // 3, counted from the top of the map
    bounds = [b * outer // BLOCKS for b in range(BLOCKS + 1)]
    block = np.repeat(np.arange(BLOCKS), np.diff(bounds))
    walls = wall_textures[block[::-1, None], block[None]]
    places = np.argwhere(entities == "G")[:, ::-1] + 0.5
    spawns = np.argwhere(entities == "P")[:, ::-1] + 0.5
    order = rng.permutation(len(COLOURS)) if randomize_colors else np.arange(len(COLOURS))
    return Episode(
        cells=np.where(np.isin(entities, (" ", "P", "G")), floors, walls).astype(np.int32),
        spawn=spawns[rng.integers(len(spawns))],
        targets=places[rng.permutation(len(places))[: kind.targets]],
        heading=float(rng.uniform(-np.pi, np.pi)),
        colours=order[: kind.targets],
        prompt=int(rng.integers(kind.targets)),
        key=int(rng.integers(2**KEY_BITS)),
    )


class Mazes:
    """The episodes of many copies. A background thread generates each episode while the previous one is played.

    Args:
        size, randomize_colors: as for `episode`.
        seeds: (n,), seeds of the copies.
        index: (n,), index of the first episode of each copy.
    """

    def __init__(self, size: int, randomize_colors: bool, seeds: list[int], index: list[int]) -> None:
        self.make = partial(episode, size, randomize_colors)
        self.seeds = list(seeds)
        self.index = list(index)
        # one thread: labmaze holds the global interpreter lock, so more threads would not be faster
        self.worker = ThreadPoolExecutor(1, "mazes")
        self.ahead: dict[int, Future[Episode]] = {}

    def next(self, copy: int) -> Episode:
        """The next episode of a copy. The generation of the one after it starts in the background."""
        future = self.ahead.pop(copy, None)
        result = self.make(self.seeds[copy], self.index[copy]) if future is None else future.result()
        self.index[copy] += 1
        self.ahead[copy] = self.worker.submit(self.make, self.seeds[copy], self.index[copy])
        return result

    def position(self) -> tuple[list[int], list[int]]:
        """The seeds of the copies, and the index of each copy's next episode."""
        return list(self.seeds), list(self.index)

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)
