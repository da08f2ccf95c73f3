"""Fast Memory Maze on the CPU: compiled by numba, with the copies divided among torch's number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit

from longdream.envs.fast_memory_maze.dialect import digest, load
from longdream.envs.fast_memory_maze.scene import SAMPLES, SPHERE_NUMBERS

# fastmath is safe: no number is NaN, divisions by zero are guarded, and sums may be reordered.
compiled = partial(njit, error_model="numpy", fastmath=True, nogil=True)


def log2(x):
    """Binary logarithm with an error below 1e-3: the exponent, plus a cubic polynomial of the mantissa.

    It is several times as fast as the exact logarithm."""
    bits = np.float32(x).view(np.int32)
    m = np.int32((bits & 0x007FFFFF) | 0x3F800000).view(np.float32) - np.float32(1.0)
    return ((bits >> 23) - 127) + m * (1.42286530 + m * (-0.58208536 + m * 0.15922006))


_primitives: dict[str, Any] = {
    "inner": compiled(),
    "where": compiled(lambda c, a, b: a if c else b),
    "any_lane": compiled(lambda c: c),
    "minimum": compiled(lambda a, b: a if a < b else b),
    "maximum": compiled(lambda a, b: a if a > b else b),
    "absolute": abs,
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "log2": compiled(log2),
    "floor": math.floor,
    "fetch": compiled(lambda array, i: array[np.uint64(i)]),
}
_rules, _view = load("numba", _primitives)
act = _rules.act
update_prompt = _rules.update_prompt
paint = _view.paint


@cache
def kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled functions (advance, draw), which process the copies low to high - 1. numba caches them on disk.

    The cache identifies a function by its file, code and closure. `sources` is in the closure so that a change in the
    other source files invalidates the cache."""
    sources = digest()

    def advance(low, high, cells, size, spheres, stride, count, substeps, actions, body, prompt, key, picks, reward):
        _ = sources
        for i in range(low, high):
            x, y, z, h, vx, vy, vz, w, r = body[i]
            first = i * stride * SPHERE_NUMBERS
            x, y, z, h, vx, vy, vz, w, r, touched = act(
                cells, i * size * size, size, spheres, first, count, substeps, actions[i], x, y, z, h, vx, vy, vz, w, r
            )
            body[i, 0] = x
            body[i, 1] = y
            body[i, 2] = z
            body[i, 3] = h
            body[i, 4] = vx
            body[i, 5] = vy
            body[i, 6] = vz
            body[i, 7] = w
            body[i, 8] = r
            reward[i], prompt[i], picks[i] = update_prompt(touched, count, prompt[i], key[i], picks[i])

    def draw(low, high, cells, size, spheres, stride, count, camera, tan, wall_height, texels, edge, frame, out):
        _ = sources
        side = out.shape[1]
        pixel = 2.0 * tan / side
        surfaces = np.empty((side, side), np.int64)
        ring = max(edge - 1, 0)  # the pixels next to the frame have neighbours that the frame will cover
        for i in range(low, high):
            x, y, z, ch, sh, cp, sp = camera[i]
            offset = i * size * size
            first = i * stride * SPHERE_NUMBERS
            for row in range(ring, side - ring):
                b = tan - (row + 0.5) * pixel
                for column in range(ring, side - ring):
                    a = (column + 0.5) * pixel - tan
                    red, green, blue, surface = paint(
                        cells, offset, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, spheres, first, count,
                        texels,
                    )  # fmt: skip
                    surfaces[row, column] = surface
                    out[i, row, column, 0] = int(red + 0.5)
                    out[i, row, column, 1] = int(green + 0.5)
                    out[i, row, column, 2] = int(blue + 0.5)
            for row in range(edge, side - edge):
                for column in range(edge, side - edge):
                    surface = surfaces[row, column]
                    if (
                        (row > ring and surfaces[row - 1, column] != surface)
                        or (row < side - ring - 1 and surfaces[row + 1, column] != surface)
                        or (column > ring and surfaces[row, column - 1] != surface)
                        or (column < side - ring - 1 and surfaces[row, column + 1] != surface)
                    ):
                        reds = 0.5
                        greens = 0.5
                        blues = 0.5
                        for right, down in SAMPLES:
                            a = (column + 0.5 + right) * pixel - tan
                            b = tan - (row + 0.5 + down) * pixel
                            red, green, blue, _ = paint(
                                cells, offset, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, spheres, first,
                                count, texels,
                            )  # fmt: skip
                            reds = reds + 0.25 * red
                            greens = greens + 0.25 * green
                            blues = blues + 0.25 * blue
                        out[i, row, column, 0] = int(reds)
                        out[i, row, column, 1] = int(greens)
                        out[i, row, column, 2] = int(blues)
            for k in range(3):
                out[i, :edge, :, k] = frame[i, k]
                out[i, side - edge :, :, k] = frame[i, k]
                out[i, :, :edge, k] = frame[i, k]
                out[i, :, side - edge :, k] = frame[i, k]

    try:
        return compiled(cache=True)(advance), compiled(cache=True)(draw)
    except RuntimeError:  # no writable cache folder: compile in every process
        return compiled()(advance), compiled()(draw)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "maze")


def _share(kernel: Callable[..., None], copies: int, *args: Any) -> None:
    threads = min(torch.get_num_threads(), copies)
    arrays = [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]
    if threads == 1:
        kernel(0, copies, *arrays)
        return
    # more ranges than threads, so that no thread waits long for a slow range
    bounds = np.linspace(0, copies, min(4 * threads, copies) + 1).astype(int).tolist()
    jobs = [_pool(threads).submit(kernel, low, high, *arrays) for low, high in pairwise(bounds)]
    for job in jobs:
        job.result()


def advance(
    cells: torch.Tensor,
    spheres: torch.Tensor,
    count: int,
    substeps: int,
    actions: torch.Tensor,
    body: torch.Tensor,
    prompt: torch.Tensor,
    key: torch.Tensor,
    picks: torch.Tensor,
    reward: torch.Tensor,
) -> None:
    """Apply one action in every copy. Changes body, prompt, picks and reward in place.

    All tensors are contiguous and on the CPU.

    Args:
        cells: (n, N, N) int32, the grids.
        spheres: (n, S, 7) float32; the first `count` spheres are the targets.
        count: number of targets.
        substeps: physics substeps of the action.
        actions: (n,) int64.
        body: (n, 9) float64: x, y, z, h, vx, vy, vz, w, r (see body.substep).
        prompt: (n,) int64, index of the prompted target.
        key: (n,) int64, seed of the prompts.
        picks: (n,) int64, number of prompts drawn so far.
        reward: (n,) float32.
    """
    size = cells.shape[1]
    stride = spheres.shape[1]
    _share(
        kernels()[0], len(cells), cells.view(-1), size, spheres.view(-1), stride, count, substeps, actions, body,
        prompt, key, picks, reward,
    )  # fmt: skip


def draw(
    cells: torch.Tensor,
    spheres: torch.Tensor,
    count: int,
    camera: torch.Tensor,
    tan: float,
    wall_height: float,
    texels: torch.Tensor,
    edge: int,
    frame: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Draw the image of every copy into out.

    Args:
        cells: (n, N, N) int32, the grids.
        spheres: (n, S, 7) float32; the first `count` spheres are drawn.
        count: number of spheres to draw.
        camera: (n, 7) float32: x, y, z in cells, cosine and sine of the heading, cosine and sine of the downward pitch.
        tan: tangent of half the field of view.
        wall_height: in cells.
        texels: the textures, as `textures.texels` returns them.
        edge: width of the frame in pixels.
        frame: (n, 3) uint8, colour of the frame.
        out: (n, H, H, 3) uint8.
    """
    size = cells.shape[1]
    stride = spheres.shape[1]
    _share(
        kernels()[1], len(cells), cells.view(-1), size, spheres.view(-1), stride, count, camera, tan, wall_height,
        texels, edge, frame, out,
    )  # fmt: skip
