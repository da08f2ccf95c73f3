"""Which numbers make sense, and together with which."""

from __future__ import annotations

import math
from typing import Any

from longdream.agent.config.schema import Config
from longdream.envs.contract import UserError

AT_LEAST_0, AT_LEAST_1, SHARE, POSITIVE = (0, math.inf), (1, math.inf), (0, 1), (math.ulp(0.0), math.inf)
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "threads": AT_LEAST_0,
    "env.copies": AT_LEAST_1,
    "env.timeout_s": POSITIVE,
    "replay.capacity": AT_LEAST_1,
    "replay.batch": AT_LEAST_1,
    "replay.length": (2, math.inf),
    "replay.starts": SHARE,
    "replay.surprise": SHARE,
    "video.lengths": (2, math.inf),
    "video.frames": AT_LEAST_1,
    "video.size": (8, math.inf),
    "video.choices": AT_LEAST_0,
    "video.held_out": (0, 0.9),
    "video.retrace": SHARE,
    "video.context": AT_LEAST_1,
    "video.horizon": AT_LEAST_1,
    "encoder.grid": (1, 16),
    "encoder.channels": AT_LEAST_1,
    "encoder.classes": (2, math.inf),
    "encoder.unimix": SHARE,
    "encoder.depth": AT_LEAST_1,
    "encoder.hidden": AT_LEAST_1,
    "encoder.noise": AT_LEAST_0,
    "worldmodel.layers": AT_LEAST_1,
    "worldmodel.width": AT_LEAST_1,
    "worldmodel.heads": AT_LEAST_1,
    "worldmodel.state_size": AT_LEAST_1,
    "worldmodel.window": AT_LEAST_1,
    "worldmodel.frames_together": AT_LEAST_1,
    "worldmodel.motion": AT_LEAST_0,
    "worldmodel.longest": AT_LEAST_1,
    "worldmodel.blocks": AT_LEAST_1,
    "worldmodel.chunk": AT_LEAST_1,
    "forcing.steps": AT_LEAST_1,
    "forcing.blank": SHARE,
    "forcing.prefix": SHARE,
    "forcing.prefix_least": (0, 0.99),
    "forcing.shortcut": SHARE,
    "forcing.finest": (2, math.inf),
    "forcing.context_level": SHARE,
    "heads.hidden": AT_LEAST_1,
    "heads.bins": (3, math.inf),
    "heads.reward_weight": AT_LEAST_0,
    "heads.cont_weight": AT_LEAST_0,
    "heads.dreamt": AT_LEAST_0,
    "controller.hidden": AT_LEAST_1,
    "controller.layers": AT_LEAST_1,
    "controller.bins": (3, math.inf),
    "controller.starts": AT_LEAST_1,
    "controller.horizon": AT_LEAST_1,
    "controller.decisive": (0, 0.99),
    "controller.gamma": SHARE,
    "controller.lam": SHARE,
    "controller.entropy": AT_LEAST_0,
    "controller.unimix": SHARE,
    "controller.return_floor": POSITIVE,
    "controller.slow_rate": SHARE,
    "controller.temperature": POSITIVE,
    "controller.planner.candidates": AT_LEAST_1,
    "controller.planner.elites": AT_LEAST_1,
    "controller.planner.iterations": AT_LEAST_1,
    "controller.planner.horizon": AT_LEAST_1,
    "controller.planner.proposals": AT_LEAST_0,
    "controller.planner.temperature": POSITIVE,
    "controller.tree.simulations": AT_LEAST_1,
    "controller.tree.considered": AT_LEAST_1,
    "controller.tree.visit_weight": AT_LEAST_0,
    "controller.tree.value_weight": AT_LEAST_0,
    "controller.evolution.population": (4, math.inf),
    "controller.evolution.moments": AT_LEAST_1,
    "controller.evolution.horizon": AT_LEAST_1,
    "controller.evolution.deviation": POSITIVE,
    "controller.sb3.copies": AT_LEAST_1,
    "controller.replay_value": AT_LEAST_0,
    "learn.steps": AT_LEAST_1,
    "learn.prefill": AT_LEAST_0,
    "learn.ratio": AT_LEAST_0,
    "learn.warmup": AT_LEAST_0,
    "learn.warmup_model": AT_LEAST_0,
    "learn.encoder_rows": AT_LEAST_1,
    "learn.encoder_rate": AT_LEAST_0,
    "learn.model_rate": AT_LEAST_0,
    "learn.actor_critic_rate": AT_LEAST_0,
    "learn.updates": AT_LEAST_1,
    "learn.decay": SHARE,
    "learn.clip": POSITIVE,
    "learn.explore": SHARE,
    "learn.sticky": SHARE,
    "learn.curiosity": AT_LEAST_0,
    "evaluate.every": AT_LEAST_0,
    "evaluate.episodes": AT_LEAST_1,
    "evaluate.final_episodes": AT_LEAST_1,
    "evaluate.copies": AT_LEAST_1,
    "evaluate.log_every": AT_LEAST_1,
    "evaluate.save_seconds": AT_LEAST_0,
}
"""Bounds, both included, of every number in a Config."""


def get(config: Config, name: str) -> Any:
    """The value of the field with this dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Raise UserError for numbers out of their range and settings that contradict each other."""
    for name, (low, high) in RANGES.items():
        value = get(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high or not math.isfinite(number):
                least = "greater than 0" if low == math.ulp(0.0) else f"at least {low}"
                bounds = least if high == math.inf else f"between {low} and {high}"
                raise UserError(f"{name} = {number}: must be {bounds}")
    model, replay, learn, video = config.worldmodel, config.replay, config.learn, config.video
    heads = config.heads
    if not model.blocks:
        raise UserError("worldmodel.blocks is empty: give one block side per layer, for instance 1")
    if model.width % model.heads:
        raise UserError(f"worldmodel.heads = {model.heads} does not divide worldmodel.width = {model.width}")
    if video.lengths:
        uneven = [n for n in (*video.lengths, video.context, video.horizon) if n % model.frames_together]
        if uneven:
            raise UserError(
                f"worldmodel.frames_together = {model.frames_together}: video.lengths, context and horizon must be "
                f"multiples of it, and {uneven[0]} is not"
            )
    elif model.frames_together > 1:
        raise UserError(
            f"worldmodel.frames_together = {model.frames_together}: an agent acts after every frame; set it to 1"
        )
    elif config.forcing.stream == "one" and config.forcing.prefix < 1:
        raise UserError(
            f"forcing.prefix = {config.forcing.prefix}: an agent's dreams begin at clean frames, of which some clips "
            f"have none then; set it to 1"
        )
    if config.heads.dreamt and config.controller.horizon < 2:
        raise UserError(
            f"heads.dreamt = {config.heads.dreamt}: the heads learn from the second dreamt step on; set"
            f" controller.horizon to at least 2, or heads.dreamt to 0"
        )
    if video.retrace and (video.condition != "pose" or video.carry or any((heads.reward_weight, heads.cont_weight))):
        raise UserError(
            f"video.retrace = {video.retrace}: the way back is told by poses, followed by nothing and not rewarded: "
            f"set video.condition to pose, video.carry to false and heads.reward_weight and cont_weight to 0"
        )
    if config.recorded and video.carry:
        raise UserError(
            "recorded = true: a state that is carried from clip to clip is not; set it or video.carry to false"
        )
    if video.encoder and (learn.warmup or not video.freeze):
        raise UserError(
            f"video.encoder = {video.encoder}: that V stays as it is; set video.freeze to true and learn.warmup to 0"
        )
    if video.lengths and max(video.lengths) > video.frames:
        raise UserError(
            f"video.frames = {video.frames} frames per update hold no clip of {max(video.lengths)}: raise it, or lower "
            f"video.lengths"
        )
    if replay.starts + replay.surprise > 1:
        raise UserError(
            f"replay.starts = {replay.starts} and replay.surprise = {replay.surprise} are shares of the same clips: "
            f"their sum must not exceed 1"
        )
    least = max(learn.prefill, config.env.copies * replay.length)
    if learn.steps <= least:
        raise UserError(
            f"learn.steps = {learn.steps}: nothing is learned before step {least} (learn.prefill, and at least "
            f"replay.length rows in each of the env.copies): raise it or lower these"
        )


def check_clip(config: Config, longest: int) -> None:
    """Raise UserError where a full replay, which always has clips of `longest` rows, has none of replay.length."""
    if longest < config.replay.length:
        raise UserError(
            f"replay.capacity = {config.replay.capacity} keeps clips of {longest} rows at most, replay.length is "
            f"{config.replay.length}: raise the one or lower the other"
        )
