from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longdream.controller import evolution
from longdream.controller.config import ControllerConfig
from longdream.controller.evolution import Evolution
from longdream.controller.types import Improving
from longdream.worldmodel.dream import Starts

CONFIG = ControllerConfig(gamma=0.9)


def build(states: int, parts: tuple[int, ...] = (2,), actions: int = 2, **options) -> Evolution:
    settings = {"population": 16, "moments": 20, "horizon": 6} | options
    return Evolution(replace(CONFIG, kwargs=settings), states, parts, actions)


def improve(agent: Evolution, world, places: int, generations: int) -> list[dict[str, Tensor]]:
    starts = Starts(*world.start(torch.arange(places).repeat(4)), torch.ones(4 * places))
    return [agent.improve(world, starts) for _ in range(generations)]


def test_it_finds_the_late_reward(chained) -> None:
    agent = build(5)
    metrics = improve(agent, chained, 5, 60)
    assert agent.act(torch.eye(5), True)[:, 1].tolist() == [1.0] * 5
    best = sum(0.9**n for n in range(5)) / 5
    assert metrics[0]["return"] < 0.8 * best and metrics[-1]["return"] == pytest.approx(best, abs=0.1)
    assert isinstance(agent, Improving) and not list(agent.parameters())


@pytest.mark.parametrize("large", [False, True])
def test_boxes(places, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    if large:
        monkeypatch.setattr(evolution, "MANY_WEIGHTS", 1)
    target = torch.tensor([[-0.6, 0.4], [0.5, 0.0]])

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cost = (action - target[place]).square().sum(-1)
        return -cost, torch.ones_like(cost), 1 - place

    agent = build(2, (), 2)
    improve(agent, places(2, step), 2, 120)
    assert (agent.act(torch.eye(2), True) - target).abs().max() < 0.15
    assert not torch.equal(agent.act(torch.eye(2), False), agent.act(torch.eye(2), False))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_resumed_search_is_an_uninterrupted_one(chained, monkeypatch, large: bool, before: int) -> None:
    if large:
        monkeypatch.setattr(evolution, "MANY_WEIGHTS", 1)
    torch.manual_seed(0)
    agent = build(5)
    improve(agent, chained, 5, before)
    rng_state = torch.get_rng_state()
    saved = agent.state_dict()
    improve(agent, chained, 5, 9)
    other = build(5)
    other.load_state_dict(saved)
    assert other.act(torch.eye(5), True).shape == (5, 2)
    torch.set_rng_state(rng_state)
    improve(other, chained, 5, 9)
    assert torch.equal(agent.mean, other.mean) and agent.mean.any()


def test_moments_that_ended_are_not_dreamt_from(places) -> None:
    """Place 1 is an end, where a dream would go wrong."""
    seen = []

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(place.clone())
        return torch.ones(len(place)), torch.ones(len(place)), place

    world = places(2, step)
    place = torch.tensor([0, 1]).repeat(8)
    build(2).improve(world, Starts(*world.start(place), (place == 0).float()))
    assert not torch.cat(seen).any()


def test_a_generation_that_is_not_finite_is_dropped(places) -> None:
    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.full((len(place),), torch.nan), torch.ones(len(place)), place

    agent = build(2)
    improve(agent, places(2, step), 2, 2)
    assert not agent.mean.any()
