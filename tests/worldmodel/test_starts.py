"""Where dreams begin."""

import pytest
import torch

from longdream.worldmodel.model import start_weight
from longdream.worldmodel.objectives.base import draw_frames
from longdream.worldmodel.types import Batch


def batch(reward: list[list[float]], first: list[list[int]]) -> Batch:
    arrives = torch.tensor(reward)
    no = torch.zeros_like(arrives, dtype=torch.bool)
    action = torch.zeros(*arrives.shape, 2)
    return Batch({}, action, arrives, torch.tensor(first, dtype=torch.bool), no, no, torch.zeros_like(arrives))


def test_weight_lies_before_rewards() -> None:
    """Reach 2: rows 1 and 2 come before the reward of row 3; that of row 5 is of an episode that begins there."""
    rows = batch([[0, 0, 0, 1.0, 0, -1.0, 0, 0]], [[1, 0, 0, 0, 0, 1, 0, 0]])
    weight = start_weight(rows, 0.5, 2)
    near = torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0])
    assert torch.allclose(weight[0], 0.5 / 8 + 0.5 * near / 2)


def test_without_rewards_all_rows_weigh_the_same() -> None:
    weight = start_weight(batch([[0.0] * 5, [1.0, 0, 0, 0, 0]], [[1, 0, 0, 0, 0]] * 2), 1.0, 15)
    assert torch.allclose(weight, torch.full((2, 5), 0.2))  # the reward of the first row came before the clip


def test_weights_sum_to_one_and_reach_no_further_than_the_clip() -> None:
    rewards = (torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) > 0.6).float().tolist()
    weight = start_weight(batch(rewards, [[1] + [0] * 8] * 7), 0.7, 50)
    assert weight.shape == (7, 9) and torch.allclose(weight.sum(1), torch.ones(7))


def test_frames_are_drawn_in_proportion() -> None:
    torch.manual_seed(0)
    weight = torch.tensor([[0.0, 1, 0, 3, 0], [2.0, 2, 2, 2, 0]])
    at = draw_frames(weight, 40_000)
    for row in range(2):
        share = torch.bincount(at[row], minlength=5) / 40_000
        assert (share[weight[row] == 0] == 0).all()
        assert torch.allclose(share, weight[row] / weight[row].sum(), atol=0.01)


@pytest.mark.parametrize("objective", ["flow", "mask", "teacher"])
@pytest.mark.parametrize("history", ["noisy", "clean"])
def test_every_objective_begins_where_it_is_asked_to(objective: str, history: str) -> None:
    from longdream.worldmodel.config import DynamicsConfig
    from longdream.worldmodel.dynamics import Dynamics
    from longdream.worldmodel.objectives.base import ForcingConfig
    from longdream.worldmodel.objectives.flow import Flow
    from longdream.worldmodel.objectives.mask import Mask
    from longdream.worldmodel.objectives.teacher import Teacher

    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(width=16, num_heads=2), 1, 8, 2)
    config = ForcingConfig(objective, history)
    made = {
        "flow": lambda: Flow(config, dynamics),
        "mask": lambda: Mask(config, dynamics, 4),
        "teacher": lambda: Teacher(config, dynamics, 4, 2),
    }[objective]()
    weight = torch.zeros(2, 12)
    weight[0, 2] = weight[1, 4] = 1.0  # a clean prefix is six frames or more
    first = torch.zeros(2, 12, dtype=torch.bool)
    out = made.run(dynamics, torch.zeros(2, 12, 1, 8), torch.zeros(2, 12, 2), first, 5, weight)
    assert out.at.tolist() == [[2] * 5, [4] * 5]
