"""A learned prior that V's posterior is pulled towards: V learns through M.

As in DreamerV2 and V3 (Hafner et al. 2021, arXiv 2010.02193, equation 2; 2023, arXiv 2301.04104, equation 5): the prior
p(z_{t+1} | feat_t, a_t) learns to predict the posterior q(z_{t+1} | o_{t+1}) that V gives, and V learns, at a tenth of
that weight, to be predicted. Latents are sampled in training and in dreams.

None of this asks M for more than the next frame needs. Two further heads, used in training alone, give it a reason to
remember: one looks some frames ahead, the other (`forcing.past`) tells frames of the past.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from longdream.worldmodel import ranks
from longdream.worldmodel.categorical import cross_entropy, draw_one_hots, kl_divergence, uniform_mixture
from longdream.worldmodel.config import ForcingConfig
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.encoder import UNIMIX
from longdream.worldmodel.networks import mark_training_only, mlp
from longdream.worldmodel.objectives.base import Pass

POSTERIOR_WEIGHT = 0.1
"""Weight of the KL loss that moves the posterior towards the prior (beta_rep); that of the other is 1 (beta_dyn)."""
AHEAD = 8
"""Frames that the second head looks ahead."""
AHEAD_WEIGHT = 0.3
HIDDEN = 256
"""Least width of the prior's MLP with worldmodel.predict_residual: changes of 16 variables did not go through 64."""
KEPT = 4.0
"""Logit of the class of the frame before, at first, with worldmodel.predict_residual."""
LAG_FREQUENCIES = 8
"""Frequencies of the sines and cosines that say how far back a frame lies."""


class Prior(nn.Module):
    """The prior of frame t + 1 from (feat_t, a_t); a prediction of frame t + AHEAD from feat_t and the actions in
    between; and, with `forcing.past`, one of frame t - k from feat_t and a lag k."""

    latent: Literal["continuous", "categorical"] = "categorical"
    trains_encoder = True
    capturable = True

    def __init__(self, config: ForcingConfig, dynamics: Dynamics, classes: int, actions: int):
        super().__init__()
        self.classes = classes
        hidden = dynamics.config.width
        size = dynamics.tokens * dynamics.channels
        residual = dynamics.config.predict_residual
        self.head = mlp(dynamics.feature_size + actions, max(hidden, HIDDEN * residual), size)
        self.keep: nn.Linear | None = None
        if residual:
            self.keep = nn.Linear(dynamics.channels, dynamics.channels, bias=False)
            nn.init.eye_(self.keep.weight).data.mul_(KEPT)
        self.ahead = mlp(dynamics.feature_size + AHEAD * actions, hidden, size)
        mark_training_only(self, "ahead")
        self.free_nats = config.free_nats
        self.past_weight = config.past
        self.past: nn.Module | None = None
        if config.past:
            self.past = mlp(dynamics.feature_size + 2 * LAG_FREQUENCIES, hidden, size)
            mark_training_only(self, "past")

    def run(
        self,
        dynamics: Dynamics,
        z: Tensor,
        prev_action: Tensor,
        first: Tensor,
        num_starts: int,
        state: State | None = None,
        posterior: Tensor | None = None,
    ) -> Pass:
        """See `Objective.run`. z: sampled one-hots, with V's gradient. posterior: `(B, T, N, D)`, log-probabilities of
        V, with its gradient; None where V is not trained: z then stands for it."""
        batch, frames = z.shape[:2]
        ones = torch.ones(batch, frames, device=z.device)
        at = torch.randint(0, frames, (batch, num_starts), device=z.device)
        before = dynamics.initial(batch, z.device) if state is None else state
        out = dynamics(z, prev_action, ones, first, before, None, at)
        loss, metrics = self.losses(out.feat, prev_action, first, z, posterior)
        assert out.states_at is not None
        end = None if state is None else out.state
        return Pass(loss, metrics, out.feat, ones.bool(), at, out.states_at, end)

    def losses(
        self, feat: Tensor, prev_action: Tensor, first: Tensor, z: Tensor, posterior: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a clip, given M's features `(B, T, F)` of it, and metrics. The rest as `run`."""
        prior = self._prior(feat[:, :-1], prev_action[:, 1:], z[:, :-1])
        predicted = ~first[:, 1:]  # the first frame of an episode has nothing to be predicted from
        total = ranks.total_weight(predicted)
        metrics: dict[str, Tensor] = {}
        if posterior is None:
            nats = -(z[:, 1:] * prior).sum((-2, -1))
            loss = (nats * predicted).sum() / total
        else:
            target = posterior[:, 1:]
            to_posterior = kl_divergence(target.detach(), prior)
            to_prior = kl_divergence(target, prior.detach())
            loss = (to_posterior.clamp(min=self.free_nats) * predicted).sum() / total
            loss = loss + POSTERIOR_WEIGHT * ((to_prior.clamp(min=self.free_nats) * predicted).sum() / total)
            metrics["kl"] = ((to_posterior * predicted).sum() / total).detach()
        if z.shape[1] > AHEAD:
            ahead = self._ahead_loss(feat, prev_action, first, z.detach())
            metrics["ahead"] = ahead.detach()
            loss = loss + AHEAD_WEIGHT * ahead
        if self.past is not None:
            past = self._past_loss(self.past, feat, first, z.detach())
            metrics["past"] = past.detach()
            loss = loss + self.past_weight * past
        metrics["prediction"] = loss.detach()
        return loss, metrics

    def _ahead_loss(self, feat: Tensor, prev_action: Tensor, first: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy of frame t + AHEAD, in nats per frame, where no episode begins in between."""
        frames = z.shape[1] - AHEAD
        # actions a_t to a_{t + AHEAD - 1}, side by side
        actions = prev_action[:, 1:].unfold(1, AHEAD, 1).transpose(-1, -2).flatten(-2)
        log_probs = self._log_probs(self.ahead, feat[:, :frames], actions, z[:, AHEAD:])
        episode = first.long().cumsum(1)
        same = episode[:, AHEAD:] == episode[:, :frames]
        return (-(z[:, AHEAD:] * log_probs).sum((-2, -1)) * same).sum() / ranks.total_weight(same)

    def _past_loss(self, head: nn.Module, feat: Tensor, first: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy of a frame of each frame's past, in nats per frame, at a lag drawn anew for each: evenly on a
        logarithmic scale up to the length of the clip, so that near and far are asked for alike."""
        length = z.shape[1]
        lag = torch.rand(first.shape, device=z.device).mul(math.log(length)).exp().long()
        frames, known = frames_before(z, first, lag)
        log_probs = self._log_probs(head, feat, lag_embedding(lag, length), frames)
        return (-(frames * log_probs).sum((-2, -1)) * known).sum() / ranks.total_weight(known)

    def sample(
        self,
        dynamics: Dynamics,
        feat: Tensor,
        state: State,
        action: Tensor,
        steps: int,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """See `Objective.sample`."""
        return draw_one_hots(self._prior(feat, action, state.last), self.classes, temperature)

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy `(B,)` of the prior, in nats per variable."""
        log_probs = self._prior(feat, action, state.last)
        return cross_entropy(log_probs, z, self.classes).mean((-2, -1))

    def _prior(self, feat: Tensor, action: Tensor, last: Tensor) -> Tensor:
        """Log-probabilities `(..., N, D)` of the frame after feat `(..., F)`, action `(..., A)` and the latents `last`
        `(..., N, D)`."""
        logits = self.head(torch.cat([feat, action], -1)).view_as(last)
        if self.keep is not None:
            logits = logits + self.keep(last)
        return uniform_mixture(logits, self.classes, UNIMIX).log()

    def _log_probs(self, head: nn.Module, feat: Tensor, known: Tensor, like: Tensor) -> Tensor:
        """Log-probabilities of the shape of `like` `(..., N, D)`, from feat `(..., F)` and what else is known
        `(..., K)`."""
        return uniform_mixture(head(torch.cat([feat, known], -1)).view_as(like), self.classes, UNIMIX).log()


def frames_before(z: Tensor, first: Tensor, lag: Tensor) -> tuple[Tensor, Tensor]:
    """The frame that lies `lag` `(B, T)` frames, 1 or more, before each frame of z `(B, T, N, D)`; and whether there is
    one, `(B, T)`: an episode begins where `first` `(B, T)` is true."""
    batch, frames = first.shape
    rows = torch.arange(batch, device=z.device)[:, None]
    at = torch.arange(frames, device=z.device) - lag
    there = at.clamp(min=0)
    episode = first.long().cumsum(1)
    return z[rows, there], (at >= 0) & (episode[rows, there] == episode)


def lag_embedding(lag: Tensor, length: int) -> Tensor:
    """Sines and cosines of lags `(...)` in clips of a length, at wavelengths from 2 pi to 2 pi `length`: `(..., 2
    LAG_FREQUENCIES)`."""
    wavelengths = torch.linspace(0, math.log(length), LAG_FREQUENCIES, device=lag.device).exp()
    angle = lag[..., None] / wavelengths
    return torch.cat([angle.sin(), angle.cos()], -1)
