"""Fast Memory Maze on CUDA: the same sources compiled by Triton, with a lane for each copy or pixel."""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton is only part of CUDA builds of torch.)

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
COPIES = 32  # per program: one warp, so that a loop never waits for the lanes of another warp
PIXELS = 64  # per program


@triton.jit
def any_lane(c):
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


_primitives: dict[str, Any] = {
    "tl": tl,  # Triton's interpreter requires it in the globals of every kernel
    "inner": triton.jit,
    "any_lane": any_lane,
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
_rules, _view = load("triton", _primitives, tl.constexpr)
act = _rules.act
update_prompt = _rules.update_prompt
paint = _view.paint


@triton.jit
def advance_kernel(
    n, cells, size, spheres, stride, count: tl.constexpr, substeps, actions, body, prompt, key, picks, reward,
    COPIES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * COPIES + tl.arange(0, COPIES)
    valid = lane < n
    i = tl.where(valid, lane, n - 1)  # surplus lanes repeat the last copy and store nothing
    pointer = body + i * 9
    x, y, z, h, vx, vy, vz, w, r, touched = act(
        cells, i * size * size, size, spheres, i * stride * SPHERE_NUMBERS, count, substeps,
        tl.load(actions + i).to(tl.int32), tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2),
        tl.load(pointer + 3), tl.load(pointer + 4), tl.load(pointer + 5), tl.load(pointer + 6), tl.load(pointer + 7),
        tl.load(pointer + 8),
    )  # fmt: skip
    new_reward, new_prompt, new_picks = update_prompt(
        touched.to(tl.int64), count, tl.load(prompt + i), tl.load(key + i), tl.load(picks + i)
    )
    tl.store(pointer, x, mask=valid)
    tl.store(pointer + 1, y, mask=valid)
    tl.store(pointer + 2, z, mask=valid)
    tl.store(pointer + 3, h, mask=valid)
    tl.store(pointer + 4, vx, mask=valid)
    tl.store(pointer + 5, vy, mask=valid)
    tl.store(pointer + 6, vz, mask=valid)
    tl.store(pointer + 7, w, mask=valid)
    tl.store(pointer + 8, r, mask=valid)
    tl.store(prompt + i, new_prompt, mask=valid)
    tl.store(picks + i, new_picks, mask=valid)
    tl.store(reward + i, new_reward, mask=valid)


@triton.jit
def cast_ray(
    i, row, column, cells, size, spheres, stride, count: tl.constexpr, camera, tan, pixel, wall_height, texels
):  # fmt: skip
    pointer = camera + i * 7
    x = tl.load(pointer)
    y = tl.load(pointer + 1)
    z = tl.load(pointer + 2)
    ch = tl.load(pointer + 3)
    sh = tl.load(pointer + 4)
    cp = tl.load(pointer + 5)
    sp = tl.load(pointer + 6)
    a = (column + 0.5) * pixel - tan
    b = tan - (row + 0.5) * pixel
    return paint(
        cells, i * size * size, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, spheres,
        i * stride * SPHERE_NUMBERS, count, texels,
    )  # fmt: skip


@triton.jit
def draw_kernel(
    cells, size, spheres, stride, count: tl.constexpr, camera, tan, wall_height, texels, edge, frame, out, surfaces,
    side, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write each pixel's colour at its centre, and the id of the surface that it sees."""
    i = tl.program_id(0)
    p = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    valid = p < side * side
    p = tl.where(valid, p, 0)
    row = p // side
    column = p % side
    pixel = 2.0 * tan / side
    red, green, blue, surface = cast_ray(
        i + 0 * p, row, column, cells, size, spheres, stride, count, camera, tan, pixel, wall_height, texels
    )
    framed = (row < edge) | (row >= side - edge) | (column < edge) | (column >= side - edge)
    red = tl.where(framed, tl.load(frame + i * 3).to(tl.int32), (red + 0.5).to(tl.int32))
    green = tl.where(framed, tl.load(frame + i * 3 + 1).to(tl.int32), (green + 0.5).to(tl.int32))
    blue = tl.where(framed, tl.load(frame + i * 3 + 2).to(tl.int32), (blue + 0.5).to(tl.int32))
    index = i.to(tl.int64) * side * side + p
    tl.store(surfaces + index, surface, mask=valid)
    tl.store(out + index * 3, red.to(tl.uint8), mask=valid)
    tl.store(out + index * 3 + 1, green.to(tl.uint8), mask=valid)
    tl.store(out + index * 3 + 2, blue.to(tl.uint8), mask=valid)


@triton.jit
def differs(surfaces, index, step, surface, near):
    other = tl.load(surfaces + index + step, mask=near, other=-1)
    return near & (other != surface)


@triton.jit
def smooth_kernel(
    cells, size, spheres, stride, count: tl.constexpr, camera, tan, wall_height, texels, edge, out, surfaces, side,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Replace the colour of each pixel with a neighbour on another surface by the mean of four samples."""
    i = tl.program_id(0)
    p = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    valid = p < side * side
    p = tl.where(valid, p, 0)
    row = p // side
    column = p % side
    index = i.to(tl.int64) * side * side + p
    surface = tl.load(surfaces + index)
    inside = valid & (row >= edge) & (row < side - edge) & (column >= edge) & (column < side - edge)
    edges = differs(surfaces, index, -side, surface, inside & (row > 0))
    edges = edges | differs(surfaces, index, side, surface, inside & (row < side - 1))
    edges = edges | differs(surfaces, index, -1, surface, inside & (column > 0))
    edges = edges | differs(surfaces, index, 1, surface, inside & (column < side - 1))
    if any_lane(edges):
        pixel = 2.0 * tan / side
        # the other lanes repeat a ray close to the block's edge pixels: a ray elsewhere could take longer
        y = row.to(tl.float32)
        x = column.to(tl.float32)
        y = tl.where(edges, y, tl.min(tl.where(edges, y, 1e9), 0))
        x = tl.where(edges, x, tl.min(tl.where(edges, x, 1e9), 0))
        reds = 0.0 * x
        greens = 0.0 * x
        blues = 0.0 * x
        for k in range(4):
            right = tl.where(k == 0, RIGHT_0, tl.where(k == 1, RIGHT_1, tl.where(k == 2, RIGHT_2, RIGHT_3)))
            down = tl.where(k == 0, DOWN_0, tl.where(k == 1, DOWN_1, tl.where(k == 2, DOWN_2, DOWN_3)))
            red, green, blue, _ = cast_ray(
                i + 0 * p, y + down, x + right, cells, size, spheres, stride, count, camera, tan, pixel, wall_height,
                texels,
            )  # fmt: skip
            reds = reds + red
            greens = greens + green
            blues = blues + blue
        tl.store(out + index * 3, (0.25 * reds + 0.5).to(tl.int32).to(tl.uint8), mask=edges)
        tl.store(out + index * 3 + 1, (0.25 * greens + 0.5).to(tl.int32).to(tl.uint8), mask=edges)
        tl.store(out + index * 3 + 2, (0.25 * blues + 0.5).to(tl.int32).to(tl.uint8), mask=edges)


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
    """As cpu.draw, on a CUDA device and in float32."""
    n, side = out.shape[:2]
    surfaces = torch.empty((n, side, side), dtype=torch.int32, device=out.device)
    grid = (n, triton.cdiv(side * side, PIXELS))
    size = cells.shape[1]
    stride = spheres.shape[1]
    with torch.cuda.device(cells.device):
        draw_kernel[grid](
            cells, size, spheres, stride, count, camera, tan, wall_height, texels, edge, frame, out, surfaces, side,
            PIXELS, num_warps=1,
        )  # fmt: skip
        smooth_kernel[grid](
            cells, size, spheres, stride, count, camera, tan, wall_height, texels, edge, out, surfaces, side, PIXELS,
            num_warps=1,
        )  # fmt: skip
