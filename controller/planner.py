"""Planning in M at every real step: the cross-entropy method (PlaNet; Hafner et al. 2019, arXiv 1811.04551, algorithm
2) and model predictive path integral control with a learned value and policy (TD-MPC; Hansen et al. 2022, arXiv
2203.04955, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from longdream.controller.actor_critic import ActorCritic
from longdream.controller.config import ControllerConfig
from longdream.controller.distributions import draw_factors, likeliest_factors
from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts, imagine
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.fields import AT_LEAST_0, AT_LEAST_1, POSITIVE, validated
from longdream.worldmodel.types import Loss

MIN_UNCERTAINTY = 0.1
"""Least standard deviation of box actions, and share of a uniform distribution over classes. Without it, the search
would settle on the first lucky candidates."""


@dataclass(frozen=True)
class PlannerSettings:
    """`controller.kwargs` of `planner`. A real step costs M iterations * horizon dreamt steps of `candidates`
    copies."""

    method: Literal["cem", "mppi"] = "mppi"
    """cem: the cross-entropy method on dreamt rewards alone; only M is learned. mppi: candidates are weighted by their
    return, a learned value estimates the return beyond the horizon, and a learned policy proposes some candidates."""
    candidates: Annotated[int, AT_LEAST_1] = 64
    """Action sequences that are dreamt in each iteration."""
    elites: Annotated[int, AT_LEAST_1] = 8
    """The best of them, around which the next iteration samples."""
    iterations: Annotated[int, AT_LEAST_1] = 3
    """Rounds of sampling per real step."""
    horizon: Annotated[int, AT_LEAST_1] = 12
    """Steps of a plan."""
    proposals: Annotated[int, AT_LEAST_0] = 8
    """Additional candidates that the policy proposes (mppi)."""
    temperature: Annotated[float, POSITIVE] = 0.5
    """Softness of the elites' weights, in units of the gap between the best and the worst of them (mppi)."""


class Plan(NamedTuple):
    """A distribution over action sequences, each `(n, H, A)`.

    mean: probabilities of the factors' classes, or mean of box actions. deviation: standard deviation of box actions,
    unused for factors.
    """

    mean: Tensor
    deviation: Tensor


class Planner(nn.Module):
    """Samples action sequences, dreams them, samples again around the best, and takes the first action of the result.

    With mppi, an actor-critic (the guide) learns in dreams at the same time. Its value estimates the return beyond the
    horizon, and its policy proposes candidates. With cem nothing is learned, and rewards beyond the horizon are not
    seen. Every real step plans from scratch.

    Raises:
        ValueError: settings that do not exist or are out of range, or more elites than candidates.
    """

    def __init__(self, config: ControllerConfig, features: int, parts: Sequence[int], actions: int):
        super().__init__()
        self.config = config
        self.parts = tuple(parts)
        self.actions = actions
        self.settings = validated(PlannerSettings, config.kwargs, "controller.kwargs")
        if self.settings.elites > self.settings.candidates:
            raise ValueError(
                f"controller.kwargs.elites = {self.settings.elites} of {self.settings.candidates} candidates: use less"
            )
        self.guide = ActorCritic(config, features, parts, actions) if self.settings.method == "mppi" else None

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        """Without planning: an action of the guide, or a random one."""
        if self.guide is not None:
            return self.guide.act(feat, greedy)
        return self._sample(self._uninformed(feat, 1), 1)[:, 0, 0]

    def loss(self, dream: Dream) -> Loss:
        assert self.guide is not None
        return self.guide.loss(dream)

    def replay_loss(self, clip: Clip) -> Loss:
        assert self.guide is not None
        return self.guide.replay_loss(clip)

    def after_update(self) -> None:
        if self.guide is not None:
            self.guide.after_update()

    @torch.no_grad()
    def plan(self, model: Dreamer, feat: Tensor, state: State, greedy: bool) -> Tensor:
        settings = self.settings
        plan = self._uninformed(feat, settings.horizon)
        proposals = self._proposals(model, feat, state)
        for _ in range(settings.iterations):
            actions = self._sample(plan, settings.candidates)
            returns = self._returns(self._dream(model, feat, state, actions)).view(len(feat), -1)
            if proposals is not None:
                actions = torch.cat([proposals[0], actions], 1)
                returns = torch.cat([proposals[1], returns], 1)
            best, index = returns.topk(settings.elites, 1)
            elites = actions.gather(1, index[:, :, None, None].expand(-1, -1, *actions.shape[2:]))
            plan = self._around(elites, self._weights(best))
        first = Plan(plan.mean[:, :1], plan.deviation[:, :1])
        return self._likeliest(first) if greedy else self._sample(first, 1)[:, 0, 0]

    # -- candidates: (n, K, H, A) -------------------------------------------------------------------------------------

    def _dream(self, model: Dreamer, feat: Tensor, state: State, actions: Tensor) -> Dream:
        """Dreams `(n * K, H)` under given actions `(n, K, H, A)`."""
        steps = iter(actions.flatten(0, 1).unbind(1))
        return imagine(model, _copies(feat, state, actions.shape[1]), lambda _: next(steps), actions.shape[2])

    def _proposals(self, model: Dreamer, feat: Tensor, state: State) -> tuple[Tensor, Tensor] | None:
        """Actions `(n, K, H, A)` of the guide's policy and their returns `(n, K)`."""
        settings = self.settings
        if self.guide is None or not settings.proposals:
            return None
        starts = _copies(feat, state, settings.proposals)
        dream = imagine(model, starts, lambda feat: self.act(feat, False).clamp(-1, 1), settings.horizon)
        return dream.action.unflatten(0, (len(feat), -1)), self._returns(dream).view(len(feat), -1)

    def _returns(self, dream: Dream) -> Tensor:
        """Discounted return `(B,)` of each dream, with the guide's value of its last state."""
        discount = self.config.gamma * dream.cont
        weight = torch.cat([torch.ones_like(discount[:, :1]), discount], 1).cumprod(1)
        returns = (weight[:, :-1] * dream.reward).sum(1)
        return returns if self.guide is None else returns + weight[:, -1] * self.guide.value(dream.feat[:, -1])

    def _weights(self, best: Tensor) -> Tensor:
        """Weights of elites by their returns `(n, E)`, best first."""
        if self.guide is None:
            return torch.full_like(best, 1 / best.shape[1])
        gap = (best[:, :1] - best[:, -1:]).clamp(min=1e-6)
        return ((best - best[:, :1]) / (self.settings.temperature * gap)).softmax(1)

    # -- distributions over action sequences --------------------------------------------------------------------------

    def _uninformed(self, like: Tensor, horizon: int) -> Plan:
        """The plan before anything is known, for each row of `like`."""
        zeros = like.new_zeros(len(like), horizon, self.actions)
        if not self.parts:
            return Plan(zeros, zeros + 1)
        return Plan(zeros + torch.cat([like.new_full((n,), 1 / n) for n in self.parts]), zeros)

    def _sample(self, plan: Plan, count: int) -> Tensor:
        """`count` action sequences from each plan."""
        mean, deviation = (v[:, None].expand(-1, count, -1, -1) for v in plan)
        if self.parts:
            return draw_factors(mean.split(list(self.parts), -1))
        return (mean + deviation * torch.randn_like(mean)).clamp(-1, 1)

    def _around(self, elites: Tensor, weight: Tensor) -> Plan:
        """The plan fitted to elites `(n, E, H, A)` with weights `(n, E)`."""
        weight = weight[:, :, None, None]
        mean = (weight * elites).sum(1)
        if not self.parts:
            deviation = (weight * (elites - mean[:, None]).square()).sum(1).sqrt()
            return Plan(mean, deviation.clamp(min=MIN_UNCERTAINTY))
        uniform, zeros = self._uninformed(mean.flatten(1), mean.shape[1])
        return Plan(torch.lerp(mean, uniform, MIN_UNCERTAINTY), zeros)

    def _likeliest(self, first: Plan) -> Tensor:
        mean = first.mean[:, 0]
        return likeliest_factors(mean.split(list(self.parts), -1)) if self.parts else mean


def _copies(feat: Tensor, state: State, count: int) -> Starts:
    """`count` copies of every start, side by side."""
    feat, state = pytree.tree_map(lambda t: t.repeat_interleave(count, 0), (feat, state))
    return Starts(feat, state, torch.ones_like(feat[:, 0]))
