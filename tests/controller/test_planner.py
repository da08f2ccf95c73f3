from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longdream.controller.config import ControllerConfig
from longdream.controller.planner import Planner
from longdream.controller.types import Planning

CONFIG = ControllerConfig(hidden=32, layers=1, bins=81, gamma=0.9)


def build(states: int, parts: tuple[int, ...] = (2,), actions: int = 2, gamma: float = 0.9, **options) -> Planner:
    settings = {"candidates": 256, "elites": 8, "iterations": 4, "horizon": 6} | options
    return Planner(replace(CONFIG, kwargs=settings, gamma=gamma), states, parts, actions)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_it_waits_for_what_is_worth_it(chained, method: str, greedy: bool) -> None:
    """Walking on is worth .9^n, ending 0.2: from the first place too, four steps away, it walks."""
    planner = build(5, method=method)
    place = torch.arange(5).repeat(8)
    action = planner.plan(chained, *chained.start(place), greedy)
    share = action[:, 1].mean().item()
    assert share == 1 if greedy else share > 0.8


def test_it_takes_what_comes_too_late(chained) -> None:
    planner = build(5, method="cem", gamma=0.5)
    action = planner.plan(chained, *chained.start(torch.arange(5)), True)
    assert action[:, 1].tolist() == [0, 0, 1, 1, 1]


def test_beyond_the_horizon_only_a_value_helps(chained) -> None:
    """A plan of two steps from the first place sees no reward for walking. With a value that knows, it walks."""
    blind = build(5, method="cem", horizon=2)
    assert blind.plan(chained, *chained.start(torch.zeros(4, dtype=torch.long)), True)[:, 1].tolist() == [0.0] * 4
    knowing = build(5, method="mppi", horizon=2)
    knowing.guide.value = lambda feat: feat @ torch.tensor([0.9**n for n in (4, 3, 2, 1, 0)])
    assert knowing.plan(chained, *chained.start(torch.zeros(4, dtype=torch.long)), True)[:, 1].tolist() == [1.0] * 4


def test_a_policy_that_knows_is_followed_where_luck_would_not_find_it(places) -> None:
    """One sequence of eight actions out of 6^8 pays: hopeless to draw, but the policy proposes it."""
    code = torch.tensor([3, 1, 5, 0, 2, 4, 4, 1, 0])

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        right = action.argmax(-1) == code[place]
        return (right & (place == 7)).float(), right.float(), (place + 1).clamp(max=8)

    world = places(9, step)
    for proposals, share in ((8, 1.0), (0, 0.0)):
        planner = build(9, (6,), 6, method="mppi", horizon=8, proposals=proposals)
        planner.guide.act = lambda feat, greedy: torch.eye(6)[code[feat.argmax(-1)]]
        action = planner.plan(world, *world.start(torch.zeros(5, dtype=torch.long)), True)
        right = (action.argmax(-1) == 3).float().mean().item()
        assert right == share or (not proposals and right < 0.9)


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_boxes(places, method: str) -> None:
    target = torch.tensor([[-0.6, 0.4], [0.5, 0.0]])

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cost = (action - target[place]).square().sum(-1)
        return -cost, torch.ones_like(cost), 1 - place

    world = places(2, step)
    planner = build(2, (), 2, method=method, horizon=3, candidates=256, elites=16, iterations=6)
    action = planner.plan(world, *world.start(torch.arange(2)), True)
    assert (action - target).abs().max() < 0.15
    assert planner.plan(world, *world.start(torch.arange(2)), False).abs().max() <= 1


def test_several_factors(places) -> None:
    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = action[:, :2].argmax(-1)
        second = action[:, 2:].argmax(-1)
        return (first == place).float() + (second == 2 - place).float(), torch.ones(len(place)), place

    world = places(2, step)
    action = build(2, (2, 3), 5, method="cem", horizon=2).plan(world, *world.start(torch.arange(2)), True)
    assert action.tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]]


def test_what_it_costs_and_what_it_learns(chained) -> None:
    planner = build(5, method="cem", candidates=10, elites=2, iterations=3, horizon=4)
    planner.plan(chained, *chained.start(torch.arange(5)), True)
    assert chained.dreamt == 5 * 10 * 3 * 4
    assert not list(planner.parameters()) and isinstance(planner, Planning)
    assert planner.act(torch.eye(5), True).sum(-1).tolist() == [1.0] * 5
    assert {name.split(".")[0] for name, _ in build(5).named_parameters()} == {"guide"}


def test_more_elites_than_candidates() -> None:
    with pytest.raises(ValueError, match=r"elites = 9 of 4 candidates"):
        build(5, candidates=4, elites=9)
