"""Which settings go together: what no single field can say."""

from __future__ import annotations

from collections.abc import Iterable

from longdream.agent.config.flags import read
from longdream.agent.config.options import field_value, fields, setting
from longdream.agent.config.schema import Config, is_general
from longdream.envs.contract import UserError


def check(config: Config) -> None:
    """Raise UserError for values out of their range and for settings that contradict each other."""
    for name, field in fields().items():
        read(name, field_value(config, name), field.hint)
    _check_model(config)
    if config.kind == "video":
        _check_video(config)
    else:
        _check_agent(config)


def check_given(config: Config, given: Iterable[str]) -> None:
    """Raise UserError where one of the settings that were given (dotted names) means nothing to a run of this kind."""
    for name in given:
        kinds = setting(name).kinds
        if config.kind in kinds:
            continue
        if config.kind == "imagination" and name.startswith(("encoder.", "worldmodel.", "forcing.", "heads.", "env.")):
            raise UserError(f"--{name} cannot change: V and M of {config.world} stay as they are")
        fix = "name a preset video-..., or omit it" if kinds == ("video",) else "omit it"
        raise UserError(f"--{name} means nothing to a run of kind {config.kind}, only to {' and '.join(kinds)}: {fix}")


def check_clip(config: Config, longest_clip: int) -> None:
    """Raise UserError where a full replay, which always has clips of `longest_clip` rows, has none of replay.length."""
    if longest_clip < config.replay.length:
        raise UserError(
            f"replay.capacity = {config.replay.capacity} keeps clips of {longest_clip} rows at most, replay.length is "
            f"{config.replay.length}: raise the one or lower the other"
        )


def _check_model(config: Config) -> None:
    model = config.worldmodel
    if not model.blocks:
        raise UserError("worldmodel.blocks is empty: give one block side per layer, for instance 1")
    if model.width % model.num_heads:
        raise UserError(f"worldmodel.num_heads = {model.num_heads} does not divide worldmodel.width = {model.width}")


def _check_agent(config: Config) -> None:
    """An agent acts at every frame, dreams, and has a replay."""
    replay, learn = config.replay, config.learn
    if (config.kind == "imagination") != bool(config.world):
        raise UserError(
            f"kind = {config.kind} and world = {config.world!r}: --world RUN makes a run of kind imagination"
        )
    if config.worldmodel.chunk_frames > 1:
        raise UserError(
            f"worldmodel.chunk_frames = {config.worldmodel.chunk_frames}: an agent acts after every frame; set it to 1"
        )
    if config.forcing.history == "noisy" and config.forcing.prefix < 1:
        raise UserError(
            f"forcing.prefix = {config.forcing.prefix}: an agent's dreams begin at clean frames, of which some clips "
            f"have none then; set it to 1"
        )
    single = [key for key, value in config.env.kwargs.items() if is_general(key) and value is not None]
    if replay.keep == "device" and single:
        raise UserError(
            f"env.kwargs.{single[0]} makes single copies of the environment, which make no tensors: omit it, or"
            " set replay.keep to disk"
        )
    if replay.keep == "device" and config.env.workers == "beside":
        raise UserError(
            "env.workers = beside (--collect.async): an environment that makes tensors needs no process; set it to "
            "sync, or replay.keep to disk"
        )
    if replay.episode_start_fraction + replay.priority_fraction > 1:
        raise UserError(
            f"replay.episode_start_fraction = {replay.episode_start_fraction} and replay.priority_fraction = "
            f"{replay.priority_fraction} are shares of the same clips: their sum must not exceed 1"
        )
    least = max(learn.prefill, config.env.copies * replay.length)
    if config.kind == "online" and learn.steps <= least:
        raise UserError(
            f"learn.steps = {learn.steps}: nothing is learned before step {least} (learn.prefill, and at least "
            f"replay.length rows in each of the env.copies): raise it or lower these"
        )


def _check_video(config: Config) -> None:
    model, video = config.worldmodel, config.video
    if not video.data:
        raise UserError("learn from what? Name a folder of recordings: --data DIR")
    if not video.lengths:
        raise UserError("video.lengths is empty: give the frames per clip of each stage, for instance 64")
    uneven = [n for n in (*video.lengths, video.context, video.horizon) if n % model.chunk_frames]
    if uneven:
        raise UserError(
            f"worldmodel.chunk_frames = {model.chunk_frames}: video.lengths, context and horizon must be "
            f"multiples of it, and {uneven[0]} is not"
        )
    if video.retrace and (video.condition != "pose" or video.carry or config.heads.reward_weight):
        raise UserError(
            f"video.retrace = {video.retrace}: the way back is conditioned on poses, has no clip after it and no "
            f"rewards: set video.condition to pose, video.carry to false and heads.reward_weight to 0"
        )
    if config.cuda_graphs and video.carry:
        raise UserError(
            "cuda_graphs = true: an update whose state is carried from clip to clip cannot be captured; set it or "
            "video.carry to false"
        )
    if video.encoder and (config.learn.warmup or not video.freeze):
        raise UserError(
            f"video.encoder = {video.encoder}: that V stays as it is; set video.freeze to true and learn.warmup to 0"
        )
    if max(video.lengths) > video.frames:
        raise UserError(
            f"video.frames = {video.frames} frames per update hold no clip of {max(video.lengths)}: raise it, or lower "
            f"video.lengths"
        )
