"""Fast Memory Maze in plain torch, on any device: slow, the reference for the compiled backends."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch

from longdream.envs.fast_memory_maze.dialect import load
from longdream.envs.fast_memory_maze.scene import SAMPLES, SPHERE_NUMBERS


@cache
def modules() -> tuple[ModuleType, ModuleType]:
    primitives: dict[str, Any] = {
        "inner": lambda function: function,
        "where": lambda c, a, b: torch.where(c, a, b) if isinstance(c, torch.Tensor) else (a if c else b),
        "any_lane": lambda c: bool(c.any()),
        "minimum": lambda a, b: torch.where(a < b, a, b),
        "maximum": lambda a, b: torch.where(a > b, a, b),
        "absolute": torch.abs,
        "sqrt": torch.sqrt,
        "sin": torch.sin,
        "cos": torch.cos,
        "log2": torch.log2,
        "floor": lambda x: torch.floor(x).long(),
        "fetch": lambda array, i: array[i],
    }
    return load("torch", primitives)


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
    """As cpu.advance."""
    rules, _ = modules()
    copies = torch.arange(len(cells), device=cells.device)
    size = cells.shape[1]
    stride = spheres.shape[1] * SPHERE_NUMBERS
    *moved, touched = rules.act(
        cells.view(-1), copies * size * size, size, spheres.view(-1), copies * stride, count, substeps, actions,
        *body.unbind(1),
    )  # fmt: skip
    body.copy_(torch.stack(moved, 1))
    new_reward, new_prompt, new_picks = rules.update_prompt(touched, count, prompt, key, picks)
    for old, new in ((reward, new_reward), (prompt, new_prompt), (picks, new_picks)):
        old.copy_(new)


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
    """As cpu.draw."""
    _, view = modules()
    n, side = out.shape[:2]
    size = cells.shape[1]
    stride = spheres.shape[1] * SPHERE_NUMBERS
    pixel = 2.0 * tan / side
    ring = max(edge - 1, 0)  # the pixels next to the frame have neighbours that the frame covers
    inside = torch.arange(ring, side - ring, device=out.device, dtype=torch.float64)
    i = torch.arange(n, device=out.device)[:, None, None].expand(n, len(inside), len(inside))
    row, column = (m[None].expand_as(i) for m in torch.meshgrid(inside, inside, indexing="ij"))

    def cast_ray(i: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, z, ch, sh, cp, sp = camera[i].double().unbind(-1)
        a = (column + 0.5) * pixel - tan
        b = tan - (row + 0.5) * pixel
        *rgb, surface = view.paint(
            cells.view(-1), i * size * size, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, spheres.view(-1),
            i * stride, count, texels,
        )  # fmt: skip
        return torch.stack(rgb, -1), surface

    colour, surface = cast_ray(i, row, column)
    edges = torch.zeros_like(surface, dtype=torch.bool)
    differs = surface[:, 1:] != surface[:, :-1]
    edges[:, 1:] |= differs
    edges[:, :-1] |= differs
    differs = surface[:, :, 1:] != surface[:, :, :-1]
    edges[:, :, 1:] |= differs
    edges[:, :, :-1] |= differs
    colour[edges] = sum(0.25 * cast_ray(i[edges], row[edges] + d, column[edges] + r)[0] for r, d in SAMPLES)
    out[:] = frame[:, None, None]
    inner = colour[:, edge - ring : side - edge - ring, edge - ring : side - edge - ring]
    out[:, edge : side - edge, edge : side - edge] = (inner + 0.5).to(torch.uint8)
