"""Fresh mazes: what an episode starts from, made by labmaze's generator under the original's rules."""

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
"""Of targets, 0 to 1: red, green, blue, purple, yellow, salmon."""
BLOCKS = 3  # of walls, along either side of the maze; each block has a texture of its own
KEY_BITS = 31


@dataclass(frozen=True)
class Episode:
    """Where an episode begins. N = size + 2, cells along a side with the outer walls; K targets.

    cells: (N, N) int32, [y, x] from the bottom left, texture of each, WALL more where it is a wall. spawn: (2,) x, y of
    the agent and targets: (K, 2) of the targets, in cells. heading: angle of the view, radians anticlockwise from x.
    colours: (K,) index of each target's colour. prompt: first target to find. key: what later prompts are drawn from.
    """

    cells: np.ndarray
    spawn: np.ndarray
    targets: np.ndarray
    heading: float
    colours: np.ndarray
    prompt: int
    key: int


def episode(size: int, randomize_colors: bool, seed: int, index: int) -> Episode:
    """Episode `index` of the copy seeded with `seed`: always the same.

    The maze is one of labmaze's 2^31 of that size, regenerated until it has a room for every target. A room has one
    spawn point and one place for a target. Walls fall into 3 x 3 blocks, each in one of eight textures drawn anew;
    corridors and rooms have different floors.
    """
    numbers = SIZES[size]
    rng = np.random.default_rng((seed, index))
    outer = size + 2
    low, high = numbers.room_sides
    maze = labmaze.RandomMaze(
        height=outer,
        width=outer,
        max_rooms=numbers.rooms,
        room_min_size=low,
        room_max_size=high,
        max_variations=26,
        spawns_per_room=1,
        objects_per_room=1,
        simplify=True,
        random_seed=int(rng.integers(1, 2**31)),
    )
    entities = np.array(maze.entity_layer)
    while (entities == "G").sum() < numbers.targets:
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
        targets=places[rng.permutation(len(places))[: numbers.targets]],
        heading=float(rng.uniform(-np.pi, np.pi)),
        colours=order[: numbers.targets],
        prompt=int(rng.integers(numbers.targets)),
        key=int(rng.integers(2**KEY_BITS)),
    )


class Mazes:
    """Episodes of many copies, each made in the background while the one before it is played.

    Args:
        size, randomize_colors: as of `episode`.
        seeds: (n,) of the copies.
        index: (n,) of the episode that each copy begins with.
    """

    def __init__(self, size: int, randomize_colors: bool, seeds: list[int], index: list[int]) -> None:
        self.make = partial(episode, size, randomize_colors)
        self.seeds, self.index = list(seeds), list(index)
        # one thread: labmaze holds the interpreter's lock, so that more would not be faster
        self.worker = ThreadPoolExecutor(1, "mazes")
        self.ahead: dict[int, Future[Episode]] = {}

    def next(self, copy: int) -> Episode:
        """The next episode of a copy; the one after it is begun to be made."""
        ready = self.ahead.pop(copy, None)
        made = self.make(self.seeds[copy], self.index[copy]) if ready is None else ready.result()
        self.index[copy] += 1
        self.ahead[copy] = self.worker.submit(self.make, self.seeds[copy], self.index[copy])
        return made

    def position(self) -> tuple[list[int], list[int]]:
        """The copies' seeds, and the number of each one's next episode."""
        return list(self.seeds), list(self.index)

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)
