"""What a frame costs M in training and in generation, after contexts of any length."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from longdream.agent.bench.common import median_ms
from longdream.agent.core.cuda_graphs import Graphed
from longdream.agent.train.video import ClipLearner
from longdream.worldmodel.generate import Step, generate, take_in
from longdream.worldmodel.model import WorldModel

ROUNDS = 5
FRAMES = 16
"""Frames that are generated in each round."""


def recorder(model: WorldModel, device: torch.device) -> type[Graphed] | None:
    """What makes generation faster where it can: a frame is hundreds of small kernels, and launching them takes longer
    than running them. Not for `causal`, whose state grows."""
    dynamics, capturable = model.dynamics, getattr(model.objective, "capturable", False)
    fit = device.type == "cuda" and capturable and dynamics.config.mixer != "causal"
    return Graphed if fit and dynamics.config.frames_together == 1 else None


def random_clips(learner: ClipLearner, count: int, frames: int) -> dict[str, Tensor]:
    """Latents, actions and first frames (none), such as `update_ms` takes."""
    dynamics, device = learner.model.dynamics, learner.device
    z = torch.randn(count, frames, dynamics.tokens, dynamics.channels, device=device).clamp(-1, 1)
    action = torch.randn(count, frames, dynamics.actions, device=device)
    return {"z": z, "action": action, "first": torch.zeros(count, frames, dtype=torch.bool, device=device)}


def update_ms(learner: ClipLearner, clips: dict[str, Tensor], rounds: int) -> float:
    """The median of so many: milliseconds of an update of M as in training, its optimiser's step included, V's part
    not."""
    model, part = learner.model, learner.parts["model"]

    def learn(fields: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        with learner.half_precision():
            loss = model.objective.run(model.dynamics, fields["z"], fields["action"], fields["first"], 0).loss
        return {}, part.step(loss)[0]

    update = learner.recording(learn)
    return median_ms(lambda: update(clips), learner.device, rounds)


def cost_of(learner: ClipLearner, context: int) -> dict[str, Any]:
    """Medians over ROUNDS of milliseconds a frame: `train_ms_per_frame` of an update of M as in training, its
    optimiser's step included and V's part not, on as many clips of `context` frames as `video.frames` holds, at least
    one; `generate_ms_per_frame` of one stream after `context` frames. `state_bytes` of that stream; `peak_bytes` of the
    device over both (null without CUDA)."""
    model, device = learner.model, learner.device
    dynamics, objective = model.dynamics, model.objective
    chunk = dynamics.config.frames_together
    context = -(-context // chunk) * chunk
    count = max(1, learner.config.video.frames // context)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clips = random_clips(learner, count, context)
    trained = update_ms(learner, clips, ROUNDS) / (count * context)
    z, action, first = clips.values()
    with torch.compiler.set_stance("force_eager"):  # what is compiled is for training
        feat, state = take_in(dynamics, z[:1], action[:1], first[:1])
    ahead = torch.randn(1, FRAMES * chunk, dynamics.actions, device=device)
    kind, recorded = recorder(model, device), []

    def once(step: Step) -> Step:  # all rounds do the same
        if not recorded and kind is not None:
            recorded.append(kind(step))
        return recorded[0]

    def go_on() -> None:
        for _ in generate(objective, dynamics, feat, state, ahead, model.steps, record=once if kind else None):
            pass

    generated = median_ms(go_on, device, ROUNDS) / ahead.shape[1]
    parts = itertools.chain(state.ssm, state.k, state.v, (state.last,))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "train_ms_per_frame": trained,
        "generate_ms_per_frame": generated,
        "state_bytes": sum(part.numel() * part.element_size() for part in parts),
        "peak_bytes": peak,
    }
