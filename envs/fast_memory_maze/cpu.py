"""The twin on the CPU: compiled by numba, copies shared out over torch's number of threads."""

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

# No number is ever NaN here, divisions by zero are guarded, and sums may be taken in any order.
compiled = partial(njit, error_model="numpy", fastmath=True, nogil=True)


def log2(x):
    """Binary logarithm within 1e-3, several times as fast as the exact one: exponent, and a cubic of the mantissa."""
    bits = np.float32(x).view(np.int32)
    m = np.int32((bits & 0x007FFFFF) | 0x3F800000).view(np.float32) - np.float32(1.0)
    return ((bits >> 23) - 127) + m * (1.42286530 + m * (-0.58208536 + m * 0.15922006))


_words: dict[str, Any] = {
    "inner": compiled(),
    "where": compiled(lambda c, a, b: a if c else b),
    "some": compiled(lambda c: c),
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
_rules, _view = load("numba", _words)
act, judge, paint = _rules.act, _rules.judge, _view.paint


@cache
def kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled functions (advance, draw) of a range of copies, from numba's cache where it has them.

    The cache tells functions apart by file, code and closure: `sources` in theirs shows it changes in other files."""
    sources = digest()

    def advance(low, high, cells, size, spheres, stride, count, substeps, actions, body, prompt, key, picks, reward):
        _ = sources
        for i in range(low, high):
            x, y, z, h, vx, vy, vz, w, r = body[i]
            first = i * stride * SPHERE_NUMBERS
            x, y, z, h, vx, vy, vz, w, r, touched = act(
                cells, i * size * size, size, spheres, first, count, substeps, actions[i], x, y, z, h, vx, vy, vz, w, r
            )
            body[i, 0], body[i, 1], body[i, 2], body[i, 3], body[i, 4] = x, y, z, h, vx
            body[i, 5], body[i, 6], body[i, 7], body[i, 8] = vy, vz, w, r
            reward[i], prompt[i], picks[i] = judge(touched, count, prompt[i], key[i], picks[i])

    def draw(low, high, cells, size, spheres, stride, count, camera, tan, wall_height, texels, edge, frame, out):
        _ = sources
        side = out.shape[1]
        pixel = 2.0 * tan / side
        names = np.empty((side, side), np.int64)
        ring = max(edge - 1, 0)  # pixels beside the frame have neighbours under it
        for i in range(low, high):
            x, y, z, ch, sh, cp, sp = camera[i]
            at, first = i * size * size, i * stride * SPHERE_NUMBERS
            for row in range(ring, side - ring):
                b = tan - (row + 0.5) * pixel
                for column in range(ring, side - ring):
                    a = (column + 0.5) * pixel - tan
                    red, green, blue, name = paint(
                        cells,
                        at,
                        size,
                        x,
                        y,
                        z,
                        ch,
                        sh,
                        cp,
                        sp,
                        a,
                        b,
                        pixel,
                        wall_height,
                        spheres,
                        first,
                        count,
                        texels,
                    )
                    names[row, column] = name
                    out[i, row, column, 0] = int(red + 0.5)
                    out[i, row, column, 1] = int(green + 0.5)
                    out[i, row, column, 2] = int(blue + 0.5)
            for row in range(edge, side - edge):
                for column in range(edge, side - edge):
                    name = names[row, column]
                    if (
                        (row > ring and names[row - 1, column] != name)
                        or (row < side - ring - 1 and names[row + 1, column] != name)
                        or (column > ring and names[row, column - 1] != name)
                        or (column < side - ring - 1 and names[row, column + 1] != name)
                    ):
                        reds, greens, blues = 0.5, 0.5, 0.5
                        for right, down in SAMPLES:
                            a, b = (column + 0.5 + right) * pixel - tan, tan - (row + 0.5 + down) * pixel
                            red, green, blue, _ = paint(
                                cells, at, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, spheres, first,
                                count, texels,
                            )  # fmt: skip
                            reds, greens, blues = reds + 0.25 * red, greens + 0.25 * green, blues + 0.25 * blue
                        out[i, row, column, 0], out[i, row, column, 1] = int(reds), int(greens)
                        out[i, row, column, 2] = int(blues)
            for k in range(3):
                out[i, :edge, :, k] = frame[i, k]
                out[i, side - edge :, :, k] = frame[i, k]
                out[i, :, :edge, k] = frame[i, k]
                out[i, :, side - edge :, k] = frame[i, k]

    try:
        return compiled(cache=True)(advance), compiled(cache=True)(draw)
    except RuntimeError:  # nowhere to write a cache: compile anew in every process
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
    # more shares than threads, so that none waits long for a slow one
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
    """One action of every copy: changes body, prompt, picks and reward.

    cells (n, N, N) int32; spheres (n, S, 7) float32, of which the first `count` are targets; actions, prompt, key,
    picks (n,) int64; body (n, 9) float64 (see rules.act); reward (n,) float32. All contiguous, on the CPU."""
    size, stride = cells.shape[1], spheres.shape[1]
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
    """The picture of every copy, into out (n, H, H, 3) uint8.

    The first `count` of spheres are drawn. camera (n, 7) float32: x, y, z in cells, cosine and sine of the heading and
    of the angle downwards; tan: of half its field of view; wall_height in cells; edge: width of the frame in pixels;
    frame (n, 3) uint8: its colour."""
    size, stride = cells.shape[1], spheres.shape[1]
    _share(
        kernels()[1], len(cells), cells.view(-1), size, spheres.view(-1), stride, count, camera, tan, wall_height,
        texels, edge, frame, out,
    )  # fmt: skip
