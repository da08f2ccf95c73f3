"""`longdream bench update`: the time of an update, of M on video or of V, M and C in a run as it really goes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from longdream.agent.bench.agents.loop import opened, turn
from longdream.agent.bench.common import config_of, device_of, now, process_age
from longdream.agent.bench.model.world_model_cost import random_clips, update_ms
from longdream.agent.config import options
from longdream.agent.config.checks import check
from longdream.agent.config.schema import Config, Device
from longdream.agent.core.agent import Stage
from longdream.agent.train.trainer import OnlineTrainer
from longdream.agent.train.video import ClipLearner
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

ACTIONS = 20
"""Length of the condition of a frame, similar to that of poses in Memory Maze (agent/data/video/memory_maze.py)."""
UNTIMED = 8
"""Updates of V, M and C before the timed ones: within them dreams and updates are compiled and captured."""


def measure(
    preset: str = "video-world-model",
    settings: dict[str, Any] | None = None,
    clips: int | None = None,
    frames: int | None = None,
    repeats: int | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """The time of an update: of M on video, or of V, M and C in a run, acting and environment included.

    With a preset of kind video: loss, gradients, and the optimizer's step of M, on clips of random latents. No video
    is read and V is not run. On CUDA the first call compiles M if the preset says so, which takes a minute or two.

    With a preset of kind online: training itself, in a temporary folder, without evaluations and checkpoints. It runs
    until learning began, through the warm-up and 8 updates of V, M and C, and then measures the following ones. It
    waits for the device at the beginning and the end of these only.

    examples
      longdream bench update --settings '{"cuda_graphs": true}'
      longdream bench update --clips 8 --frames 512 --settings '{"cuda_graphs": true, "worldmodel.mixer": "window"}'
      longdream bench update --preset memory-maze-9x9 --json
      longdream bench update --preset quickstart --repeats 20

    Args:
        preset: preset or .yaml file: the model and how it learns
        settings: settings to change, '{"worldmodel.mixer": "window"}'
        clips: clips per update of kind video (default: 4 on CUDA, else 1)
        frames: frames per clip of kind video (default: 1,024 on CUDA, else 32)
        repeats: timed updates (default: 15, with kind online 50)
        device: where to compute (default: CUDA where there is one; with kind online as in the preset)

    Returns:
        With kind video: parameters (of M, without heads), clips, frames, update_ms (the median), frames_per_s,
        peak_bytes (null without CUDA), device.

        With kind online: rows_per_s (replayed rows learned from), dreamt_steps_per_s (that C learned from) and
        env_steps_per_s, per second of wall-clock time; ms (per update, the mean); updates (timed: a turn with several
        is not cut); rows_per_update, dreamt_steps_per_update. first_update_s, first_full_update_s: seconds until M,
        and until V, M and C, had made their first update, on Linux since the start of the process, elsewhere since the
        call of this function. peak_bytes: memory allocated on the device at most, a replay there included (null
        without CUDA). device, preset.

    Raises:
        UserError: a flag that means nothing to the preset's kind, or settings that cannot be measured.
    """
    began = time.perf_counter() - process_age()
    config = options.update(options.load(preset), settings or {})
    if repeats is not None and repeats < 1:
        raise UserError(f"--repeats {repeats}: must be at least 1")
    if config.kind == "video":
        return _of_model(config, clips, frames, repeats or 15, device)
    if config.kind != "online":
        raise UserError(f"--preset {preset} is of kind {config.kind}: name one of kind online or video")
    for flag, value in (("clips", clips), ("frames", frames)):
        if value is not None:
            raise UserError(f"--{flag} means nothing to a preset of kind online, only to video: omit it")
    return {"preset": preset} | _of_run(config_of(preset, device, settings), repeats or 50, began)


# -- kind online -------------------------------------------------------------------------------------------------------


class _WatchedTrainer(OnlineTrainer):
    """Notes when the first update of each stage was done."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.first: dict[Stage, float] = {}
        """`time.perf_counter` by stage."""

    def learn(self, stage: Stage) -> None:
        super().learn(stage)
        if stage not in self.first:
            self.first[stage] = now(self.agent.device)


def _of_run(config: Config, repeats: int, began: float) -> dict[str, Any]:
    """What `measure` returns for a run of kind online. began: `time.perf_counter` from which first updates count."""
    check(config)
    if not config.learn.train_ratio:
        raise UserError("learn.train_ratio = 0: then there are no updates to time; set it to more than 0")
    with opened(config, _WatchedTrainer) as trainer:
        agent = trainer.agent
        count = trainer.count
        on_cuda = agent.device.type == "cuda"
        while count["updates"] < UNTIMED:
            turn(trainer)
        updates = count["updates"]
        dream_steps = agent.dream_steps
        env_steps = trainer.progress
        start = now(agent.device)
        while count["updates"] < updates + repeats:
            turn(trainer)
        seconds = now(agent.device) - start
        updates = count["updates"] - updates
        dream_steps = agent.dream_steps - dream_steps
        env_steps = trainer.progress - env_steps
        peak = torch.cuda.max_memory_allocated(agent.device) if on_cuda else None
    full = trainer.first["controller"]
    rows = config.replay.batch * config.replay.length
    result = {
        "rows_per_s": rows * updates / seconds,
        "dreamt_steps_per_s": dream_steps / seconds,
        "env_steps_per_s": env_steps / seconds,
        "ms": 1e3 * seconds / updates,
        "updates": updates,
        "rows_per_update": rows,
        "dreamt_steps_per_update": dream_steps / updates,
        "first_update_s": trainer.first.get("model", full) - began,
        "first_full_update_s": full - began,
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name(agent.device) if on_cuda else "cpu",
    }
    print(
        f"{updates:,} updates of {rows:,} replayed rows and {result['dreamt_steps_per_update']:,.0f} dreamt steps on "
        f"{result['device']}: {result['ms']:.2f} ms an update, {result['rows_per_s']:,.0f} rows/s, "
        f"{result['dreamt_steps_per_s']:,.0f} dreamt steps/s, {result['env_steps_per_s']:,.0f} real steps/s; first "
        f"update of M after {result['first_update_s']:.1f} s, of V, M and C after {result['first_full_update_s']:.1f} s"
    )
    return result


# -- kind video --------------------------------------------------------------------------------------------------------


def _of_model(
    config: Config, clips: int | None, frames: int | None, repeats: int, device: Device | None
) -> dict[str, Any]:
    """What `measure` returns for M on video."""
    where = device_of(device)
    on_cuda = where.type == "cuda"
    if clips is None:
        clips = 4 if on_cuda else 1
    if frames is None:
        frames = 1024 if on_cuda else 32
    if min(clips, frames) < 1:
        raise UserError(f"--clips {clips}, --frames {frames}: must be at least 1")
    config = replace(config, device=where.type)
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
