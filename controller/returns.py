"""Lambda-returns, and their scale."""

from __future__ import annotations

import torch
from torch import Tensor

from longdream.worldmodel import ranks


def lambda_returns(
    reward: Tensor, discount: Tensor, value: Tensor, lam: float, follows: Tensor | None = None
) -> Tensor:
    """TD(lambda) returns (Sutton and Barto 2018, eq. 12.18; DreamerV3, arXiv 2301.04104, eq. 5).

    R_t = r_t + g_t ((1 - lam) v_{t+1} + lam R_{t+1}), R_H = v_H.

    Args:
        reward, discount: `(B, H)`, of the action at t; discount is gamma times the probability of continuing.
        value: `(B, H + 1)`, of the states at 0 to H.
        follows: `(B, H)`, whether step t continues step t - 1. Where it does not, the return of step t - 1 ends with
            v_t. None: all do.

    Returns:
        `(B, H)`.
    """
    if reward.shape[1] > LONG:
        return _by_doubling(reward, discount, value, lam, follows)
    after = value[:, -1]
    out = []
    for t in reversed(range(reward.shape[1])):
        after = reward[:, t] + discount[:, t] * ((1 - lam) * value[:, t + 1] + lam * after)
        out.append(after)
        if follows is not None:
            after = torch.where(follows[:, t], after, value[:, t])
    return torch.stack(out[::-1], 1)


LONG = 256
"""Steps above which returns are computed by doubling, since a loop launches kernels of its own for every step."""


def _by_doubling(reward: Tensor, discount: Tensor, value: Tensor, lam: float, follows: Tensor | None) -> Tensor:
    """lambda_returns in log2 H rounds, by a parallel scan (Hillis and Steele 1986).

    After each round `own` sums twice as many steps, and `share` is the weight of the return that follows them.
    """
    own = reward + discount * (1 - lam) * value[:, 1:]
    share = discount * lam
    ends = torch.zeros_like(share, dtype=torch.bool)  # last steps, after which only the value counts
    ends[:, -1] = True
    if follows is not None:
        ends[:, :-1] |= ~follows[:, 1:]
    own = own + torch.where(ends, share * value[:, 1:], 0.0)
    share = torch.where(ends, 0.0, share)
    reach = 1
    while reach < own.shape[1]:
        own = torch.cat([own[:, :-reach] + share[:, :-reach] * own[:, reach:], own[:, -reach:]], 1)
        share = torch.cat([share[:, :-reach] * share[:, reach:], torch.zeros_like(share[:, -reach:])], 1)
        reach *= 2
    return own


class ReturnScale(torch.nn.Module):
    """max(floor, P95 - P5) of returns, averaged over updates. Advantages are divided by it (arXiv 2301.04104, eq.
    7)."""

    low: Tensor
    high: Tensor
    started: Tensor
    ends: Tensor

    def __init__(self, floor: float, rate: float = 0.01):
        super().__init__()
        self.floor = floor
        self.rate = rate
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("ends", torch.tensor([0.05, 0.95]), persistent=False)  # moved to the device once

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Update the averages with returns of any shape, and with those of other ranks; returns the scale, a scalar
        tensor."""
        low, high = torch.quantile(ranks.gathered(returns).flatten(), self.ends.to(returns)).unbind()
        # returns that are not finite must not spoil the averages of later updates
        finite = (high - low).isfinite()
        rate = torch.where(self.started, self.rate, 1.0)
        self.low.lerp_(torch.where(finite, low, self.low), rate)
        self.high.lerp_(torch.where(finite, high, self.high), rate)
        self.started.logical_or_(finite)
        return (self.high - self.low).clamp(min=self.floor)
