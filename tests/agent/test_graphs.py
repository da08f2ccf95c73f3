"""CUDA graphs: a recorded function is the function."""

import pytest
import torch

from agent import options
from agent.agent import Agent
from agent.graphs import Graphed
from envs.contract import ActionSpec, EnvSpec, ObsSpec
from worldmodel.dream import Starts

SPEC = EnvSpec(
    {"obs": ObsSpec("image", (16, 16, 3))},
    ActionSpec((3,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"}),
)


@pytest.mark.cuda
def test_a_recorded_function_is_the_function() -> None:
    """At other inputs, at other shapes, and after its parameters changed in place."""
    layer = torch.nn.Linear(5, 4, device="cuda")

    def function(pair: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"out": layer(pair[0]).tanh(), "sum": pair[1] + 1}

    graphed = Graphed(function)
    for rows in (3, 3, 7, 3):
        pair = (torch.randn(rows, 5, device="cuda"), torch.arange(rows, device="cuda"))
        with torch.no_grad():
            wanted = function(pair)
        got = graphed(pair)
        assert torch.equal(got["sum"], wanted["sum"])
        torch.testing.assert_close(got["out"], wanted["out"])
        with torch.no_grad():
            layer.weight.mul_(1.5)
    assert len(graphed.recorded) == 2


@pytest.mark.cuda
def test_random_numbers_go_on() -> None:
    graphed = Graphed(lambda x: x + torch.rand_like(x))
    zeros = torch.zeros(1000, device="cuda")
    first = graphed(zeros).clone()
    second = graphed(zeros).clone()
    assert not torch.equal(first, second) and abs(second.mean().item() - 0.5) < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("objective", ["flow", "mask", "teacher"])
def test_dreams_are_recorded(objective: str) -> None:
    """A recorded dream starts where it should, and under a policy that leaves no choice it is the eager one."""
    config = options.update(options.load("tiny"), {"device": "cuda", "forcing.objective": objective})
    agent = Agent(config, SPEC)
    assert isinstance(agent._dreams, Graphed)
    model = agent.model
    starts = Starts(
        torch.randn(6, model.feature_size, device="cuda"), model.dynamics.initial(6), torch.ones(6, device="cuda")
    )
    for _ in range(2):
        dream = agent._dreams(starts)
        assert torch.equal(dream.feat[:, 0], starts.feat)
        assert dream.action.sum(-1).eq(1).all() and dream.feat.isfinite().all()
        # the same actions and latents, committed one by one
        state = starts.state
        for t in range(config.controller.horizon):
            go_on = torch.zeros(6, dtype=torch.bool, device="cuda")
            feat, state = model.commit(state, dream.z[:, t], dream.action[:, t], go_on)
            torch.testing.assert_close(dream.feat[:, t + 1], feat, rtol=1e-3, atol=1e-4)
