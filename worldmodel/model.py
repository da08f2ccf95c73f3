"""The world model: V and M with the objective and the heads, which the agent trains, acts with and dreams in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig, EncoderConfig, ForcingConfig, HeadsConfig
from longdream.worldmodel.dream import Clip, Starts
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.encoder import Encoder, Observed
from longdream.worldmodel.heads import RewardContinueHead
from longdream.worldmodel.objectives import objective_class
from longdream.worldmodel.objectives.base import Objective, Pass
from longdream.worldmodel.types import Batch, Loss


class Surprise(NamedTuple):
    """How far a row differs from M's prediction of it, each `(B,)` >= 0; 0 at the first row of an episode.

    latent: the objective's, a squared error or nats. reward: |expected - real|. end: nats, -log p(ended or not).
    """

    latent: Tensor
    reward: Tensor
    end: Tensor

    def total(self) -> Tensor:
        """Their sum, the surprise that weights replay and drives curiosity."""
        return self.latent + self.reward + self.end


class WorldModel(nn.Module):
    """V, M, the objective and the reward and continuation heads.

    Args:
        obs: what each observation key is. actions: A, the length of an encoded action.

    Raises:
        ValueError: configurations that do not fit together or do not fit the observations.
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
        self.encoder = Encoder(encoder, obs, kind.latent)
        self.dynamics = Dynamics(worldmodel, self.encoder.grid, self.encoder.channels, actions)
        accepted = inspect.signature(kind).parameters
        options = {"classes": encoder.classes, "actions": actions}
        options = {name: value for name, value in options.items() if name in accepted}
        self.objective: Objective = kind(forcing, self.dynamics, **options)
        self.trains_encoder = getattr(kind, "trains_encoder", False)
        """Whether V learns through M, by one loss with it, rather than by pictures alone."""
        self.exchanges_gradients = self.trains_encoder and encoder.shaped_by == "model"
        if self.trains_encoder:
            self.encoder.learn_through_model(self.dynamics.feature_size if self.exchanges_gradients else 0)
        self.reward_continue = RewardContinueHead(self.dynamics.feature_size, actions, heads.hidden, heads.bins)
        self.heads_config = heads
        self.steps = forcing.steps
        self.dreamt = 0
        """Steps dreamt so far, summed over the batch. A step in a CUDA graph counts when captured, not when
        replayed."""

    @property
    def feature_size(self) -> int:
        """F, the length of the feature that C sees."""
        return self.dynamics.feature_size

    def loss(self, batch: Batch, num_starts: int, decoded: int | None = None) -> tuple[Loss, Starts, Clip]:
        """M's loss over clips, and states to dream from.

        V has a loss of its own and M sees its latents detached, unless V learns through M (`trains_encoder`): then this
        is the loss of both.

        Args:
            num_starts: M, states per clip, of rows drawn at random.
            decoded: rows that are reconstructed where V learns through M, drawn at random; None: all.

        Returns:
            the loss; the B * M states, M of each clip, without gradient; and the clips, without gradient.
        """
        loss, out = self.clip_loss(batch, num_starts, decoded=decoded)
        valid, cont = self._transitions(batch, out)
        rows = torch.arange(len(out.feat), device=out.feat.device)[:, None]
        feat = out.feat.detach()
        ended = batch.terminated[rows, out.at]
        starts = Starts(feat[rows, out.at].flatten(0, 1), out.start_states, (~ended).float().flatten())
        return loss, starts, Clip(feat, batch.reward[:, 1:], cont, valid & out.clean[:, 1:])

    def clip_loss(
        self,
        batch: Batch,
        num_starts: int,
        state: State | None = None,
        decoded: int | None = None,
    ) -> tuple[Loss, Pass]:
        """M's loss over clips without dreams: the objective's and, unless their weight is 0, the heads'.

        Args:
            num_starts, decoded: see `loss`.
            state: M's before row 0 of each clip, from which the clip continues unless its row 0 is_first. None: every
                clip begins without memory.

        Returns:
            the loss, and the objective's pass; given a state, that holds the state after the clip too.
        """
        options: dict[str, Any] = {}
        if self.trains_encoder:
            z, options["posterior"] = self.encoder.posterior(batch.obs)
        else:
            with torch.no_grad():
                z = self.encoder(batch.obs)
        first = batch.clip_first() if state is None else batch.is_first
        if state is not None:
            options["state"] = state
        seen = z if self.exchanges_gradients else z.detach()
        out = self.objective.run(self.dynamics, seen, batch.prev_action(), first, num_starts, **options)
        if self.trains_encoder and torch.is_grad_enabled():
            error, metrics = self._reconstruction(batch, z, out.feat, decoded)
            out = out._replace(loss=out.loss + error, metrics={**out.metrics, **metrics})
        if not self.heads_config.reward_weight:
            return Loss(out.loss, out.metrics), out
        valid, cont = self._transitions(batch, out)
        value, metrics = self.reward_continue.loss(
            out.feat[:, :-1], batch.action[:, :-1], batch.reward[:, 1:], cont, valid.float()
        )
        return Loss(out.loss + self.heads_config.reward_weight * value, {**out.metrics, **metrics}), out

    def _reconstruction(self, batch: Batch, z: Tensor, feat: Tensor, rows: int | None) -> Loss:
        """V's reconstruction of `rows` rows of the batch, drawn at random, from their latents and M's features."""
        total = batch.reward.numel()
        index = torch.arange(total, device=z.device)
        if rows is not None and rows < total:
            index = torch.randperm(total, device=z.device)[:rows]
        obs = {key: value.flatten(0, 1)[index] for key, value in batch.obs.items()}
        return self.encoder.reconstruction(z.flatten(0, 1)[index], feat.flatten(0, 1)[index], obs)

    @staticmethod
    def _transitions(batch: Batch, out: Pass) -> tuple[Tensor, Tensor]:
        """Of each pair of rows t and t + 1, `(B, T - 1)`: whether the heads can learn from it, and whether the episode
        continued (1) or terminated (0).

        They can unless row t + 1 begins an episode or feat_t has seen noised frames.
        """
        return out.clean[:, :-1] & ~batch.is_first[:, 1:], (~batch.terminated[:, 1:]).float()

    @torch.no_grad()
    def commit(self, state: State, z: Tensor, prev_action: Tensor, is_first: Tensor) -> tuple[Tensor, State]:
        """Take in one real frame; see `Dynamics.commit`."""
        return self.dynamics.commit(state, z, prev_action, is_first)

    @torch.no_grad()
    def dream_step(
        self, feat: Tensor, state: State, action: Tensor, temperature: float | Tensor = 1.0, steps: int | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """One dreamt step, counted in `dreamt`: action `(B, A)`, taken at feat `(B, F)`, to the next z, feat and
        state."""
        self.dreamt += len(action)
        return self.advance(feat, state, action, temperature, steps or self.steps)

    @torch.no_grad()
    def advance(
        self, feat: Tensor, state: State, action: Tensor, temperature: float | Tensor, steps: int
    ) -> tuple[Tensor, Tensor, State]:
        """`dream_step` without the count, so that it can be compiled; steps: denoising steps."""
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
        """Compare a row with M's prediction of it.

        Args:
            feat, state, action: before the row. z, reward, terminated, is_first: of the row, each leading with B.
        """
        latent = self.objective.surprise(self.dynamics, feat, state, action, z)
        expected, cont = self.reward_continue.expect(feat, action)
        end = -torch.where(terminated, 1 - cont, cont).clamp(min=1e-6).log()
        return Surprise(*(torch.where(is_first, 0.0, v) for v in (latent, (expected - reward).abs(), end)))
