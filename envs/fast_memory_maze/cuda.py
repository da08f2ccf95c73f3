"""The twin on CUDA: the same equations compiled by Triton, a lane for each copy or pixel."""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from longdream.envs.fast_memory_maze.dialect import load
from longdream.envs.fast_memory_maze.scene import SAMPLES
from longdream.envs.fast_memory_maze.scene import SPHERE_NUMBERS as _SPHERE_NUMBERS

SPHERE_NUMBERS = tl.constexpr(_SPHERE_NUMBERS)
RIGHT_0, RIGHT_1, RIGHT_2, RIGHT_3 = (tl.constexpr(right) for right, _ in SAMPLES)
DOWN_0, DOWN_1, DOWN_2, DOWN_3 = (tl.constexpr(down) for _, down in SAMPLES)
COPIES = 32  # of a program, one warp: loops end when its last lane is done, without waiting for other warps
PIXELS = 64


@triton.jit
def some(c):
    return tl.max(c.to(tl.int32), 0) > 0


@triton.jit
def floor(x):
    return tl.floor(x).to(tl.int32)


@triton.jit
def fetch(array, i):
    return tl.load(array + i)


@triton.jit
def where(c, a, b):
    return tl.where(c, a, b)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def log2(x):
    return tl.log2(x)


_words: dict[str, Any] = {
    "tl": tl,  # Triton's interpreter wants to see it wherever a function stands
    "inner": triton.jit,
    "some": some,
    "floor": floor,
    "fetch": fetch,
    "where": where,
    "minimum": minimum,
    "maximum": maximum,
    "absolute": absolute,
    "sqrt": sqrt,
    "sin": sin,
    "cos": cos,
    "log2": log2,
}
_rules, _view = load("triton", _words, tl.constexpr)
act, judge, paint = _rules.act, _rules.judge, _view.paint


@triton.jit
def advance_kernel(
    n, cells, size, spheres, stride, count: tl.constexpr, substeps, actions, body, prompt, key, picks, reward,
    COPIES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * COPIES + tl.arange(0, COPIES)
    valid = lane < n
    i = tl.where(valid, lane, n - 1)  # lanes too many repeat the last copy, and are not stored
    at = body + i * 9
    x, y, z, h, vx, vy, vz, w, r, touched = act(
        cells, i * size * size, size, spheres, i * stride * SPHERE_NUMBERS, count, substeps,
        tl.load(actions + i).to(tl.int32), tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
        tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8),
    )  # fmt: skip
    got, asked, drawn = judge(touched.to(tl.int64), count, tl.load(prompt + i), tl.load(key + i), tl.load(picks + i))
    tl.store(at, x, mask=valid)
    tl.store(at + 1, y, mask=valid)
    tl.store(at + 2, z, mask=valid)
    tl.store(at + 3, h, mask=valid)
    tl.store(at + 4, vx, mask=valid)
    tl.store(at + 5, vy, mask=valid)
    tl.store(at + 6, vz, mask=valid)
    tl.store(at + 7, w, mask=valid)
    tl.store(at + 8, r, mask=valid)
    tl.store(prompt + i, asked, mask=valid)
    tl.store(picks + i, drawn, mask=valid)
    tl.store(reward + i, got, mask=valid)


@triton.jit
def shoot(
    i, row, column, cells, size, spheres, stride, count: tl.constexpr, camera, tan, pixel, wall_height, texels
):  # fmt: skip
    at = camera + i * 7
    x, y, z = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    ch, sh, cp, sp = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
    a, b = (column + 0.5) * pixel - tan, tan - (row + 0.5) * pixel
    return paint(
        cells, i * size * size, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, spheres,
        i * stride * SPHERE_NUMBERS, count, texels,
    )  # fmt: skip


@triton.jit
def draw_kernel(
    cells, size, spheres, stride, count: tl.constexpr, camera, tan, wall_height, texels, edge, frame, out, names, side,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Each pixel's colour at its middle, and what surface it sees."""
    i = tl.program_id(0)
    p = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    valid = p < side * side
    p = tl.where(valid, p, 0)
    row, column = p // side, p % side
    pixel = 2.0 * tan / side
    red, green, blue, name = shoot(
        i + 0 * p, row, column, cells, size, spheres, stride, count, camera, tan, pixel, wall_height, texels
    )
    framed = (row < edge) | (row >= side - edge) | (column < edge) | (column >= side - edge)
    red = tl.where(framed, tl.load(frame + i * 3).to(tl.int32), (red + 0.5).to(tl.int32))
    green = tl.where(framed, tl.load(frame + i * 3 + 1).to(tl.int32), (green + 0.5).to(tl.int32))
    blue = tl.where(framed, tl.load(frame + i * 3 + 2).to(tl.int32), (blue + 0.5).to(tl.int32))
    at = i.to(tl.int64) * side * side + p
    tl.store(names + at, name, mask=valid)
    tl.store(out + at * 3, red.to(tl.uint8), mask=valid)
    tl.store(out + at * 3 + 1, green.to(tl.uint8), mask=valid)
    tl.store(out + at * 3 + 2, blue.to(tl.uint8), mask=valid)


@triton.jit
def differs(names, at, step, name, near):
    other = tl.load(names + at + step, mask=near, other=-1)
    return near & (other != name)


@triton.jit
def smooth_kernel(
    cells, size, spheres, stride, count: tl.constexpr, camera, tan, wall_height, texels, edge, out, names, side,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """The mean of four colours where a pixel's neighbour sees another surface."""
    i = tl.program_id(0)
    p = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    valid = p < side * side
    p = tl.where(valid, p, 0)
    row, column = p // side, p % side
    at = i.to(tl.int64) * side * side + p
    name = tl.load(names + at)
    inside = valid & (row >= edge) & (row < side - edge) & (column >= edge) & (column < side - edge)
    edges = differs(names, at, -side, name, inside & (row > 0))
    edges = edges | differs(names, at, side, name, inside & (row < side - 1))
    edges = edges | differs(names, at, -1, name, inside & (column > 0))
    edges = edges | differs(names, at, 1, name, inside & (column < side - 1))
    if some(edges):
        pixel = 2.0 * tan / side
        # other lanes look where their warp's first pixel does
        y, x = row.to(tl.float32), column.to(tl.float32)
        y = tl.where(edges, y, tl.min(tl.where(edges, y, 1e9), 0))
        x = tl.where(edges, x, tl.min(tl.where(edges, x, 1e9), 0))
        reds, greens, blues = 0.0 * x, 0.0 * x, 0.0 * x
        for k in range(4):
            right = tl.where(k == 0, RIGHT_0, tl.where(k == 1, RIGHT_1, tl.where(k == 2, RIGHT_2, RIGHT_3)))
            down = tl.where(k == 0, DOWN_0, tl.where(k == 1, DOWN_1, tl.where(k == 2, DOWN_2, DOWN_3)))
            red, green, blue, _ = shoot(
                i + 0 * p, y + down, x + right, cells, size, spheres, stride, count, camera, tan, pixel, wall_height,
                texels,
            )  # fmt: skip
            reds, greens, blues = reds + red, greens + green, blues + blue
        tl.store(out + at * 3, (0.25 * reds + 0.5).to(tl.int32).to(tl.uint8), mask=edges)
        tl.store(out + at * 3 + 1, (0.25 * greens + 0.5).to(tl.int32).to(tl.uint8), mask=edges)
        tl.store(out + at * 3 + 2, (0.25 * blues + 0.5).to(tl.int32).to(tl.uint8), mask=edges)


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
    """As cpu.advance, on a CUDA device."""
    n = len(cells)
    with torch.cuda.device(cells.device):
        advance_kernel[(triton.cdiv(n, COPIES),)](
            n, cells, cells.shape[1], spheres, spheres.shape[1], count, substeps, actions, body, prompt, key, picks,
            reward, COPIES, num_warps=1,
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
    """As cpu.draw, on a CUDA device; numbers are float32 there."""
    n, side = out.shape[:2]
    names = torch.empty((n, side, side), dtype=torch.int32, device=out.device)
    grid = (n, triton.cdiv(side * side, PIXELS))
    size, stride = cells.shape[1], spheres.shape[1]
    with torch.cuda.device(cells.device):
        draw_kernel[grid](
            cells, size, spheres, stride, count, camera, tan, wall_height, texels, edge, frame, out, names, side,
            PIXELS, num_warps=1,
        )  # fmt: skip
        smooth_kernel[grid](
            cells, size, spheres, stride, count, camera, tan, wall_height, texels, edge, out, names, side, PIXELS,
            num_warps=1,
        )  # fmt: skip
