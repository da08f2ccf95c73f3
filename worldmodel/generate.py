"""Streams of generated frames: M rolled forward under given actions, for as long as one likes, in constant memory.

Pieces of frames are denoised together and then committed, one piece after another. A piece is a frame (what an agent's
dream does), a chunk of M's attention, or more; `order` says how its frames are denoised, by a row of the scheduling
matrix after the other (`forcing.schedule`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.objectives.base import Forcing, Objective, schedule

ORDERS = ("full", "pyramid", "autoregressive")
Step = Callable[[Tensor, State, Tensor], tuple[Tensor, Tensor, State]]
"""Feature `(B, F)`, M's state and an action `(B, A)` to the next frame's latents `(B, N, D)`, feature and state."""


class Piece(NamedTuple):
    """n frames: latents z `(B, n, N, D)`, features `(B, n, F)`, and M's state after them."""

    z: Tensor
    feat: Tensor
    state: State


def slope(order: str | float, steps: int) -> float:
    """The slope of the schedule that an order means: `full` 0, all frames of a piece together; `pyramid` 1, each a step
    behind the one before; `autoregressive` S = `steps`, one after another. A number is a slope itself.

    Raises:
        ValueError: another word.
    """
    if not isinstance(order, str):
        return order
    if order not in ORDERS:
        raise ValueError(f"order = {order}: use one of {', '.join(ORDERS)} or a number, the slope of the schedule")
    return {"full": 0, "pyramid": 1, "autoregressive": steps}[order]


@torch.no_grad()
def take_in(
    dynamics: Dynamics, z: Tensor, prev_action: Tensor, first: Tensor, state: State | None = None, piece: int = 250
) -> tuple[Tensor, State]:
    """The last feature `(B, F)` and the state after a context clip: z `(B, T, N, D)`, prev_action `(B, T, A)`, first
    `(B, T)`; after `state`, if there is one. `piece` frames at a time, rounded up to whole chunks."""
    known = dynamics.initial(len(z), z.device) if state is None else state
    chunk = dynamics.config.frames_together
    piece, feat = -(-piece // chunk) * chunk, z.new_zeros(len(z), 1, dynamics.feature_size)
    for begin in range(0, z.shape[1], piece):
        now = slice(begin, begin + piece)
        level = torch.ones_like(first[:, now], dtype=z.dtype)
        feat, _, known, _ = dynamics(z[:, now], prev_action[:, now], level, first[:, now], known)
    return feat[:, -1], known


@torch.no_grad()
def generate(
    objective: Objective,
    dynamics: Dynamics,
    feat: Tensor,
    state: State,
    action: Tensor,
    steps: int,
    temperature: float = 1.0,
    order: str | float = "full",
    piece: int | None = None,
    context_level: float | None = None,
    record: Callable[[Step], Step] | None = None,
) -> Iterator[Piece]:
    """Generate T frames from where `take_in` ended, piece after piece, as they are asked for.

    Args:
        feat, state: `(B, F)` and M's, of the last frame that is known.
        action: `(B, T, A)`, action t leads to generated frame t.
        steps: denoising steps per frame. temperature: see `Objective.sample`.
        order: in which the frames of a piece are denoised, see `slope`.
        piece: frames denoised together; None: a chunk of M's attention, which is a frame where that is 1.
        context_level: level at which finished frames are committed, without noise on them (None: the objective's
            `forcing.context_level`).
        record: what makes a frame's step faster, such as a CUDA graph of it, whose outputs the next call may overwrite;
            for single frames, and mixers whose state keeps its size. A piece's state holds until the next piece then.

    Raises:
        ValueError: pieces that are not whole chunks, or an objective that only draws single frames.
    """
    chunk = dynamics.config.frames_together
    piece = chunk if piece is None else piece
    if piece < 1 or piece % chunk or action.shape[1] % chunk:
        raise ValueError(
            f"pieces of {piece} frames, {action.shape[1]} in all: both must be whole chunks of "
            f"worldmodel.frames_together = {chunk}"
        )
    if piece > 1 and not isinstance(objective, Forcing):
        raise ValueError(
            f"pieces of {piece} frames: {type(objective).__name__} draws frames one by one; leave piece at 1"
        )
    settings: Any = getattr(objective, "config", None)
    trust = getattr(settings, "context_level", 1.0) if context_level is None else context_level

    def draw(feat: Tensor, state: State, action: Tensor) -> tuple[Tensor, Tensor, State]:
        z = objective.sample(dynamics, feat, state, action, steps, temperature)
        level = torch.full_like(action[:, 0], trust)
        return z, *dynamics.commit(state, z, action, None, level)

    step = draw if record is None else record(draw)
    for actions in action.split(piece, 1):
        if piece == 1:
            z, feat, state = step(feat, state, actions[:, 0])
            if record is None:
                yield Piece(z[:, None], feat[:, None], state)
            else:
                yield Piece(z[:, None].clone(), feat[:, None].clone(), state)
        else:
            assert isinstance(objective, Forcing)
            level = torch.full_like(actions[..., 0], trust)
            begins = torch.zeros_like(level, dtype=torch.bool)
            matrix = schedule(actions.shape[1], steps, slope(order, steps))
            z = objective.sample_clip(dynamics, state, actions, matrix, temperature)
            feats, _, state, _ = dynamics(z, actions, level, begins, state)
            feat = feats[:, -1]
            yield Piece(z, feats, state)
