"""Dreaming: M rolled forward from real moments under a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longdream.worldmodel.dynamics import State


class Dreamer(Protocol):
    """What a dream asks of M; a `WorldModel` is one."""

    @property
    def consequence(self) -> Any:
        """`expect(feat (..., F), action (..., A))`: the expected reward `(...)` and the probability of going on."""
        ...

    def dream_step(
        self, feat: Tensor, state: State, action: Tensor, temperature: float = 1.0, steps: int | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """An action `(B, A)` taken at feat `(B, F)` and state to the next z, feat and state."""
        ...


class Starts(NamedTuple):
    """Moments to dream from: feat `(B, F)`, the state after that frame, and weight `(B,)`: 0 where the episode had
    ended."""

    feat: Tensor
    state: State
    weight: Tensor


class Clip(NamedTuple):
    """What really happened over T rows, as M sees it. Row t + 1 is the consequence of the action chosen from feat_t.

    feat: `(B, T, F)`. reward, cont: `(B, T - 1)`, arriving with row t + 1; cont is 0 where that terminated. known:
    `(B, T - 1)`, whether rows t and t + 1 are of one episode and both were seen clean.
    """

    feat: Tensor
    reward: Tensor
    cont: Tensor
    known: Tensor


class Dream(NamedTuple):
    """H dreamt steps. Row t's action is chosen from feat_t; its reward and cont arrive with feat_{t+1}.

    feat: `(B, H + 1, F)`. action: `(B, H, A)`. reward, cont: `(B, H)`, expected reward and probability of going on.
    z: `(B, H, N, D)`, latents of the frames after each action. weight: `(B,)` of the starts.
    """

    feat: Tensor
    action: Tensor
    reward: Tensor
    cont: Tensor
    z: Tensor
    weight: Tensor


@torch.no_grad()
def imagine(
    model: Dreamer,
    starts: Starts,
    policy: Callable[[Tensor], Tensor],
    horizon: int,
    temperature: float = 1.0,
    steps: int | None = None,
) -> Dream:
    """Dream `horizon` steps from each start, acting as `policy` says: feat `(B, F)` to action `(B, A)`.

    A policy for boxes may draw outside [-1, 1]; M sees actions as the environment would take them, clipped.
    """
    feat, state = starts.feat, starts.state
    feats, actions, zs = [feat], [], []
    for _ in range(horizon):
        action = policy(feat)
        z, feat, state = model.dream_step(feat, state, action.clamp(-1, 1), temperature, steps)
        feats.append(feat)
        actions.append(action)
        zs.append(z)
    feat, action = torch.stack(feats, 1), torch.stack(actions, 1)
    reward, cont = model.consequence.expect(feat[:, :-1], action.clamp(-1, 1))
    return Dream(feat, action, reward, cont, torch.stack(zs, 1), starts.weight)


@torch.no_grad()
def follow(model: Dreamer, starts: Starts, action: Tensor) -> Tensor:
    """Dream under given actions `(B, H, A)`: the features after each, `(B, H, F)`."""
    feat, state, feats = starts.feat, starts.state, []
    for step in range(action.shape[1]):
        _, feat, state = model.dream_step(feat, state, action[:, step])
        feats.append(feat)
    return torch.stack(feats, 1)
