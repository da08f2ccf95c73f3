"""Generation of long clips: M rolled forward under given actions, for any number of frames in constant memory.

Frames are generated in pieces. The frames of a piece are denoised together and then committed. A piece is a single
frame (as in an agent's dream), a chunk of M's attention, or longer. `order` says how the frames of a piece are
denoised, row by row of a scheduling matrix (`objectives.base.schedule`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

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
    """The slope of the schedule for an order.

    `full` is 0: all frames of a piece together. `pyramid` is 1: each frame one step behind the frame before it.
    `autoregressive` is `steps`: one frame after another. A number is the slope itself.

    Raises:
        ValueError: another word.
    """
    if not isinstance(order, str):
        return order
    if order not in ORDERS:
        raise ValueError(f"order = {order}: use one of {', '.join(ORDERS)} or a number, the slope of the schedule")
    return {"full": 0, "pyramid": 1, "autoregressive": steps}[order]


@torch.no_grad()
def read_context(
    dynamics: Dynamics, z: Tensor, prev_action: Tensor, first: Tensor, state: State | None = None, piece: int = 250
) -> tuple[Tensor, State]:
    """The last feature `(B, F)` and the state after a context clip.

    Args:
        z: `(B, T, N, D)`. prev_action: `(B, T, A)`. first: `(B, T)`, frames that begin an episode.
        state: before the clip; None: nothing was seen.
        piece: frames processed at a time, rounded up to whole chunks of M's attention.
    """
    current: State = dynamics.initial(len(z), z.device) if state is None else state
    chunk_frames = dynamics.config.chunk_frames
    piece = -(-piece // chunk_frames) * chunk_frames
    feat = z.new_zeros(len(z), 1, dynamics.feature_size)
    for begin in range(0, z.shape[1], piece):
        now = slice(begin, begin + piece)
        level = torch.ones_like(first[:, now], dtype=z.dtype)
        feat, _, current, _ = dynamics(z[:, now], prev_action[:, now], level, first[:, now], current)
    return feat[:, -1], current


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
    context_level: float = 1.0,
    capture: Callable[[Step], Step] | None = None,
) -> Iterator[Piece]:
    """Generate T frames after a context (`read_context`), piece by piece, as the iterator is advanced.

    Args:
        feat, state: `(B, F)` and M's, after the last known frame.
        action: `(B, T, A)`, of which action t leads to generated frame t.
        steps: denoising steps per frame. temperature: see `Objective.sample`.
        order: in which the frames of a piece are denoised, see `slope`.
        piece: frames denoised together; None: a chunk of M's attention, which may be a single frame.
        context_level: noise level that M is given for finished frames, which are not noised.
        capture: makes a single frame's step faster, for instance by a CUDA graph, whose outputs the next call may
            overwrite. A piece's state is then valid until the next piece. M's state must not grow.

    Raises:
        ValueError: pieces that are not whole chunks, or an objective that only draws single frames.
    """
    chunk_frames = dynamics.config.chunk_frames
    piece = chunk_frames if piece is None else piece
    if piece < 1 or piece % chunk_frames or action.shape[1] % chunk_frames:
        raise ValueError(
            f"pieces of {piece} frames, {action.shape[1]} in all: both must be whole chunks of "
            f"worldmodel.chunk_frames = {chunk_frames}"
        )
    if piece > 1 and not isinstance(objective, Forcing):
        raise ValueError(
            f"pieces of {piece} frames: {type(objective).__name__} draws frames one by one; leave piece at 1"
        )

    def draw(feat: Tensor, state: State, action: Tensor) -> tuple[Tensor, Tensor, State]:
        z = objective.sample(dynamics, feat, state, action, steps, temperature)
        level = torch.full_like(action[:, 0], context_level)
        return z, *dynamics.commit(state, z, action, None, level)

    step = draw if capture is None else capture(draw)
    for actions in action.split(piece, 1):
        if piece == 1:
            z, feat, state = step(feat, state, actions[:, 0])
            if capture is None:
                yield Piece(z[:, None], feat[:, None], state)
            else:
                yield Piece(z[:, None].clone(), feat[:, None].clone(), state)
        else:
            assert isinstance(objective, Forcing)
            level = torch.full_like(actions[..., 0], context_level)
            first = torch.zeros_like(level, dtype=torch.bool)
            matrix = schedule(actions.shape[1], steps, slope(order, steps))
            z = objective.sample_clip(dynamics, state, actions, matrix, temperature)
            feats, _, state, _ = dynamics(z, actions, level, first, state)
            feat = feats[:, -1]
            yield Piece(z, feats, state)
