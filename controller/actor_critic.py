"""The default C: an actor-critic that learns in dreams, after DreamerV3 (Hafner et al. 2023, arXiv 2301.04104)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longdream.controller.config import ControllerConfig
from longdream.controller.distributions import Distribution, distribution, outputs
from longdream.controller.returns import ReturnScale, lambda_returns
from longdream.worldmodel import ranks
from longdream.worldmodel.dream import Clip, Dream
from longdream.worldmodel.heads import TwoHot
from longdream.worldmodel.networks import mark_training_only, mlp
from longdream.worldmodel.types import Loss

LAMBDA = 0.95
"""Of the lambda-returns, as in DreamerV3."""


class ActorCritic(nn.Module):
    """REINFORCE on lambda-returns, with a two-hot critic that is regularised towards a target critic, which is a moving
    average of it."""

    capturable = True

    def __init__(self, config: ControllerConfig, features: int, parts: Sequence[int], actions: int):
        super().__init__()
        self.config = config
        self.parts = tuple(parts)
        self.actor = mlp(features, config.hidden, outputs(parts, actions), config.layers, zero=True)
        self.two_hot = TwoHot(config.bins)
        self.critic = mlp(features, config.hidden, len(self.two_hot.bins), config.layers, zero=True)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        mark_training_only(self, "target", stand_in="critic")
        self.scale = ReturnScale(config.return_floor)

    def policy(self, feat: Tensor) -> Distribution:
        """The distribution over actions at feat `(..., F)`."""
        return distribution(self.actor(feat), self.parts, self.config.unimix)

    def value(self, feat: Tensor) -> Tensor:
        """Expected return `(...)` at feat `(..., F)`."""
        return self.two_hot.mean(self.critic(feat))

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        policy = self.policy(feat)
        return policy.mode() if greedy else policy.sample()

    def loss(self, dream: Dream) -> Loss:
        config = self.config
        discount = config.gamma * dream.cont
        logits = self.critic(dream.feat)
        value = self.two_hot.mean(logits.detach())
        returns = lambda_returns(dream.reward, discount, value, LAMBDA)
        # probability that the dream has not ended before a step, with the discount
        weight = torch.cat([dream.weight[:, None], discount[:, :-1]], 1).cumprod(1)
        total = ranks.total_weight(weight, 1e-6)

        policy = self.policy(dream.feat[:, :-1])
        advantage = (returns - value[:, :-1]) / self.scale.update(returns)
        if config.center_advantages:
            advantage = advantage - ranks.mean((weight * advantage).sum() / total)
        entropy = policy.entropy()
        actor = -(weight * (policy.gain(dream.action, advantage) + config.entropy * entropy)).sum() / total

        critic = (weight * self._value_loss(dream.feat[:, :-1], logits[:, :-1], returns)).sum() / total
        metrics = {
            "actor": actor.detach(),
            "critic": critic.detach(),
            "entropy": (weight * entropy.detach()).sum() / total,
            "return": returns.mean(),
            "return_scale": (self.scale.high - self.scale.low).clone(),
            "reward": dream.reward.mean(),
            "cont": dream.cont.mean(),
        }
        return Loss(actor + critic, metrics)

    def replay_loss(self, clip: Clip) -> Loss:
        """The critic's loss on lambda-returns of real clips (DreamerV3's replay value loss).

        Their actions come from earlier policies. Beyond about 1 / (1 - lam) steps the present values stand in for them.
        """
        logits = self.critic(clip.feat)
        value = self.two_hot.mean(logits.detach())
        returns = lambda_returns(clip.reward, self.config.gamma * clip.cont, value, LAMBDA, clip.known)
        known = clip.known.float()
        each = self._value_loss(clip.feat[:, :-1], logits[:, :-1], returns)
        loss = (known * each).sum() / ranks.total_weight(known)
        return Loss(loss, {"replay_critic": loss.detach()})

    def _value_loss(self, feat: Tensor, logits: Tensor, returns: Tensor) -> Tensor:
        """Loss `(...)` of the critic's logits at feat, towards the returns and towards the target critic."""
        with torch.no_grad():
            target = self.two_hot.mean(self.target(feat))
        return self.two_hot.loss(logits, returns) + self.two_hot.loss(logits, target)

    @torch.no_grad()
    def after_update(self) -> None:
        for target, weight in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            target.lerp_(weight, self.config.target_ema)
