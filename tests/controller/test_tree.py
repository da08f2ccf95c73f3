import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longdream.controller.config import ControllerConfig
from longdream.controller.tree import MAX_ACTIONS, Tree, halving
from longdream.controller.types import Planning

CONFIG = ControllerConfig(hidden=32, layers=1, bins=81, gamma=0.9, unimix=0.0)


def build(states: int, parts: tuple[int, ...] = (2,), gamma: float = 0.9, **options) -> Tree:
    return Tree(replace(CONFIG, kwargs=options, gamma=gamma), states, parts, sum(parts))


def test_an_undecided_policy_with_a_blank_value_walks_as_far_as_it_can_see(chained) -> None:
    """From place 2 the reward is three steps away: 64 dreamt steps that do not trust the blank value much find it, two
    do not."""
    start = chained.start(torch.tensor([2, 3, 4]))
    far = build(5, simulations=64, value_weight=0.01)
    assert far.plan(chained, *start, True)[:, 1].tolist() == [1.0] * 3
    assert build(5, simulations=2).plan(chained, *start, True)[:, 1].tolist() == [0.0, 0.0, 1.0]


def test_a_discount_decides(chained) -> None:
    """At gamma 0.1 even the next place but one is too late."""
    tree = build(5, gamma=0.1, simulations=64, value_weight=0.01)
    assert tree.plan(chained, *chained.start(torch.arange(5)), True)[:, 1].tolist() == [0, 0, 0, 0, 1]


def test_it_mends_a_policy_that_is_wrong_and_keeps_one_that_is_right(chained) -> None:
    for preferred in (0, 1):
        tree = build(5, simulations=16)
        tree.value = lambda feat: feat @ torch.tensor([0.9**n for n in (4, 3, 2, 1, 0)])
        with torch.no_grad():
            tree.actor[-1].bias[preferred] = 2.0
        for greedy in (True, False):
            action = tree.plan(chained, *chained.start(torch.arange(5).repeat(4)), greedy)
            assert action[:, 1].mean() == 1


def random_world(places, states: int, actions: int):
    after = torch.randint(0, states, (states, actions))
    reward = torch.randn(states, actions)
    cont = torch.rand(states, actions).round(decimals=1)

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = action.argmax(-1)
        return reward[place, chosen], cont[place, chosen], after[place, chosen]

    return places(states, step), after, reward, cont


def test_counts_and_means_are_those_of_the_edges_below(places) -> None:
    """Every tree of a batch, walked by hand: visits add up, children lie where dreaming leads, and the sums are the
    returns of what was dreamt through each edge."""
    from longdream.controller.tree import Search

    torch.manual_seed(3)
    world, after, reward, cont = random_world(places, 7, 3)
    tree = build(7, (3,), simulations=20)
    value = torch.randn(7)
    tree.value = lambda feat: feat @ value
    root = torch.arange(7)
    search = Search(tree, world, *world.start(root), 20)
    for i in range(20):
        search.simulate((root + i) % 3)
    assert search.next == 21 and world.dreamt == 20 * 7
    for b in range(7):
        place = {0: b}
        total = torch.zeros(21, 3)
        count = torch.zeros(21, 3)
        for new in range(1, 21):
            node = int(search.parent[b, new])
            action = int(search.parent_action[b, new])
            assert node < new and int(search.child[b, node, action]) == new
            place[new] = int(after[place[node], action])
            gain = float(value[place[new]])
            child = new
            while True:
                node = int(search.parent[b, child])
                action = int(search.parent_action[b, child])
                gain = float(reward[place[node], action] + 0.9 * cont[place[node], action] * gain)
                total[node, action] += gain
                count[node, action] += 1
                if node == 0:
                    break
                child = node
        torch.testing.assert_close(search.visits[b], count)
        torch.testing.assert_close(search.total[b], total, rtol=1e-4, atol=1e-5)
        clock = search.feat_and_state[1][0][b, :, 0]
        depth = {0: 0}
        for new in range(1, 21):
            depth[new] = depth[int(search.parent[b, new])] + 1
        assert clock.tolist() == [b + depth[n] for n in range(21)]


def test_batched_is_one_at_a_time(places) -> None:
    torch.manual_seed(0)
    world, *_ = random_world(places, 9, 4)
    tree = build(9, (4,), simulations=24)
    with torch.no_grad():
        for weight in tree.parameters():
            weight += 0.3 * torch.randn_like(weight)
    together = tree.plan(world, *world.start(torch.arange(9)), True)
    alone = torch.cat([tree.plan(world, *world.start(torch.tensor([i])), True) for i in range(9)])
    assert torch.equal(together, alone)


def test_factors_are_searched_together(places) -> None:
    """Only one combination pays, and each of its factors alone does not."""

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return action[:, 1] * action[:, 4], torch.zeros(len(place)), place

    world = places(1, step)
    tree = build(1, (2, 3), simulations=16, considered=6)
    action = tree.plan(world, *world.start(torch.zeros(3, dtype=torch.long)), True)
    assert action.tolist() == [[0, 1, 0, 0, 1]] * 3
    joint = tree.joint_logits(F.one_hot(torch.tensor([0]), 1).float())
    assert joint.exp().sum().item() == pytest.approx(1, abs=1e-5) and isinstance(tree, Planning)


@pytest.mark.parametrize(("considered", "simulations"), list(itertools.product([1, 2, 3, 4, 7, 16], [1, 2, 5, 16, 50])))
def test_halving_spends_what_it_has(considered: int, simulations: int) -> None:
    considered = min(considered, simulations)
    stages = halving(considered, simulations)
    spent = sum(count * visits for count, visits in stages)
    assert stages[0][0] == considered and simulations - 2 < spent <= simulations
    assert all(a >= b for (a, _), (b, _) in itertools.pairwise(stages))


def test_actions_that_cannot_be_searched() -> None:
    for parts in ((), (MAX_ACTIONS + 1,), (20, 20)):
        with pytest.raises(ValueError, match="use planner"):
            build(3, parts)
