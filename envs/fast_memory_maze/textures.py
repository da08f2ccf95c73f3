"""Textures of walls and floors, from the package labmaze, with their mipmaps."""

from __future__ import annotations

from functools import cache

import imageio.v3 as imageio
import labmaze.assets
import numpy as np

STYLE = "style_01"
WALLS = ("blue", "cerise", "green_bright", "green", "purple", "red_bright", "red", "yellow")
FLOORS = ("blue", "blue_bright")
CORRIDOR = len(WALLS)
ROOM = len(WALLS) + 1
"""CORRIDOR and ROOM are the indices of the floors' textures, which follow those of the walls."""


@cache
def texels() -> np.ndarray:
    """All textures, one after another: int64, r + 2^20 g + 2^40 b, in the layout that `view.texel` reads."""
    walls = labmaze.assets.get_wall_texture_paths(STYLE)
    floors = labmaze.assets.get_floor_texture_paths(STYLE)
    levels = []
    for path in [walls[name] for name in WALLS] + [floors[name] for name in FLOORS]:
        image = imageio.imread(path, mode="RGBA")[..., :3].astype(np.int32)
        levels.append(image)
        while len(image) > 1:  # a texel of the next level is the rounded mean of a square of four
            image = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2] + 2) >> 2
            levels.append(image)
    return np.concatenate([(level @ np.array([1, 2**20, 2**40], np.int64)).ravel() for level in levels])
