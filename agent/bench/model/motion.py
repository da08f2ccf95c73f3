"""`longdream bench motion`: whether M, told its actions alone, knows where things are that it no longer sees."""

from __future__ import annotations

import math
import statistics
import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longdream.agent.bench.common import device_of
from longdream.agent.config import flags
from longdream.agent.config.schema import Device
from longdream.envs.contract import UserError
from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.mixers.base import MIXERS

MARKS = 3
SIDE = 6.0
"""Side of the room, in steps of about a third of a unit."""
SIGHT = 2.0
"""How far the agent sees, ahead of it; it sees nothing else."""
STRIDE, TURN = 0.3, 0.3
"""What an action moves and turns by: units, radians."""
LAGS = (1, 10, 30, 60)
"""Bounds of the groups of frames since a mark was last seen; the last has no end."""
CLIPS, HELD_OUT = 16, 64
RATE = 2e-3


class Walks(NamedTuple):
    """Random walks.

    obs: `(B, T, D)`. actions: `(B, T, A)`, those that led to the frame. marks: `(B, T, K, 2)`, where each mark is from
    the agent: to its right, ahead. since: `(B, T, K)`, frames since it was last seen, -1 before.
    """

    obs: Tensor
    actions: Tensor
    marks: Tensor
    since: Tensor


def measure(
    mixers: tuple[str, ...] = ("window", "ssm", "rotary", "gru", "causal"),
    seeds: tuple[int, ...] = (0, 1),
    updates: int = 600,
    frames: int = 192,
    layers: int = 3,
    width: int = 64,
    state_size: int = 16,
    device: Device | None = None,
) -> dict[str, Any]:
    """Memory told by actions: in an empty room, M tells where marks are that it saw before it turned away.

    An agent walks at random in a room of 6 x 6 units, told each action and whether a wall stopped it. It sees three
    marks only within 2 units ahead. After every frame, M's feature tells where each mark that was seen before lies now,
    to the right and ahead. That needs a memory of the mark, and of all that the agent did since. M is the whole one,
    with one token, trained for this alone, from nothing; the mixers differ in nothing else.

    examples
      longdream bench motion
      longdream bench motion --mixers ssm,rotary --seeds 0 --updates 100 --json

    Args:
        mixers: values of worldmodel.mixer
        seeds: of weights and walks
        updates: of 16 walks each
        frames: of each walk
        layers: of M
        width: of M
        state_size: of the scans
        device: where to compute (default: CUDA where there is one)

    Returns:
        rows: mixer, seed, params, ms (median of an update), errors and constant (mean distance in units between what is
        told and what is true, and from always telling (0, 0), by frames since the mark was seen), on 64 new walks.
    """
    for name in mixers:
        if name not in MIXERS and ":" not in name:
            raise UserError(f"--mixers: {name!r}" + flags.suggest(name, MIXERS, f": there are {', '.join(MIXERS)}"))
    for flag, value, least in (("updates", updates, 1), ("frames", frames, LAGS[-1] + 2), ("layers", layers, 1)):
        if value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    if not mixers or not seeds:
        raise UserError("--mixers and --seeds must not be empty")
    where = device_of(device)
    names = [f"{lag}-{end - 1}" for lag, end in pairwise(LAGS)] + [f"{LAGS[-1]}-"]
    print(f"{updates} updates of {CLIPS} walks of {frames} frames, on {where}; errors by frames since a mark was seen")
    print(f"{'mixer':14}{'seed':>5}{'params':>9}{'ms':>7}" + "".join(f"{name:>8}" for name in names), flush=True)
    rows = []
    for name in mixers:
        for seed in seeds:
            try:
                config = DynamicsConfig(mixer=name, layers=layers, width=width, state_size=state_size)
                row = {"mixer": name, "seed": seed} | _row(config, seed, updates, frames, where)
            except ValueError as error:
                raise UserError(str(error)) from error
            row |= {key: dict(zip(names, row[key], strict=True)) for key in ("errors", "constant")}
            rows.append(row)
            columns = "".join(f"{value:8.2f}" for value in row["errors"].values())
            print(f"{name:14}{seed:5}{row['params']:9,}{row['ms']:7.0f}{columns}", flush=True)
    print(f"{'(0, 0)':35}" + "".join(f"{value:8.2f}" for value in rows[-1]["constant"].values()))
    return {"updates": updates, "frames": frames, "device": str(where), "rows": rows}


def _row(config: DynamicsConfig, seed: int, updates: int, frames: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    example = walks(1, 2, random)
    dynamics = Dynamics(config, 1, example.obs.shape[-1], example.actions.shape[-1])
    head = nn.Sequential(nn.Linear(dynamics.feature_size, 128), nn.SiLU(), nn.Linear(128, 2 * MARKS))
    model = nn.ModuleList([dynamics, head]).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, RATE)

    def rate(update: int) -> float:
        """Rising over 50 updates, and falling over the last two fifths."""
        return min(1.0, (update + 1) / 50, max(0.05, 2.5 * (updates - update) / updates))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    took = []
    for _ in range(updates):
        batch = Walks(*(v.to(device) for v in walks(CLIPS, frames, random)))
        began = time.perf_counter()
        error = (_told(dynamics, head, batch) - batch.marks).square().sum(-1)
        seen = batch.since >= 0
        loss = (error * seen).sum() / seen.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        loss.item()  # waits for the device
        took.append(1000 * (time.perf_counter() - began))
    # the same walks for all mixers and seeds
    test = Walks(*(v.to(device) for v in walks(HELD_OUT, frames, torch.Generator().manual_seed(2**31))))
    with torch.no_grad():
        error = (_told(dynamics, head, test) - test.marks).norm(dim=-1)
    bounds = [*LAGS, frames]
    groups = [(test.since >= lag) & (test.since < end) for lag, end in pairwise(bounds)]
    return {
        "params": sum(p.numel() for p in parameters),
        "ms": statistics.median(took),
        "errors": [error[group].mean().item() for group in groups],
        "constant": [test.marks.norm(dim=-1)[group].mean().item() for group in groups],
    }


def _told(dynamics: Dynamics, head: nn.Module, batch: Walks) -> Tensor:
    """Where the marks are, as told after each frame: `(B, T, K, 2)`."""
    clips, frames = batch.obs.shape[:2]
    first = torch.zeros(clips, frames, dtype=torch.bool, device=batch.obs.device)
    first[:, 0] = True
    clean = torch.ones(clips, frames, device=batch.obs.device)
    feat = dynamics(batch.obs[:, :, None], batch.actions, clean, first, dynamics.initial(clips)).feat
    return head(feat).unflatten(-1, (MARKS, 2))


def walks(clips: int, frames: int, random: torch.Generator) -> Walks:
    """Random walks that turn left or right or go ahead, on average three times in a row.

    An observation says where each mark in sight is, which marks these are, and whether a wall stopped the agent.
    """
    place = SIDE * torch.rand(clips, 2, generator=random)
    heading = 2 * math.pi * torch.rand(clips, generator=random)
    marks = SIDE * torch.rand(clips, MARKS, 2, generator=random)
    action = torch.randint(0, 4, (clips,), generator=random)  # left, right, and ahead twice
    seen_at = torch.full((clips, MARKS), -1)
    rows = []
    for t in range(frames):
        again = torch.rand(clips, generator=random) < 0.3
        action = torch.where(again, torch.randint(0, 4, (clips,), generator=random), action)
        stopped = torch.zeros(clips, dtype=torch.bool)
        if t:
            heading = heading + TURN * ((action == 0).float() - (action == 1).float())
            ahead = torch.stack([heading.cos(), heading.sin()], -1)
            there = place + STRIDE * (action >= 2).float()[:, None] * ahead
            stopped = ((there < 0) | (there > SIDE)).any(-1)
            place = torch.where(stopped[:, None], place, there)
        away = marks - place[:, None]
        cos, sin = heading.cos()[:, None], heading.sin()[:, None]
        right, front = away[..., 0] * sin - away[..., 1] * cos, away[..., 0] * cos + away[..., 1] * sin
        mark = torch.stack([right, front], -1)
        sees = (mark.norm(dim=-1) < SIGHT) & (front > 0)
        seen_at = torch.where(sees, t, seen_at)
        obs = torch.cat([(mark * sees[..., None]).flatten(1) / SIGHT, sees.float(), stopped.float()[:, None]], -1)
        took = torch.nn.functional.one_hot(action, 4).float() * (t > 0)
        rows.append((obs, took, mark, torch.where(seen_at >= 0, t - seen_at, -1)))
    return Walks(*(torch.stack(part, 1) for part in zip(*rows, strict=True)))
