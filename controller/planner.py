"""Planning in M at every real step: the cross-entropy method (PlaNet, Hafner et al. 2019, arXiv 1811.04551, algorithm
2) and model predictive path integral control with a learnt value and policy (TD-MPC, Hansen et al. 2022, arXiv
2203.04955, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from longdream.controller.actor_critic import ActorCritic
from longdream.controller.distributions import draw_factors, likeliest_factors
from longdream.controller.types import ControllerConfig
from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts, imagine
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.types import Loss

FLOOR = 0.1
"""What is left of uncertainty: deviation of boxes, and share of a uniform distribution over classes. Without some, the
first lucky candidates would decide."""


class Planner(nn.Module):
    """Draws sequences of actions, dreams them, draws again around the best; does the first action of what remains.

    With method mppi an actor-critic learns in dreams beside: its value stands for what comes after the horizon, and
    its policy proposes candidates. With cem there is nothing to learn, and rewards beyond the horizon are not seen.
    Every real step plans anew: no plan is carried over.

    Raises:
        ValueError: more elites than candidates.
    """

    def __init__(self, config: ControllerConfig, features: int, parts: Sequence[int], actions: int):
        super().__init__()
        self.config, self.parts, self.actions = config, tuple(parts), actions
        told = config.planner
        if told.elites > told.candidates:
            raise ValueError(f"controller.planner.elites = {told.elites} of {told.candidates} candidates: use less")
        self.guide = ActorCritic(config, features, parts, actions) if told.method == "mppi" else None

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        """Without looking ahead: what the guide would do, or anything."""
        if self.guide is not None:
            return self.guide.act(feat, greedy)
        return self._draw(self._nothing_known(feat, 1), 1)[:, 0, 0]

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
        told, batch = self.config.planner, len(feat)
        plan = self._nothing_known(feat, told.horizon)
        pool = self._proposals(model, feat, state)
        for _ in range(told.iterations):
            drawn = self._draw(plan, told.candidates)
            dream = self._dream(model, feat, state, drawn)
            found = drawn, self._worth(dream).view(batch, -1)
            actions, worth = (torch.cat(both, 1) for both in zip(pool, found, strict=True)) if pool else found
            best, index = worth.topk(told.elites, 1)
            elites = actions.gather(1, index[:, :, None, None].expand(-1, -1, *actions.shape[2:]))
            plan = self._around(elites, self._weights(best))
        first = plan[0][:, :1], plan[1][:, :1]
        return self._likeliest(first) if greedy else self._draw(first, 1)[:, 0, 0]

    # -- candidates: (n, K, H, A) -------------------------------------------------------------------------------------

    def _dream(self, model: Dreamer, feat: Tensor, state: State, actions: Tensor) -> Dream:
        """Dreams `(n * K, H)` under given actions `(n, K, H, A)`."""
        steps = iter(actions.flatten(0, 1).unbind(1))
        return imagine(model, _copies(feat, state, actions.shape[1]), lambda _: next(steps), actions.shape[2])

    def _proposals(self, model: Dreamer, feat: Tensor, state: State) -> tuple[Tensor, Tensor] | None:
        """What the policy would do, `(n, K, H, A)`, and what it would bring `(n, K)`."""
        told = self.config.planner
        if self.guide is None or not told.proposals:
            return None
        starts = _copies(feat, state, told.proposals)
        dream = imagine(model, starts, lambda feat: self.act(feat, False).clamp(-1, 1), told.horizon)
        return dream.action.unflatten(0, (len(feat), -1)), self._worth(dream).view(len(feat), -1)

    def _worth(self, dream: Dream) -> Tensor:
        """Return of each dream, with what its last state is worth, if there is a value."""
        discount = self.config.gamma * dream.cont
        reached = torch.cat([torch.ones_like(discount[:, :1]), discount], 1).cumprod(1)
        worth = (reached[:, :-1] * dream.reward).sum(1)
        return worth if self.guide is None else worth + reached[:, -1] * self.guide.value(dream.feat[:, -1])

    def _weights(self, best: Tensor) -> Tensor:
        """Of elites with returns `(n, E)`, best first."""
        if self.guide is None:
            return torch.full_like(best, 1 / best.shape[1])
        gap = (best[:, :1] - best[:, -1:]).clamp(min=1e-6)
        return ((best - best[:, :1]) / (self.config.planner.temperature * gap)).softmax(1)

    # -- distributions over sequences: probabilities (n, H, A) of factors' classes, or mean and deviation of boxes -----

    def _nothing_known(self, like: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
        zeros = like.new_zeros(len(like), horizon, self.actions)
        if not self.parts:
            return zeros, zeros + 1
        return zeros + torch.cat([like.new_full((n,), 1 / n) for n in self.parts]), zeros

    def _draw(self, plan: tuple[Tensor, Tensor], count: int) -> Tensor:
        middle, deviation = (v[:, None].expand(-1, count, -1, -1) for v in plan)
        if self.parts:
            return draw_factors(middle.split(list(self.parts), -1))
        return (middle + deviation * torch.randn_like(middle)).clamp(-1, 1)

    def _around(self, elites: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight[:, :, None, None]
        mean = (weight * elites).sum(1)
        if not self.parts:
            spread = (weight * (elites - mean[:, None]).square()).sum(1).sqrt()
            return mean, spread.clamp(min=FLOOR)
        uniform, zeros = self._nothing_known(mean.flatten(1), mean.shape[1])
        return torch.lerp(mean, uniform, FLOOR), zeros

    def _likeliest(self, first: tuple[Tensor, Tensor]) -> Tensor:
        middle = first[0][:, 0]
        return likeliest_factors(middle.split(list(self.parts), -1)) if self.parts else middle


def _copies(feat: Tensor, state: State, count: int) -> Starts:
    """Every moment `count` times, copies side by side."""
    feat, state = pytree.tree_map(lambda t: t.repeat_interleave(count, 0), (feat, state))
    return Starts(feat, state, torch.ones_like(feat[:, 0]))
