"""V and M together: what the agent trains, acts with and dreams in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.dream import Clip, Starts
from worldmodel.dynamics import Dynamics, DynamicsConfig, State
from worldmodel.encoder import Encoder, EncoderConfig, Observed
from worldmodel.forcing import Flow, ForcingConfig, Mask, Objective, Teacher
from worldmodel.heads import Consequence
from worldmodel.types import Batch, Loss


@dataclass(frozen=True)
class HeadsConfig:
    """Reward and continuation heads."""

    hidden: int = 128
    bins: int = 255
    """Bins of the two-hot reward."""
    reward_weight: float = 1.0
    cont_weight: float = 1.0


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


class Decisive(NamedTuple):
    """That the share of moments to dream from lies at most `reach` rows before a reward, where there is one."""

    share: float
    reach: int


def start_weight(batch: Batch, decisive: Decisive) -> Tensor:
    """How likely each row of clips is to be dreamt from, `(B, T)`; all rows are where no reward follows."""
    rewarded, episode = batch.reward != 0, batch.is_first.long().cumsum(1)
    near = torch.zeros_like(rewarded)
    for ahead in range(1, min(decisive.reach, rewarded.shape[1] - 1) + 1):
        near[:, :-ahead] |= rewarded[:, ahead:] & (episode[:, ahead:] == episode[:, :-ahead])
    count = near.sum(1, keepdim=True)
    share = torch.where(count > 0, decisive.share, 0.0)
    return (1 - share) / near.shape[1] + share * near / count.clamp(min=1)


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

    def loss(self, batch: Batch, starts: int, decisive: Decisive | None = None) -> tuple[Loss, Starts, Clip]:
        """M's loss over clips, and moments to dream from. V is trained by its own loss; its latents enter detached.

        Returns:
            the loss; B * M moments, `starts` = M drawn from each clip; and the clips, both without gradient.
        """
        with torch.no_grad():
            z = self.encoder(batch.obs)
        first = batch.clip_first()
        leaning = {} if decisive is None else {"weight": start_weight(batch, decisive)}
        out = self.objective.run(self.dynamics, z, batch.prev_action(), first, starts, **leaning)
        # row t + 1 is the consequence of (feat_t, a_t), unless it begins a new episode
        known = out.clean[:, :-1] & ~batch.is_first[:, 1:]
        reward_logits, cont_logit = self.consequence(out.feat[:, :-1], batch.action[:, :-1])
        reward = self.consequence.two_hot.loss(reward_logits, batch.reward[:, 1:])
        alive = (~batch.terminated[:, 1:]).float()
        cont = F.binary_cross_entropy_with_logits(cont_logit.float(), alive, reduction="none")
        reward, cont = ((v * known).sum() / known.sum().clamp(min=1) for v in (reward, cont))
        value = out.loss + self.heads.reward_weight * reward + self.heads.cont_weight * cont
        rows = torch.arange(len(z), device=z.device)[:, None]
        feat, ended = out.feat.detach(), batch.terminated[rows, out.at]
        moments = Starts(feat[rows, out.at].flatten(0, 1), out.starts, (~ended).float().flatten())
        clip = Clip(feat, batch.reward[:, 1:], alive, known & out.clean[:, 1:])
        metrics = {**out.metrics, "reward": reward.detach(), "cont": cont.detach()}
        return Loss(value, metrics), moments, clip

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
        z = self.objective.sample(self.dynamics, feat, state, action, steps or self.steps, temperature)
        go_on = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        feat, state = self.dynamics.commit(state, z, action, go_on)
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
    known = {"flow": Flow, "mask": Mask, "teacher": Teacher}
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"forcing.objective = {name}: use one of {', '.join(known)} or package.module:Class")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"forcing.objective = {name}: {error}") from None
