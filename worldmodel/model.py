"""V and M together: what the agent trains, acts with and dreams in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longdream.worldmodel import dream
from longdream.worldmodel.dream import Clip, Starts
from longdream.worldmodel.dynamics import Dynamics, DynamicsConfig, State
from longdream.worldmodel.encoder import Encoder, EncoderConfig, Observed
from longdream.worldmodel.heads import Consequence
from longdream.worldmodel.objectives.base import Flow, ForcingConfig, Mask, Objective, Pass, Teacher
from longdream.worldmodel.types import Batch, Loss, named


@dataclass(frozen=True)
class HeadsConfig:
    """Reward and continuation heads."""

    hidden: int = 128
    bins: int = 255
    """Bins of the two-hot reward."""
    reward_weight: float = 1.0
    cont_weight: float = 1.0
    dreamt: float = 0.0
    """Weight of both losses on dreams under the actions that were really taken, beside real frames: what M's dreams
    look like then promises no more than what came of it."""


class Surprise(NamedTuple):
    """The difference between what M expected of a row and what came, each `(B,)`, >= 0; 0 at the first row of an
    episode.

    latent: the objective's (squared error or nats). reward: |expected - real|. end: nats, -log p(what happened).
    """

    latent: Tensor
    reward: Tensor
    end: Tensor

    def total(self) -> Tensor:
        """Their sum, the surprise that weights replay and feeds curiosity."""
        return self.latent + self.reward + self.end


Follow = Callable[[Starts, Tensor], Tensor]


def start_weight(batch: Batch, share: float, reach: int) -> Tensor:
    """How likely each row of clips is to be dreamt from, `(B, T)`, if `share` of the moments shall lie at most `reach`
    rows before a reward; in a clip without, all rows alike."""
    rewarded, episode = batch.reward != 0, batch.is_first.long().cumsum(1)
    near = torch.zeros_like(rewarded)
    for ahead in range(1, min(reach, rewarded.shape[1] - 1) + 1):
        near[:, :-ahead] |= rewarded[:, ahead:] & (episode[:, ahead:] == episode[:, :-ahead])
    count = near.sum(1, keepdim=True)
    led = torch.where(count > 0, share, 0.0)
    return (1 - led) / near.shape[1] + led * near / count.clamp(min=1)


class WorldModel(nn.Module):
    """V, M, the objective and the reward and continuation heads.

    Args:
        obs: what each observation key is. actions: A, the length of an encoded action.
    """

    def __init__(
        self,
        obs: Mapping[str, Observed],
        actions: int,
        encoder: EncoderConfig,
        worldmodel: DynamicsConfig,
        forcing: ForcingConfig,
        heads: HeadsConfig,
    ):
        super().__init__()
        kind = objective_class(forcing.objective)
        if encoder.latent not in ("auto", kind.latent):
            raise ValueError(
                f"encoder.latent = {encoder.latent} but forcing.objective = {forcing.objective} needs {kind.latent} "
                f"latents: set encoder.latent to auto"
            )
        self.encoder = Encoder(replace(encoder, latent=kind.latent), obs)
        self.dynamics = Dynamics(worldmodel, self.encoder.grid, self.encoder.channels, actions)
        wanted = inspect.signature(kind).parameters
        offered = {"classes": encoder.classes, "actions": actions}
        self.objective: Objective = kind(forcing, self.dynamics, **{k: v for k, v in offered.items() if k in wanted})
        self.consequence = Consequence(self.dynamics.feature_size, actions, heads.hidden, heads.bins)
        self.heads, self.steps = heads, forcing.steps
        self.dreamt = 0
        """Steps dreamt so far, over all copies; a CUDA graph counts when it is recorded and not when it is replayed."""

    @property
    def feature_size(self) -> int:
        """F, what C sees."""
        return self.dynamics.feature_size

    def loss(
        self, batch: Batch, starts: int, weight: Tensor | None = None, ahead: int = 2, follow: Follow | None = None
    ) -> tuple[Loss, Starts, Clip]:
        """M's loss over clips, and moments to dream from. V is trained by its own loss; its latents enter detached.

        Args:
            starts: moments per clip. weight: `(B, T)`, how likely each row is to be one, sums to 1; None: all alike.
            ahead: steps that the heads are to foresee from each moment, where they learn from dreams.
            follow: `follow` of this model (worldmodel/dream.py), or what does the same faster.

        Returns:
            the loss; B * M moments, `starts` = M drawn from each clip; and the clips, both without gradient.
        """
        (value, metrics), out = self.study(batch, starts, weight)
        known, alive = self._consequences(batch, out)
        rows = torch.arange(len(out.feat), device=out.feat.device)[:, None]
        feat, ended = out.feat.detach(), batch.terminated[rows, out.at]
        moments = Starts(feat[rows, out.at].flatten(0, 1), out.starts, (~ended).float().flatten())
        clip = Clip(feat, batch.reward[:, 1:], alive, known & out.clean[:, 1:])
        if self.heads.dreamt and torch.is_grad_enabled():  # no dream for those who want the moments alone
            found, dreamt = self._dreamt_loss(
                batch, out.at, moments, weight, ahead, follow or partial(dream.follow, self)
            )
            value = value + self.heads.dreamt * found
            metrics |= {f"dreamt_{key}": each for key, each in dreamt.items()}
        return Loss(value, metrics), moments, clip

    def study(
        self, batch: Batch, starts: int, weight: Tensor | None = None, state: State | None = None
    ) -> tuple[Loss, Pass]:
        """M's loss over clips alone: the objective's and, where they weigh anything, the heads'. As `loss` otherwise.

        Args:
            state: M's before row 0 of each clip, which goes on with it unless it is_first; the pass has the one after
                the clip. None: every clip begins without memory.
        """
        with torch.no_grad():
            z = self.encoder(batch.obs)
        first = batch.clip_first() if state is None else batch.is_first
        told: dict[str, Any] = {
            key: value for key, value in (("weight", weight), ("state", state)) if value is not None
        }
        out = self.objective.run(self.dynamics, z, batch.prev_action(), first, starts, **told)
        if not any(self._of_heads):
            return Loss(out.loss, out.metrics), out
        known, alive = self._consequences(batch, out)
        found, metrics = self.consequence.loss(
            out.feat[:, :-1], batch.action[:, :-1], batch.reward[:, 1:], alive, known.float(), self._of_heads
        )
        return Loss(out.loss + found, {**out.metrics, **metrics}), out

    @staticmethod
    def _consequences(batch: Batch, out: Pass) -> tuple[Tensor, Tensor]:
        """Whether row t + 1 is the consequence of (feat_t, a_t), which it is unless it begins a new episode, and
        whether things went on there, each `(B, T - 1)`."""
        return out.clean[:, :-1] & ~batch.is_first[:, 1:], (~batch.terminated[:, 1:]).float()

    @property
    def _of_heads(self) -> tuple[float, float]:
        return self.heads.reward_weight, self.heads.cont_weight

    def _dreamt_loss(
        self, batch: Batch, at: Tensor, moments: Starts, weight: Tensor | None, ahead: int, follow: Follow
    ) -> Loss:
        """The heads' loss on what M dreams from the moments after rows `at` `(B, M)`, under the actions that were
        taken, against what came. Moments that were drawn more often count less."""
        rows, length = torch.arange(len(at), device=at.device)[:, None, None], batch.reward.shape[1]
        when = at[..., None] + torch.arange(1, ahead + 1, device=at.device)
        episode = batch.is_first.long().cumsum(1)
        inside, when = when < length, when.clamp(max=length - 1)
        inside = inside & (episode[rows, when] == episode[rows, at[..., None]])
        action = batch.action[rows, when - 1].flatten(0, 1)
        rarity = torch.ones_like(when[..., :1]) if weight is None else 1 / (length * weight[rows, at[..., None]])
        feat = follow(moments, action[:, :-1])
        later = when[..., 1:]
        reward, alive = batch.reward[rows, later].flatten(0, 1), (~batch.terminated[rows, later]).float().flatten(0, 1)
        counts = (inside[..., 1:] * rarity).flatten(0, 1)
        return self.consequence.loss(feat, action[:, 1:], reward, alive, counts, self._of_heads)

    @torch.no_grad()
    def commit(self, state: State, z: Tensor, prev_action: Tensor, is_first: Tensor) -> tuple[Tensor, State]:
        """Take in one real or dreamt frame; see Dynamics.commit."""
        return self.dynamics.commit(state, z, prev_action, is_first)

    @torch.no_grad()
    def dream_step(
        self, feat: Tensor, state: State, action: Tensor, temperature: float = 1.0, steps: int | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """One dreamt step: action `(B, A)` taken at feat `(B, F)` to the next z, feat and state. They are counted in
        `dreamt`."""
        self.dreamt += len(action)
        return self.advance(feat, state, action, temperature, steps or self.steps)

    @torch.no_grad()
    def advance(
        self, feat: Tensor, state: State, action: Tensor, temperature: float, steps: int
    ) -> tuple[Tensor, Tensor, State]:
        """As `dream_step`, in so many denoising steps, and not counted in `dreamt`: what can be compiled of it."""
        z = self.objective.sample(self.dynamics, feat, state, action, steps, temperature)
        feat, state = self.dynamics.commit(state, z, action, None)
        return z, feat, state

    @torch.no_grad()
    def surprise(
        self,
        feat: Tensor,
        state: State,
        action: Tensor,
        z: Tensor,
        reward: Tensor,
        terminated: Tensor,
        is_first: Tensor,
    ) -> Surprise:
        """Set what came (z, reward, terminated, each leading with B) against what M expected after (feat, state,
        action)."""
        latent = self.objective.surprise(self.dynamics, feat, state, action, z)
        expected, cont = self.consequence.expect(feat, action)
        end = -torch.where(terminated, 1 - cont, cont).clamp(min=1e-6).log()
        return Surprise(*(torch.where(is_first, 0.0, v) for v in (latent, (expected - reward).abs(), end)))


def objective_class(name: str) -> type:
    """The class behind `forcing.objective`: a known word or a dotted path `package.module:Class`.

    Raises:
        ValueError: neither.
    """
    return named("forcing.objective", name, {"flow": Flow, "mask": Mask, "teacher": Teacher})
