"""The twin in plain torch, on any device: slow, and what the compiled forms are compared with."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch

from longdream.envs.fast_memory_maze.dialect import load
from longdream.envs.fast_memory_maze.scene import SAMPLES, SPHERE_NUMBERS


@cache
def modules() -> tuple[ModuleType, ModuleType]:
    words: dict[str, Any] = {
        "inner": lambda function: function,
        "where": lambda c, a, b: torch.where(c, a, b) if isinstance(c, torch.Tensor) else (a if c else b),
        "some": lambda c: bool(c.any()),
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
    return load("torch", words)


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
    size, stride = cells.shape[1], spheres.shape[1] * SPHERE_NUMBERS
    *moved, touched = rules.act(
        cells.view(-1), copies * size * size, size, spheres.view(-1), copies * stride, count, substeps, actions,
        *body.unbind(1),
    )  # fmt: skip
    body.copy_(torch.stack(moved, 1))
    got, asked, drawn = rules.judge(touched, count, prompt, key, picks)
    for old, new in ((reward, got), (prompt, asked), (picks, drawn)):
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
    size, stride = cells.shape[1], spheres.shape[1] * SPHERE_NUMBERS
    pixel = 2.0 * tan / side
    ring = max(edge - 1, 0)  # pixels beside the frame have neighbours under it
    inside = torch.arange(ring, side - ring, device=out.device, dtype=torch.float64)
    i = torch.arange(n, device=out.device)[:, None, None].expand(n, len(inside), len(inside))
    row, column = (m[None].expand_as(i) for m in torch.meshgrid(inside, inside, indexing="ij"))

    def shoot(i: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, z, ch, sh, cp, sp = camera[i].double().unbind(-1)
        a, b = (column + 0.5) * pixel - tan, tan - (row + 0.5) * pixel
        *rgb, name = view.paint(
            cells.view(-1), i * size * size, size, x, y, z, ch, sh, cp, sp, a, b, pixel, wall_height, spheres.view(-1),
            i * stride, count, texels,
        )  # fmt: skip
        return torch.stack(rgb, -1), name

    colour, name = shoot(i, row, column)
    edges = torch.zeros_like(name, dtype=torch.bool)
    differs = name[:, 1:] != name[:, :-1]
    edges[:, 1:] |= differs
    edges[:, :-1] |= differs
    differs = name[:, :, 1:] != name[:, :, :-1]
    edges[:, :, 1:] |= differs
    edges[:, :, :-1] |= differs
    colour[edges] = sum(0.25 * shoot(i[edges], row[edges] + d, column[edges] + r)[0] for r, d in SAMPLES)
    out[:] = frame[:, None, None]
    seen = colour[:, edge - ring : side - edge - ring, edge - ring : side - edge - ring]
    out[:, edge : side - edge, edge : side - edge] = (seen + 0.5).to(torch.uint8)
