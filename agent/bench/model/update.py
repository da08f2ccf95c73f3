"""`longdream bench update`: the time of an update of M on video, without reading the video and without V."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from longdream.agent.bench.common import Device, device_of
from longdream.agent.bench.model.world_model_cost import random_clips, update_ms
from longdream.agent.config import options
from longdream.agent.config.checks import check
from longdream.agent.train.video import ClipLearner
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

ACTIONS = 20
"""Length of the condition of a frame, similar to that of poses in Memory Maze (agent/data/video/memory_maze.py)."""


def measure(
    preset: str = "video-world-model",
    settings: dict[str, Any] | None = None,
    clips: int | None = None,
    frames: int | None = None,
    repeats: int = 15,
    device: Device | None = None,
) -> dict[str, Any]:
    """The time of an update of M on clips of random latents: loss, gradients, and the optimizer's step, as in training.

    On CUDA the first call compiles M if the preset says so, which takes a minute or two.

    examples
      longdream bench update --settings '{"cuda_graphs": true}'
      longdream bench update --clips 8 --frames 512 --settings '{"cuda_graphs": true, "worldmodel.mixer": "window"}'

    Args:
        preset: preset or .yaml file: M and how it learns
        settings: settings to change, '{"worldmodel.mixer": "window"}'
        clips: clips per update (default: 4 on CUDA, else 1)
        frames: frames per clip (default: 1,024 on CUDA, else 32)
        repeats: timed updates
        device: where to compute (default: CUDA where there is one)

    Returns:
        parameters (of M, without heads), clips, frames, update_ms (the median), frames_per_s, peak_bytes (null without
        CUDA), device.
    """
    where = device_of(device)
    on_cuda = where.type == "cuda"
    clips = clips or (4 if on_cuda else 1)
    frames = frames or (1024 if on_cuda else 32)
    if min(clips, frames, repeats) < 1:
        raise UserError(f"--clips {clips}, --frames {frames}, --repeats {repeats}: must be at least 1")
    config = replace(options.update(options.load(preset), settings or {}), device=where.type)
    size = config.video.size
    spec = EnvSpec({"image": ObsSpec("image", (size, size, 3))}, ActionSpec((), (-1.0,) * ACTIONS, (1.0,) * ACTIONS))
    check(replace(config, video=replace(config.video, data=".")))  # no recordings are read
    if not on_cuda:
        config = replace(config, cuda_graphs=False)
    learner = ClipLearner(config, spec)
    if frames % config.worldmodel.chunk_frames:
        raise UserError(
            f"--frames {frames}: must be a multiple of worldmodel.chunk_frames = {config.worldmodel.chunk_frames}"
        )
    milliseconds = update_ms(learner, random_clips(learner, clips, frames), repeats)
    result = {
        "parameters": sum(p.numel() for p in learner.model.dynamics.parameters()),
        "clips": clips,
        "frames": frames,
        "update_ms": milliseconds,
        "frames_per_s": clips * frames / milliseconds * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated(where) if on_cuda else None,
        "device": torch.cuda.get_device_name(where) if on_cuda else "cpu",
    }
    print(
        f"M of {result['parameters'] / 1e6:.1f}M parameters, {clips} x {frames} frames on {result['device']}: "
        f"{milliseconds:.2f} ms an update, {result['frames_per_s']:,.0f} frames/s"
    )
    return result
