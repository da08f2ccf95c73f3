"""CUDA graphs: a captured function is the function."""

import numpy as np
import pytest
import torch

from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.core.cuda_graphs import WARM_UP, Graphed, GraphedUpdate
from longdream.agent.core.optimizer import Optimizer
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec
from longdream.worldmodel.dream import Starts

SPEC = EnvSpec(
    {"obs": ObsSpec("image", (16, 16, 3))},
    ActionSpec((3,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"}),
)


@pytest.mark.cuda
def test_a_captured_function_is_the_function() -> None:
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
    assert len(graphed.captured) == 2


@pytest.mark.cuda
def test_random_numbers_go_on() -> None:
    graphed = Graphed(lambda x: x + torch.rand_like(x))
    zeros = torch.zeros(1000, device="cuda")
    first = graphed(zeros).clone()
    second = graphed(zeros).clone()
    assert not torch.equal(first, second) and abs(second.mean().item() - 0.5) < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("objective", ["flow", "mask", "teacher"])
def test_dreams_are_captured(objective: str) -> None:
    """A captured dream starts where it should, and under a policy that leaves no choice it is the eager one."""
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


@pytest.mark.cuda
def test_a_captured_update_is_the_update() -> None:
    """Every call learns once, at its own rate and from its own numbers, whether it just runs, is captured or replayed;
    also when the shapes change, and where a step is refused."""
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).cuda() for _ in "ab"]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [Optimizer(layer.parameters(), 1e-2, 1.0) for layer in layers]

    def learn(which: int):
        def update(fields: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            loss = (layers[which](fields["x"]) - fields["y"]).square().mean()
            ok, norm = optimizers[which].step(loss)
            return {"loss": loss.detach(), "norm": norm}, ok

        return update

    plain, graphed = learn(0), GraphedUpdate(learn(1))
    for i, rows in enumerate([16] * (WARM_UP + 4) + [9] * (WARM_UP + 3)):
        fields = {"x": torch.randn(rows, 5, device="cuda"), "y": torch.randn(rows, 1, device="cuda")}
        if i in (2, WARM_UP + 2):
            fields["y"][0] = float("nan")
        for optimizer in optimizers:
            optimizer.scale_rate(1 / (1 + i))
        (wanted, finite), (metrics, also) = plain(fields), graphed(fields)
        assert bool(finite) == bool(also) == (i not in (2, WARM_UP + 2))
        torch.testing.assert_close(metrics, wanted, equal_nan=True)
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("objective", ["flow", "mask"])
def test_an_agent_learns_by_captured_updates(objective: str) -> None:
    """V, M and C, as without CUDA graphs, also in bfloat16: in means over updates, since random numbers are others."""
    batch, length = 4, 12
    rng = np.random.default_rng(0)
    rows = {
        "obs": {"obs": rng.integers(0, 255, (batch, length, 16, 16, 3), dtype=np.uint8)},
        "action": np.eye(3, dtype=np.float32)[rng.integers(0, 3, (batch, length))],
        "reward": rng.random((batch, length), dtype=np.float32),
        "surprise": np.zeros((batch, length), np.float32),
        **{key: np.zeros((batch, length), bool) for key in ("is_first", "terminated", "truncated")},
    }
    runs = []
    for way in ({}, {"cuda_graphs": True}, {"cuda_graphs": True, "precision": "bfloat16"}):
        settings = {"device": "cuda", "forcing.objective": objective, **way}
        torch.manual_seed(0)
        agent = Agent(options.update(options.load("tiny"), settings), SPEC)
        losses = []
        for stage in ["encoder"] * 6 + ["model"] * 6 + ["controller"] * 40:
            losses.append({key: float(value) for key, value in agent.update(rows, stage).items()})
        agent.settle()
        assert agent.updates == 52 and agent.skipped == 0
        runs.append((losses[0], losses[-10:], agent.dream_steps))
    (first, last, dreamt), *others = runs
    for _, other, also in others:
        assert dreamt == also > 0
        for key in ("encoder/reconstruction/obs", "model/prediction", "controller/critic"):
            means = [sum(line[key] for line in lines) / len(lines) for lines in (last, other)]
            assert means[0] == pytest.approx(means[1], rel=0.3), key
    assert last[-1]["encoder/reconstruction/obs"] < first["encoder/reconstruction/obs"]
