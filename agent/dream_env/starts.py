"""States that dreams start from: moments of real episodes, with M's memory of what came before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.agent.core.agent import Agent
from longdream.agent.core.device import own_randomness
from longdream.agent.data.replay import Replay
from longdream.agent.run.folder import Run, fitting, open_run
from longdream.envs.contract import UserError
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.types import Batch

CLIPS = 16
"""Clips that M processes at a time."""
PER_CLIP = 4
"""Moments taken from each clip."""
READ_BYTES = 1 << 30
"""Only about this many bytes of a replay, the newest, are opened: opening verifies, and so reads, all of them."""


class Moments(NamedTuple):
    """P moments to dream from, or the current ones of P dreams: latents z `(P, N, D)` of the frame, feature `(P, F)`,
    and M's state after the frame."""

    z: Tensor
    feat: Tensor
    state: State

    def take(self, index: Tensor) -> Moments:
        """The moments at `index` `(n,)`, in new tensors."""
        return pytree.tree_map(lambda t: t.index_select(0, index), self)

    def put(self, rows: Tensor, others: Moments) -> None:
        """Overwrite the moments at `rows` `(n,)` in place with n others."""
        for held, new in zip(pytree.tree_leaves(self), pytree.tree_leaves(others), strict=True):
            held.index_copy_(0, rows, new)


class ReadOnlyReplay(Replay):
    """The replay of a checkpoint, only for sampling. The run may still be training: files that it has added since the
    checkpoint are not removed."""

    def _remove_strays(self) -> None: ...

    def longest_episode(self) -> int:
        """Steps of the longest complete episode; 0 if there is none."""
        begun: dict[int, int] = {}
        steps = 0
        for segment in self._segments.values():
            for time, env in zip(segment.start_times, segment.start_envs, strict=True):
                steps = max(steps, time - begun.get(env, time) - 1)
                begun[env] = time
        return steps


def open_replay(run: Run, seen: tuple[Path, ...] = ()) -> ReadOnlyReplay:
    """The newest READ_BYTES of the replay of a run; seen: runs whose replay this one's is.

    Raises:
        UserError: the replay is not on disk, or cannot be opened.
        CheckpointError: the run has no checkpoint that can be used.
    """
    folder = run.folder
    tree, _ = run.saved
    hint = "dream with start='observation', from observations that you give"
    if "replay" not in tree:
        raise UserError(f"{folder} has no replay, as an exported agent or one of another program has none: {hint}")
    saved = tree["replay"]
    if "of" in saved:
        source = open_run(str(saved["of"]))
        here = folder.resolve()
        if here in seen:
            raise UserError(f"{folder} learned in dreams of itself, as its checkpoints say: they are damaged")
        return open_replay(source, (*seen, here))
    if "layout" not in saved:
        raise UserError(f"{folder} kept its replay in the memory of the device, where it ended with the run: {hint}")
    if not (folder / "replay").is_dir():
        raise UserError(f"{folder / 'replay'} is missing: put it back, or {hint}")
    try:
        with fitting(folder, tree):
            layout = saved["layout"]
            shape = (layout["num_envs"], layout["capacity"], layout["segment_rows"])
            replay = ReadOnlyReplay(folder / "replay", run.spec, *shape)
            row_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in replay.fields.values())
            newest = max(2, READ_BYTES // (row_bytes * replay.num_envs * replay.segment_rows))
            lost = replay.restore({**saved, "segments": saved["segments"][-newest:]})
    except OSError as error:
        raise UserError(f"{folder / 'replay'} cannot be opened ({error.strerror}): fix its permissions") from None
    for warning in lost:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return replay


@torch.no_grad()
def first_moments(agent: Agent, obs: dict[str, np.ndarray] | dict[str, Tensor]) -> Moments:
    """The first moments of episodes: M's empty state, then one frame. Observations are `(P, *shape)`, as stored."""
    z = agent.model.encoder({key: torch.as_tensor(value).to(agent.device) for key, value in obs.items()})
    carry = agent.initial(len(z))
    first = torch.ones(len(z), dtype=torch.bool, device=agent.device)
    return Moments(z, *agent.model.commit(carry.state, z, carry.action, first))


@torch.no_grad()
def clip_moments(agent: Agent, rows: dict[str, Any], per_clip: int) -> Moments:
    """`per_clip` random moments of each replayed clip, with M's memory of the clip so far. None ends an episode."""
    batch = Batch.of(rows, agent.device)
    model = agent.model
    z = model.encoder(batch.obs)
    at = torch.multinomial((~(batch.terminated | batch.truncated)).float(), per_clip, replacement=True)
    clean = torch.ones_like(batch.reward)
    empty = model.dynamics.initial(len(z))
    out = model.dynamics(z, batch.prev_action(), clean, batch.clip_first(), empty, None, at)
    assert out.states_at is not None
    clips = torch.arange(len(z), device=z.device)[:, None]
    return Moments(z[clips, at].flatten(0, 1), out.feat[clips, at].flatten(0, 1), out.states_at)


def replayed_moments(agent: Agent, replay: Replay, count: int, context: int, seed: int = 0) -> Moments:
    """`count` random moments of clips of `context` rows, which are sampled as in training.

    A clip begins at the start of an episode with probability `replay.episode_start_fraction`, otherwise anywhere. M's
    memory begins with the clip.

    Raises:
        UserError: the replay has no clips of that length.
    """
    if not replay.can_sample(context):
        raise UserError(f"context = {context}: the replay in {replay.folder} holds no so many rows in a row: use less")
    rng = np.random.default_rng(seed)
    parts = []
    with own_randomness(seed, agent.device):
        for _ in range(-(-count // (CLIPS * PER_CLIP))):
            rows = replay.sample(rng, CLIPS, context, agent.config.replay.episode_start_fraction)
            parts.append(clip_moments(agent, rows, PER_CLIP))
    return _joined(parts, count)


def initial_moments(agent: Agent, replay: Replay, count: int, seed: int = 0) -> Moments:
    """`count` first frames of episodes in the replay, with M's state after each.

    Raises:
        UserError: the replay has none.
    """
    rng = np.random.default_rng(seed)
    parts = []
    size = CLIPS * PER_CLIP
    for _ in range(-(-count // size)):
        rows = replay.sample(rng, size, 1, episode_start_fraction=1.0)
        if not rows["is_first"].all():
            raise UserError(f"the replay in {replay.folder} holds no first row of an episode: use start='replay'")
        parts.append(first_moments(agent, {key: value[:, 0] for key, value in rows["obs"].items()}))
    return _joined(parts, count)


def _joined(parts: list[Moments], count: int) -> Moments:
    return pytree.tree_map(lambda *tensors: torch.cat(tensors)[:count].clone(), *parts)
