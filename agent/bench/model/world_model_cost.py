"""The cost of a frame in training and in generation, by the length of the context."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longdream.agent.bench.common import median_ms
from longdream.agent.core.cuda_graphs import Graphed, GraphedUpdate
from longdream.agent.core.device import autocast
from longdream.agent.train.video import ClipLearner
from longdream.worldmodel.generate import Step, generate, read_context
from longdream.worldmodel.model import WorldModel

ROUNDS = 5
FRAMES = 16
"""Frames that are generated in each round."""


def step_capture(model: WorldModel, device: torch.device) -> type[Graphed] | None:
    """Captures a step of generation as a CUDA graph, or None if it cannot be captured.

    A frame takes hundreds of small kernels, and launching them takes longer than running them. The step of `causal`
    cannot be captured, since its state grows."""
    dynamics = model.dynamics
    capturable = getattr(model.objective, "capturable", False) and not dynamics.grows
    return Graphed if device.type == "cuda" and capturable and dynamics.config.chunk_frames == 1 else None


def random_clips(learner: ClipLearner, count: int, frames: int) -> dict[str, Tensor]:
    """Random latents and actions, and first (no frame begins an episode), as `update_ms` takes them."""
    dynamics = learner.model.dynamics
    device = learner.device
    z = torch.randn(count, frames, dynamics.tokens, dynamics.channels, device=device).clamp(-1, 1)
    action = torch.randn(count, frames, dynamics.actions, device=device)
    return {"z": z, "action": action, "first": torch.zeros(count, frames, dtype=torch.bool, device=device)}


def update_ms(learner: ClipLearner, clips: dict[str, Tensor], rounds: int) -> float:
    """Median milliseconds of `clip_update`."""
    update = clip_update(learner)
    return median_ms(lambda: update(clips), learner.device, rounds)


def clip_update(learner: ClipLearner) -> Callable[[dict[str, Tensor]], Any]:
    """An update of M as in training, with its optimizer's step and without V, from clips of `random_clips`."""
    model = learner.model
    optimizer = learner.optimizers["model"]

    def learn(fields: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        with autocast(learner.config.precision, learner.device):
            loss = model.objective.run(model.dynamics, fields["z"], fields["action"], fields["first"], 0).loss
        return {}, optimizer.step(loss)[0]

    return GraphedUpdate(learn) if learner.cuda_graphs else learn


def cost_of(learner: ClipLearner, context: int) -> dict[str, Any]:
    """The cost of a frame with contexts of `context` frames. Times are medians over ROUNDS.

    Returns:
        train_ms_per_frame: of an update of M as in training, with its optimizer's step and without V, on as many clips
            of `context` frames as make `video.frames`, at least one.
        generate_ms_per_frame: of one stream after `context` frames. state_bytes: size of its state.
        peak_bytes: peak memory of the device in both (None without CUDA).
    """
    model = learner.model
    device = learner.device
    dynamics = model.dynamics
    chunk_frames = dynamics.config.chunk_frames
    context = -(-context // chunk_frames) * chunk_frames
    count = max(1, learner.config.video.frames // context)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clips = random_clips(learner, count, context)
    trained = update_ms(learner, clips, ROUNDS) / (count * context)
    z, action, first = clips.values()
    with torch.compiler.set_stance("force_eager"):  # layers are compiled for the shapes of training
        feat, state = read_context(dynamics, z[:1], action[:1], first[:1])
    actions = torch.randn(1, FRAMES * chunk_frames, dynamics.actions, device=device)
    capture = step_capture(model, device)
    captured = []

    def capture_once(step: Step) -> Step:  # all rounds take the same step
        if not captured and capture is not None:
            captured.append(capture(step))
        return captured[0]

    def generate_frames() -> None:
        record = capture_once if capture else None
        for _ in generate(model.objective, dynamics, feat, state, actions, model.steps, capture=record):
            pass

    generated = median_ms(generate_frames, device, ROUNDS) / actions.shape[1]
    parts = itertools.chain(state.mixers, state.k, state.v, (state.last,))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "train_ms_per_frame": trained,
        "generate_ms_per_frame": generated,
        "state_bytes": sum(part.numel() * part.element_size() for part in parts),
        "peak_bytes": peak,
    }
