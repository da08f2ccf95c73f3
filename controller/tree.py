"""Tree search with the learned model, policy and value: Gumbel MuZero (Danihelka et al. 2022, "Policy improvement by
planning with Gumbel"), batched over B trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.controller.actor_critic import ActorCritic
from longdream.controller.config import ControllerConfig
from longdream.controller.distributions import Categoricals
from longdream.worldmodel.dream import Dreamer
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.fields import AT_LEAST_0, AT_LEAST_1, validated

MAX_ACTIONS = 256
"""Combinations of the factors' classes, at most."""


@dataclass(frozen=True)
class TreeSettings:
    """`controller.kwargs` of `tree`."""

    simulations: Annotated[int, AT_LEAST_1] = 16
    """Dreamt steps per real step."""
    considered: Annotated[int, AT_LEAST_1] = 4
    """Actions that are compared at the root."""
    visit_weight: Annotated[float, AT_LEAST_0] = 50.0
    """c_visit: added to the highest visit count in the weight of the values."""
    value_weight: Annotated[float, AT_LEAST_0] = 0.1
    """c_scale: weight of the values, scaled to [0, 1], against the policy's logits."""


class Tree(ActorCritic):
    """An actor-critic that searches before it acts in reality. Its weights are learned like those of an actor-critic.

    At the root, actions are sampled without replacement (those with the largest logits plus Gumbel noise; no noise
    where greedy) and reduced by sequential halving. Below it, visits follow the improved policy. Every edge is dreamt
    once. Several factors are searched as the product of their classes.

    Raises:
        ValueError: settings that do not exist or are out of range, box actions, or more than `MAX_ACTIONS`
            combinations.
    """

    capturable = True

    def __init__(self, config: ControllerConfig, features: int, parts: Sequence[int], actions: int):
        super().__init__(config, features, parts, actions)
        self.settings = validated(TreeSettings, config.kwargs, "controller.kwargs")
        if not parts or math.prod(parts) > MAX_ACTIONS:
            raise ValueError(
                f"controller.kind = tree needs discrete actions, {MAX_ACTIONS} combinations at most: use planner here"
            )
        grid = torch.cartesian_prod(*(torch.arange(n) for n in parts)).view(math.prod(parts), len(parts))
        one_hots = torch.cat([F.one_hot(grid[:, i], n) for i, n in enumerate(parts)], 1).float()
        self.register_buffer("encoded", one_hots, persistent=False)

    encoded: Tensor  # (number of joint actions, A)

    @torch.no_grad()
    def plan(self, model: Dreamer, feat: Tensor, state: State, greedy: bool) -> Tensor:
        settings = self.settings
        search = Search(self, model, feat, state, settings.simulations)
        logits = search.logits[:, 0]
        noise = torch.zeros_like(logits) if greedy else -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9)))
        score = logits + noise
        considered = min(settings.considered, len(self.encoded), settings.simulations)
        remaining = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(considered, 1).indices, True)
        for count, visits in halving(considered, settings.simulations):
            # keep the best `count` of the remaining actions, then visit each of them `visits` times, in turn
            remaining &= _among_best(score + search.sigma(0), remaining, count)
            for _ in range(visits):
                for rank in range(count):
                    order = torch.where(remaining, score, -torch.inf).argsort(1, descending=True)
                    search.simulate(order[:, rank])
        # the best of the actions with the most visits
        visits = search.visits[:, 0]
        most = remaining & (visits == torch.where(remaining, visits, -1).amax(1, keepdim=True))
        best = torch.where(most, score + search.sigma(0), -torch.inf).argmax(1)
        return self.encoded[best]

    def joint_logits(self, feat: Tensor) -> Tensor:
        """Log-probabilities `(B, actions)` of all combinations of factors."""
        policy = self.policy(feat)
        assert isinstance(policy, Categoricals)
        return torch.cat(policy.probs, -1).log() @ self.encoded.T


class Search:
    """B trees of up to `simulations` + 1 nodes; node 0 is the root. Children are made by dreaming.

    Attributes, by node:
        child: `(B, nodes, actions)`, 0 where not dreamt yet. parent: `(B, nodes)`. parent_action: `(B, nodes)`, the
            action that led to the node.
        reward, discount: `(B, nodes)`, of the edge that leads to the node. logits: `(B, nodes, actions)`, of the
        policy.
        value: `(B, nodes)`, of the critic.
        total, visits: `(B, nodes, actions)`, sum and number of the returns seen through each action.
    """

    def __init__(self, tree: Tree, model: Dreamer, feat: Tensor, state: State, simulations: int):
        self.tree = tree
        self.model = model
        batch = len(feat)
        nodes = simulations + 1
        actions = len(tree.encoded)
        self.feat_and_state: Any = pytree.tree_map(lambda t: t.new_zeros(batch, nodes, *t.shape[1:]), (feat, state))
        self.child = feat.new_zeros(batch, nodes, actions, dtype=torch.long)
        self.parent = feat.new_zeros(batch, nodes, dtype=torch.long)
        self.parent_action = feat.new_zeros(batch, nodes, dtype=torch.long)
        self.reward = feat.new_zeros(batch, nodes)
        self.discount = feat.new_zeros(batch, nodes)
        self.logits = feat.new_zeros(batch, nodes, actions)
        self.value = feat.new_zeros(batch, nodes)
        self.total = feat.new_zeros(batch, nodes, actions)
        self.visits = feat.new_zeros(batch, nodes, actions)
        self.rows = torch.arange(batch, device=feat.device)
        self.next = 0
        self._add(feat, state)

    def simulate(self, action: Tensor) -> None:
        """Descend from the root through `action` `(B,)`, dream one new edge, and back its return up the path."""
        node = torch.zeros_like(action)
        while bool((inside := (child := self.child[self.rows, node, action]) > 0).any()):
            node = torch.where(inside, child, node)
            action = torch.where(inside, self.next_action(node), action)
        child = self._dream(node, action)
        value = self.value[self.rows, child]
        below_root = torch.ones_like(inside)
        while bool(below_root.any()):
            backed_up = self.reward[self.rows, child] + self.discount[self.rows, child] * value
            value = torch.where(below_root, backed_up, value)
            self.total[self.rows, node, action] += torch.where(below_root, value, 0.0)
            self.visits[self.rows, node, action] += below_root.to(value.dtype)
            below_root = below_root & (node > 0)
            child = node
            action = self.parent_action[self.rows, node]
            node = self.parent[self.rows, node]

    def completed(self, node: int | Tensor) -> Tensor:
        """Values of all actions `(B, actions)`: the mean return where visited, else a mix of the critic's value and the
        visited actions' returns (equation 33)."""
        visits = self.visits[self.rows, node]
        mean = self.total[self.rows, node] / visits.clamp(min=1)
        prior = self.logits[self.rows, node].softmax(-1) * (visits > 0)
        visited = (prior * mean).sum(-1) / prior.sum(-1).clamp(min=1e-9)
        count = visits.sum(-1)
        mixed = (self.value[self.rows, node] + count * visited) / (1 + count)
        return torch.where(visits > 0, mean, mixed[:, None])

    def sigma(self, node: int | Tensor) -> Tensor:
        """sigma(q) `(B, actions)`: values scaled to [0, 1], times a weight that grows with visits (equation 8)."""
        settings = self.tree.settings
        value = self.completed(node)
        low = value.amin(-1, keepdim=True)
        high = value.amax(-1, keepdim=True)
        scaled = (value - low) / (high - low).clamp(min=1e-6)
        most = self.visits[self.rows, node].amax(-1, keepdim=True)
        return (settings.visit_weight + most) * settings.value_weight * scaled

    def next_action(self, node: Tensor) -> Tensor:
        """The action to try next at inner nodes `(B,)`: the one whose visits lag most behind the improved policy
        (equation 14)."""
        improved = (self.logits[self.rows, node] + self.sigma(node)).softmax(-1)
        visits = self.visits[self.rows, node]
        return (improved - visits / (1 + visits.sum(-1, keepdim=True))).argmax(-1)

    def _dream(self, node: Tensor, action: Tensor) -> Tensor:
        """The new node `(B,)` at the end of an edge."""
        feat, state = pytree.tree_map(lambda t: t[self.rows, node], self.feat_and_state)
        encoded = self.tree.encoded[action]
        reward, cont = self.model.reward_continue.expect(feat, encoded)
        _, feat, state = self.model.dream_step(feat, state, encoded)
        new = self.next
        self.child[self.rows, node, action] = new
        self.parent[:, new] = node
        self.parent_action[:, new] = action
        self.reward[:, new] = reward
        self.discount[:, new] = self.tree.config.gamma * cont
        self._add(feat, state)
        return torch.full_like(node, new)

    def _add(self, feat: Tensor, state: State) -> None:
        for nodes, new in zip(pytree.tree_leaves(self.feat_and_state), pytree.tree_leaves((feat, state)), strict=True):
            nodes[:, self.next] = new
        self.logits[:, self.next] = self.tree.joint_logits(feat)
        self.value[:, self.next] = self.tree.value(feat)
        self.next += 1


def halving(considered: int, simulations: int) -> list[tuple[int, int]]:
    """Sequential halving: stages of (actions still considered, visits of each), with `simulations` visits at most."""
    stages = []
    left = simulations
    count = considered
    rounds = max(1, math.ceil(math.log2(considered)))
    while left >= count:
        visits = max(1, simulations // (rounds * count))
        visits = min(visits, left // count)
        stages.append((count, visits))
        left -= visits * count
        if count <= 2 and len(stages) >= rounds:
            if left >= count:
                stages[-1] = (count, visits + left // count)
            break
        count = max(2, count // 2) if considered > 1 else 1
    return stages


def _among_best(score: Tensor, remaining: Tensor, count: int) -> Tensor:
    """Which of the remaining actions have one of the `count` best scores `(B, actions)`."""
    best = torch.where(remaining, score, -torch.inf).topk(count, 1).indices
    return torch.zeros_like(remaining).scatter(1, best, True)
