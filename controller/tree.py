"""Search with the learnt model, policy and value: Gumbel MuZero (Danihelka et al. 2022, "Policy improvement by planning
with Gumbel"), batched over copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.controller.actor_critic import ActorCritic
from longdream.controller.distributions import Categoricals
from longdream.controller.types import ControllerConfig
from longdream.worldmodel.dream import Dreamer
from longdream.worldmodel.dynamics import State

MOST_ACTIONS = 256


class Tree(ActorCritic):
    """An actor-critic that searches before it acts in reality: the same weights, learnt in the same way.

    At the root, actions are drawn without replacement (the largest of logits plus Gumbel noise; without noise where
    greedy) and thinned out by sequential halving; below it, visits follow the improved policy. Every edge is dreamt
    once. Several factors are searched as the product of their classes.

    Raises:
        ValueError: actions are boxes, or have more than `MOST_ACTIONS` combinations.
    """

    capturable = True

    def __init__(self, config: ControllerConfig, features: int, parts: Sequence[int], actions: int):
        super().__init__(config, features, parts, actions)
        if not parts or math.prod(parts) > MOST_ACTIONS:
            raise ValueError(
                f"controller.kind = tree needs discrete actions, {MOST_ACTIONS} combinations at most: use planner here"
            )
        grid = torch.cartesian_prod(*(torch.arange(n) for n in parts)).view(math.prod(parts), len(parts))
        one_hots = torch.cat([F.one_hot(grid[:, i], n) for i, n in enumerate(parts)], 1).float()
        self.register_buffer("encoded", one_hots, persistent=False)

    encoded: Tensor  # (number of joint actions, A)

    @torch.no_grad()
    def plan(self, model: Dreamer, feat: Tensor, state: State, greedy: bool) -> Tensor:
        told = self.config.tree
        search = Search(self, model, feat, state, told.simulations)
        width = len(self.encoded)
        logits = search.logits[:, 0]
        noise = torch.zeros_like(logits) if greedy else -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9)))
        score = logits + noise
        considered = min(told.considered, width, told.simulations)
        alive = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(considered, 1).indices, True)
        for count, visits in halving(considered, told.simulations):
            # the best `count` of those alive, then each of them `visits` times, in turn
            alive &= _among_best(score + search.pull(0), alive, count)
            for _ in range(visits):
                for rank in range(count):
                    order = torch.where(alive, score, -torch.inf).argsort(1, descending=True)
                    search.simulate(order[:, rank])
        # of the actions visited most, the best
        seen = search.visits[:, 0]
        most = alive & (seen == torch.where(alive, seen, -1).amax(1, keepdim=True))
        best = torch.where(most, score + search.pull(0), -torch.inf).argmax(1)
        return self.encoded[best]

    def joint_logits(self, feat: Tensor) -> Tensor:
        """Log-probabilities `(B, actions)` of all combinations of factors."""
        policy = self.policy(feat)
        assert isinstance(policy, Categoricals)
        return torch.cat(policy.probs, -1).log() @ self.encoded.T


class Search:
    """B trees of up to `simulations` + 1 nodes; node 0 is the root. Children are made by dreaming."""

    def __init__(self, tree: Tree, model: Dreamer, feat: Tensor, state: State, simulations: int):
        self.tree, self.model = tree, model
        batch, nodes, width = len(feat), simulations + 1, len(tree.encoded)
        self.moments: Any = pytree.tree_map(lambda t: t.new_zeros(batch, nodes, *t.shape[1:]), (feat, state))
        self.child = feat.new_zeros(batch, nodes, width, dtype=torch.long)  # 0: not dreamt yet
        self.parent = feat.new_zeros(batch, nodes, dtype=torch.long)
        self.through = feat.new_zeros(batch, nodes, dtype=torch.long)  # the action that led here
        self.reward, self.discount = feat.new_zeros(batch, nodes), feat.new_zeros(batch, nodes)
        self.logits = feat.new_zeros(batch, nodes, width)
        self.value = feat.new_zeros(batch, nodes)  # as the critic has it
        self.total = feat.new_zeros(batch, nodes, width)  # sums of returns seen through each action
        self.visits = feat.new_zeros(batch, nodes, width)
        self.rows = torch.arange(batch, device=feat.device)
        self.next = 0
        self._add(feat, state)

    def simulate(self, action: Tensor) -> None:
        """Walk down from the root by `action` `(B,)`, dream one new edge, and carry what it brought back up."""
        node = torch.zeros_like(action)
        while bool((down := (child := self.child[self.rows, node, action]) > 0).any()):
            node = torch.where(down, child, node)
            action = torch.where(down, self.below(node), action)
        child = self._dream(node, action)
        gain, live = self.value[self.rows, child], torch.ones_like(down)
        while bool(live.any()):
            back = self.reward[self.rows, child] + self.discount[self.rows, child] * gain
            gain = torch.where(live, back, gain)
            self.total[self.rows, node, action] += torch.where(live, gain, 0.0)
            self.visits[self.rows, node, action] += live.to(gain.dtype)
            live = live & (node > 0)
            child, action, node = node, self.through[self.rows, node], self.parent[self.rows, node]

    def completed(self, node: int | Tensor) -> Tensor:
        """Values of all actions `(B, actions)`: seen where visited, else the mix of the critic's value and what was
        seen elsewhere (their equation 33)."""
        visits, total = self.visits[self.rows, node], self.total[self.rows, node]
        mean = total / visits.clamp(min=1)
        prior = self.logits[self.rows, node].softmax(-1) * (visits > 0)
        seen = (prior * mean).sum(-1) / prior.sum(-1).clamp(min=1e-9)
        tried = visits.sum(-1)
        mixed = (self.value[self.rows, node] + tried * seen) / (1 + tried)
        return torch.where(visits > 0, mean, mixed[:, None])

    def pull(self, node: int | Tensor) -> Tensor:
        """sigma(q) `(B, actions)`: values scaled to [0, 1], times a weight that grows with visits (equation 8)."""
        told = self.tree.config.tree
        value = self.completed(node)
        low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
        scaled = (value - low) / (high - low).clamp(min=1e-6)
        most = self.visits[self.rows, node].amax(-1, keepdim=True)
        return (told.visit_weight + most) * told.value_weight * scaled

    def below(self, node: Tensor) -> Tensor:
        """What to try next at inner nodes `(B,)`: the action that is furthest behind the improved policy (equation
        14)."""
        improved = (self.logits[self.rows, node] + self.pull(node)).softmax(-1)
        visits = self.visits[self.rows, node]
        return (improved - visits / (1 + visits.sum(-1, keepdim=True))).argmax(-1)

    def _dream(self, node: Tensor, action: Tensor) -> Tensor:
        """The new node `(B,)` at the end of an edge."""
        feat, state = pytree.tree_map(lambda t: t[self.rows, node], self.moments)
        encoded = self.tree.encoded[action]
        reward, cont = self.model.consequence.expect(feat, encoded)
        _, feat, state = self.model.dream_step(feat, state, encoded)
        new = self.next
        self.child[self.rows, node, action] = new
        self.parent[:, new], self.through[:, new] = node, action
        self.reward[:, new], self.discount[:, new] = reward, self.tree.config.gamma * cont
        self._add(feat, state)
        return torch.full_like(node, new)

    def _add(self, feat: Tensor, state: State) -> None:
        for held, now in zip(pytree.tree_leaves(self.moments), pytree.tree_leaves((feat, state)), strict=True):
            held[:, self.next] = now
        self.logits[:, self.next] = self.tree.joint_logits(feat)
        self.value[:, self.next] = self.tree.value(feat)
        self.next += 1


def halving(considered: int, simulations: int) -> list[tuple[int, int]]:
    """Sequential halving: phases of (actions still considered, visits to each), `simulations` visits at most."""
    phases, left, count = [], simulations, considered
    rounds = max(1, math.ceil(math.log2(considered)))
    while left >= count:
        visits = max(1, simulations // (rounds * count))
        visits = min(visits, left // count)
        phases.append((count, visits))
        left -= visits * count
        if count <= 2 and len(phases) >= rounds:
            if left >= count:
                phases[-1] = (count, visits + left // count)
            break
        count = max(2, count // 2) if considered > 1 else 1
    return phases


def _among_best(score: Tensor, alive: Tensor, count: int) -> Tensor:
    """Which of the living have one of the `count` best scores `(B, actions)`."""
    best = torch.where(alive, score, -torch.inf).topk(count, 1).indices
    return torch.zeros_like(alive).scatter(1, best, True)
