"""A part's optimiser: steps that are skipped, and states that come from another device."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from longdream.agent.core.learner import Part
from longdream.agent.run import checkpoint
from longdream.agent.run.metrics import Window


def steps(part: Part, weight: nn.Parameter, values: list[float]) -> list[bool]:
    return [bool(part.step((weight * value).sum())[0]) for value in values]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_step_that_is_not_finite_changes_nothing(device: str) -> None:
    weight = nn.Parameter(torch.ones(3, device=device))
    part = Part([weight], 0.1, 1.0)
    assert steps(part, weight, [1.0]) == [True]
    before, state = weight.detach().clone(), copy.deepcopy(part.optimiser.state_dict())
    assert steps(part, weight, [float("nan"), float("inf")]) == [False, False]
    assert torch.equal(weight, before)
    for key, value in part.optimiser.state_dict()["state"][0].items():
        assert torch.equal(value, state["state"][0][key]), key
    assert steps(part, weight, [1.0]) == [True] and not torch.equal(weight, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("elsewhere", [True, False, None])
def test_an_optimiser_goes_on_on_another_device(device: str, elsewhere: bool | None) -> None:
    """Saved where its kernel was fused, where it was not, and before there was a choice."""
    weights = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    first, second = (Part([weight], 0.1, 1.0) for weight in weights)
    steps(first, weights[0], [1.0, -2.0])
    saved = copy.deepcopy(first.optimiser.state_dict())
    saved["param_groups"][0]["fused"] = elsewhere
    saved["state"][0] = {key: value.cpu() for key, value in saved["state"][0].items()}
    with torch.no_grad():
        weights[1].copy_(weights[0])
    second.load_state_dict(saved)
    for part, weight in zip((first, second), weights, strict=True):
        assert steps(part, weight, [0.5, float("nan"), 1.0]) == [True, False, True]
    assert torch.equal(*weights)
    assert second.optimiser.param_groups[0]["fused"] == (device == "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_moments_come_back_in_the_layout_of_their_weights(device: str, tmp_path: Path) -> None:
    """A checkpoint keeps values alone, and a fused kernel refuses moments of another layout."""
    convs = [nn.Conv2d(3, 5, 4, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    first, second = (Part(conv.parameters(), 0.1, 1.0) for conv in convs)
    image = torch.randn(2, 3, 8, 8, device=device)
    assert bool(first.step(convs[0](image).square().mean())[0])
    checkpoint.save(tmp_path, 1, {"optimiser": first.state_dict()})
    convs[1].load_state_dict(convs[0].state_dict())
    second.load_state_dict(checkpoint.load(tmp_path)[0]["optimiser"])
    weight = convs[1].weight
    moments = second.optimiser.state[weight]
    assert not weight.is_contiguous()
    for name in ("exp_avg", "exp_avg_sq"):
        assert moments[name].stride() == weight.stride()
        assert torch.equal(moments[name], first.optimiser.state[convs[0].weight][name])
    for conv, part in zip(convs, (first, second), strict=True):
        assert bool(part.step(conv(image).square().mean())[0])
    assert torch.equal(convs[0].weight, weight)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_means_are_of_updates_that_were_made(device: str) -> None:
    window = Window()
    for value, taken in ((1.0, True), (float("nan"), False), (3.0, True)):
        window.add({"loss": torch.tensor(value, device=device)}, torch.tensor(taken, device=device))
    window.add({"never": torch.tensor(float("nan"), device=device)}, torch.tensor(False, device=device))
    assert window.means() == {"loss": 2.0}
