"""`longdream bench update`: how fast M learns from video, without reading it and without V."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from longdream.agent.bench.common import Device, device_of
from longdream.agent.bench.model.world_model_cost import random_clips, update_ms
from longdream.agent.config import options, ranges
from longdream.agent.train.video import ClipLearner
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

ACTIONS = 20
"""Numbers that a frame is told by, as by poses in Memory Maze (agent/data/video/memory_maze.py)."""


def measure(
    preset: str = "video-world-model",
    settings: dict[str, Any] | None = None,
    clips: int | None = None,
    frames: int | None = None,
    repeats: int = 15,
    device: Device | None = None,
) -> dict[str, Any]:
    """An update of M on clips of random latents: loss, gradients, and the optimiser's step, as in training.

    On CUDA the first call compiles, where the preset says so, which takes a minute or two.

    examples
      longdream bench update --settings '{"recorded": true}'
      longdream bench update --clips 8 --frames 512 --settings '{"recorded": true, "worldmodel.mixer": "window"}'

    Args:
        preset: what M is, and how it learns
        settings: more of that, '{"worldmodel.mixer": "window"}'
        clips: of an update (default: 4 on CUDA, else 1)
        frames: of each (default: 1,024 on CUDA, else 32)
        repeats: timed updates
        device: where to compute (default: CUDA where there is one)

    Returns:
        parameters (of M, without heads), clips, frames, update_ms (the median), frames_per_s, peak_bytes (null without
        CUDA), device.
    """
    where = device_of(device)
    on_cuda = where.type == "cuda"
    clips, frames = (own or usual for own, usual in ((clips, 4 if on_cuda else 1), (frames, 1024 if on_cuda else 32)))
    if min(clips, frames, repeats) < 1:
        raise UserError(f"--clips {clips}, --frames {frames}, --repeats {repeats}: must be at least 1")
    config = replace(options.update(options.load(preset), settings or {}), device=where.type)
    size = config.video.size
    spec = EnvSpec({"image": ObsSpec("image", (size, size, 3))}, ActionSpec((), (-1.0,) * ACTIONS, (1.0,) * ACTIONS))
    ranges.check(config)
    if not on_cuda:
        config = replace(config, recorded=False)
    learner = ClipLearner(config, spec)
    if frames % config.worldmodel.frames_together:
        raise UserError(
            f"--frames {frames}: must be a multiple of worldmodel.frames_together = {config.worldmodel.frames_together}"
        )
    taken = update_ms(learner, random_clips(learner, clips, frames), repeats)
    found = {
        "parameters": sum(p.numel() for p in learner.model.dynamics.parameters()),
        "clips": clips,
        "frames": frames,
        "update_ms": taken,
        "frames_per_s": clips * frames / taken * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated(where) if on_cuda else None,
        "device": torch.cuda.get_device_name(where) if on_cuda else "cpu",
    }
    print(
        f"M of {found['parameters'] / 1e6:.1f}M parameters, {clips} x {frames} frames on {found['device']}: "
        f"{taken:.2f} ms an update, {found['frames_per_s']:,.0f} frames/s"
    )
    return found
