"""Dreaming: M rolled forward from states of real clips, under a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longdream.worldmodel.dynamics import State


class Dreamer(Protocol):
    """What a dream needs of M; a `WorldModel` provides it."""

    @property
    def reward_continue(self) -> Any:
        """`expect(feat (..., F), action (..., A))`: the expected reward `(...)` and the probability of continuing."""
        ...

    def dream_step(
        self, feat: Tensor, state: State, action: Tensor, temperature: float | Tensor = 1.0, steps: int | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """An action `(B, A)`, taken at feat `(B, F)` and state, to the next z, feat and state."""
        ...


class Starts(NamedTuple):
    """States that dreams start from.

    feat: `(B, F)`. state: M's, after the same frame. weight: `(B,)`, 0 where the episode had ended, else 1.
    """

    feat: Tensor
    state: State
    weight: Tensor


class Clip(NamedTuple):
    """A real clip of T rows as M sees it. Row t + 1 is the consequence of the action chosen from feat_t.

    feat: `(B, T, F)`. reward, cont: `(B, T - 1)`, of row t + 1; cont is 0 where it terminated. known: `(B, T - 1)`,
    whether rows t and t + 1 are of one episode and both were seen clean.
    """

    feat: Tensor
    reward: Tensor
    cont: Tensor
    known: Tensor


class Dream(NamedTuple):
    """H dreamt steps. The action of row t is chosen from feat_t; its reward and cont arrive with feat_{t+1}.

    feat: `(B, H + 1, F)`. action: `(B, H, A)`. reward, cont: `(B, H)`, expected reward and probability of
    continuing. z: `(B, H, N, D)`, latents of the frames after each action. weight: `(B,)`, of the starts.
    """

    feat: Tensor
    action: Tensor
    reward: Tensor
    cont: Tensor
    z: Tensor
    weight: Tensor


def dream_bytes(state: State, feat: Tensor, horizon: int) -> int:
    """Memory that a dream takes at least, in bytes: its state before and after a step, and the features of each row.

    state, feat: of one sequence, with a leading B of 1.
    """
    of_state = sum(tensor.numel() * tensor.element_size() for tensor in (*state.mixers, *state.k, *state.v))
    of_rows = (horizon + 1) * (feat.numel() * feat.element_size() + state.last.numel() * state.last.element_size())
    return 2 * of_state + of_rows


@torch.no_grad()
def imagine(
    model: Dreamer,
    starts: Starts,
    policy: Callable[[Tensor], Tensor],
    horizon: int,
    temperature: float = 1.0,
    steps: int | None = None,
) -> Dream:
    """Dream `horizon` steps from each start under a policy, from feat `(B, F)` to action `(B, A)`.

    A policy for box actions may sample outside [-1, 1]. M sees the clipped action, as the environment would.
    """
    feat = starts.feat
    state = starts.state
    feats = [feat]
    actions = []
    zs = []
    for _ in range(horizon):
        action = policy(feat)
        z, feat, state = model.dream_step(feat, state, action.clamp(-1, 1), temperature, steps)
        feats.append(feat)
        actions.append(action)
        zs.append(z)
    feat = torch.stack(feats, 1)
    action = torch.stack(actions, 1)
    reward, cont = model.reward_continue.expect(feat[:, :-1], action.clamp(-1, 1))
    return Dream(feat, action, reward, cont, torch.stack(zs, 1), starts.weight)
