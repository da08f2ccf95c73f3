"""Where dreams begin: moments of real episodes, as M remembers them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.agent.core.agent import Agent
from longdream.agent.core.learner import own_randomness
from longdream.agent.data.replay import Replay
from longdream.agent.run import folder as run
from longdream.agent.run.checkpoint import CheckpointError
from longdream.envs.contract import EnvSpec, UserError
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.types import Batch

Device = Literal["auto", "cpu", "cuda"]

CLIPS, PER_CLIP = 16, 4
"""Clips that M is shown at a time, and moments taken from each."""
READ_BYTES = 1 << 30
"""Of a replay, about so much is opened, its newest part: all that is opened is read once, to check it."""


class Moments(NamedTuple):
    """P moments to dream from, or of P dreams under way: latents z `(P, N, D)` of the frame, feat `(P, F)` and M's
    state after it."""

    z: Tensor
    feat: Tensor
    state: State

    def take(self, index: Tensor) -> Moments:
        """The moments at `index` `(n,)`, in tensors of their own."""
        return pytree.tree_map(lambda t: t.index_select(0, index), self)

    def put(self, rows: Tensor, others: Moments) -> None:
        """Overwrite the moments at `rows` `(n,)` with n others, in place."""
        for held, new in zip(pytree.tree_leaves(self), pytree.tree_leaves(others), strict=True):
            held.index_copy_(0, rows, new)


class ReadOnlyReplay(Replay):
    """The replay that a checkpoint knows of, to draw from. The run may be in training meanwhile: files that were added
    since are its own, and stay."""

    def _remove_strays(self) -> None: ...

    def longest_episode(self) -> int:
        """Steps of the longest whole episode; 0 where there is none."""
        begun: dict[int, int] = {}
        longest = 0
        for chunk in self._chunks.values():
            for time, env in zip(chunk.start_times, chunk.start_envs, strict=True):
                longest = max(longest, time - begun.get(env, time) - 1)
                begun[env] = time
        return longest


def open_agent(folder: Path | str, device: Device | None) -> tuple[Agent, dict[str, Any]]:
    """The agent of a run as it was last saved, to dream with, and all that the checkpoint holds.

    Raises:
        UserError: no run, or a checkpoint that cannot be used.
    """
    opened = run.open_run(folder)
    tree, _ = opened.saved
    missing = [key for key in ("spec", "weights", "replay") if key not in tree]
    if missing:
        raise CheckpointError(f"the checkpoint in {opened.folder} has no {missing[0]!r}: it is of another program")
    agent = Agent(replace(opened.config, device=device or opened.config.device), opened.spec)
    run.fill(agent, tree, opened.folder, weights_only=True)
    return agent, tree


def open_replay(folder: Path | str, tree: dict[str, Any]) -> ReadOnlyReplay:
    """The newest READ_BYTES of the replay of the run in `folder`, of which the checkpoint holds `tree`.

    Raises:
        UserError: it is not on disk.
    """
    folder, saved, spec = Path(folder), tree["replay"], EnvSpec.from_json(tree["spec"])
    if "of" in saved:
        source = run.open_run(saved["of"])
        return open_replay(source.folder, source.saved[0])
    mend = "dream with start='observation', from observations that you give"
    if "layout" not in saved:
        raise UserError(f"{folder} kept its replay in the memory of the device, where it ended with the run: {mend}")
    if not (folder / "replay").is_dir():
        raise UserError(f"{folder / 'replay'} is missing: put it back, or {mend}")
    layout = saved["layout"]
    replay = ReadOnlyReplay(folder / "replay", spec, layout["num_envs"], layout["capacity"], layout["chunk_rows"])
    row = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in replay.fields.values())
    newest = max(2, READ_BYTES // (row * replay.num_envs * replay.chunk_rows))
    try:
        found = replay.restore({**saved, "chunks": saved["chunks"][-newest:]})
    except OSError as error:
        raise UserError(f"{folder / 'replay'} cannot be opened ({error.strerror}): mend its permissions") from None
    for warning in found:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return replay


@torch.no_grad()
def first_moments(agent: Agent, obs: dict[str, np.ndarray] | dict[str, Tensor]) -> Moments:
    """Episodes that begin with these observations, each `(P, *shape)` as stored: M's empty state, and one frame."""
    z = agent.model.encoder({key: torch.as_tensor(value).to(agent.device) for key, value in obs.items()})
    carry = agent.initial(len(z))
    first = torch.ones(len(z), dtype=torch.bool, device=agent.device)
    return Moments(z, *agent.model.commit(carry.state, z, carry.action, first))


@torch.no_grad()
def clip_moments(agent: Agent, rows: dict[str, Any], per_clip: int) -> Moments:
    """`per_clip` random moments of each clip of replayed rows, none of them an episode's end; M has seen the clip up
    to there."""
    batch, model = Batch.of(rows, agent.device), agent.model
    z = model.encoder(batch.obs)
    at = torch.multinomial((~(batch.terminated | batch.truncated)).float(), per_clip, replacement=True)
    clean = torch.ones_like(batch.reward)
    empty = model.dynamics.initial(len(z))
    out = model.dynamics(z, batch.prev_action(), clean, batch.clip_first(), empty, None, at)
    assert out.at is not None
    clips = torch.arange(len(z), device=z.device)[:, None]
    return Moments(z[clips, at].flatten(0, 1), out.feat[clips, at].flatten(0, 1), out.at)


def replayed_moments(agent: Agent, replay: Replay, count: int, context: int, seed: int = 0) -> Moments:
    """`count` random moments of clips of `context` rows, drawn as for training: the share `replay.starts` of the clips
    begins where an episode begins, the others begin anywhere, without memory of what was before.

    Raises:
        UserError: the replay has no clips of that length.
    """
    if not replay.can_sample(context):
        raise UserError(f"context = {context}: the replay in {replay.folder} holds no so many rows in a row: use less")
    rng, parts = np.random.default_rng(seed), []
    with own_randomness(seed, agent.device):
        for _ in range(-(-count // (CLIPS * PER_CLIP))):
            rows = replay.sample(rng, CLIPS, context, agent.config.replay.starts)
            parts.append(clip_moments(agent, rows, PER_CLIP))
    return _joined(parts, count)


def initial_moments(agent: Agent, replay: Replay, count: int, seed: int = 0) -> Moments:
    """`count` first frames of episodes in the replay, each seen by an empty M.

    Raises:
        UserError: the replay has none.
    """
    rng, parts, size = np.random.default_rng(seed), [], CLIPS * PER_CLIP
    for _ in range(-(-count // size)):
        rows = replay.sample(rng, size, 1, starts=1.0)
        if not rows["is_first"].all():
            raise UserError(f"the replay in {replay.folder} holds no first row of an episode: use start='replay'")
        parts.append(first_moments(agent, {key: value[:, 0] for key, value in rows["obs"].items()}))
    return _joined(parts, count)


def _joined(parts: list[Moments], count: int) -> Moments:
    return pytree.tree_map(lambda *tensors: torch.cat(tensors)[:count].clone(), *parts)
