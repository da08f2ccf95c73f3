"""Dreams by compiled steps: the same dreams, by one graph for all steps."""

import pytest
import torch
from torch._dynamo.utils import counters

from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.core.compile import CompiledDreams
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec
from longdream.worldmodel.dream import Dream, Starts, imagine
from longdream.worldmodel.model import WorldModel

SPEC = EnvSpec(
    {"obs": ObsSpec("image", (16, 16, 3))},
    ActionSpec((3,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"}),
)


def dream(model: WorldModel, dreamer: CompiledDreams | WorldModel, starts: Starts, temperature: float) -> Dream:
    torch.manual_seed(1)
    policy = torch.randn(model.feature_size, 3, device=starts.feat.device)
    act = lambda feat: torch.nn.functional.one_hot((feat @ policy).argmax(-1), 3).float()  # noqa: E731
    return imagine(dreamer, starts, act, 4, temperature)


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.cuda)]
)
@pytest.mark.parametrize("objective", ["flow", "mask", "teacher"])
def test_compiled_dreams_are_the_dreams(device: str, backend: str, objective: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    settings = {
        "device": device,
        "forcing.objective": objective,
        "worldmodel.blocks": (1, 2),
        "worldmodel.frame_mlp_width": 8,
    }
    model = Agent(options.update(options.load("tiny"), settings), SPEC).model
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    starts = Starts(
        torch.randn(6, model.feature_size, device=device),
        model.dynamics.initial(6).map(torch.clone),
        torch.ones(6, device=device),
    )
    # compiled for CUDA, what is random is drawn in another way
    temperature = 0.0 if device == "cuda" and objective == "flow" else 1.0
    wanted, before = dream(model, model, starts, temperature), model.dreamt
    counters.clear()
    dreamer = CompiledDreams(model, backend)
    for _ in range(2):
        dreamt = dream(model, dreamer, starts, temperature)
        assert dreamt.feat.isfinite().all() and torch.equal(dreamt.feat[:, 0], starts.feat)
        if device == "cpu" or objective == "flow":
            torch.testing.assert_close(dreamt, wanted, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # a step, and the heads
    assert model.dreamt == before + 2 * 6 * 4
