"""An optimizer: steps that are skipped, and states that come from another device."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from longdream.agent.core.optimizer import Optimizer
from longdream.agent.run import checkpoint


def steps(optimizer: Optimizer, weight: nn.Parameter, values: list[float]) -> list[bool]:
    return [bool(optimizer.step((weight * value).sum())[0]) for value in values]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_step_that_is_not_finite_changes_nothing(device: str) -> None:
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = Optimizer([weight], 0.1, 1.0)
    assert steps(optimizer, weight, [1.0]) == [True]
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.adamw.state_dict())
    assert steps(optimizer, weight, [float("nan"), float("inf")]) == [False, False]
    assert torch.equal(weight, before)
    for key, value in optimizer.adamw.state_dict()["state"][0].items():
        assert torch.equal(value, state["state"][0][key]), key
    assert steps(optimizer, weight, [1.0]) == [True] and not torch.equal(weight, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("elsewhere", [True, False, None])
def test_an_optimizer_goes_on_on_another_device(device: str, elsewhere: bool | None) -> None:
    """Saved where its kernel was fused, where it was not, and before there was a choice."""
    weights = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    first, second = (Optimizer([weight], 0.1, 1.0) for weight in weights)
    steps(first, weights[0], [1.0, -2.0])
    saved = copy.deepcopy(first.adamw.state_dict())
    saved["param_groups"][0]["fused"] = elsewhere
    saved["state"][0] = {key: value.cpu() for key, value in saved["state"][0].items()}
    with torch.no_grad():
        weights[1].copy_(weights[0])
    second.load_state_dict(saved)
    for optimizer, weight in zip((first, second), weights, strict=True):
        assert steps(optimizer, weight, [0.5, float("nan"), 1.0]) == [True, False, True]
    assert torch.equal(*weights)
    assert second.adamw.param_groups[0]["fused"] == (device == "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_moments_come_back_in_the_layout_of_their_weights(device: str, tmp_path: Path) -> None:
    """A checkpoint keeps values alone, and a fused kernel refuses moments of another layout."""
    convs = [nn.Conv2d(3, 5, 4, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    first, second = (Optimizer(conv.parameters(), 0.1, 1.0) for conv in convs)
    image = torch.randn(2, 3, 8, 8, device=device)
    assert bool(first.step(convs[0](image).square().mean())[0])
    checkpoint.save(tmp_path, 1, {"optimizer": first.state_dict()})
    convs[1].load_state_dict(convs[0].state_dict())
    second.load_state_dict(checkpoint.load(tmp_path)[0]["optimizer"])
    weight = convs[1].weight
    moments = second.adamw.state[weight]
    assert not weight.is_contiguous()
    for name in ("exp_avg", "exp_avg_sq"):
        assert moments[name].stride() == weight.stride()
        assert torch.equal(moments[name], first.adamw.state[convs[0].weight][name])
    for conv, optimizer in zip(convs, (first, second), strict=True):
        assert bool(optimizer.step(conv(image).square().mean())[0])
    assert torch.equal(convs[0].weight, weight)


def test_a_checkpoint_has_no_say_in_how_an_optimizer_steps() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = Optimizer([weight], 0.1, 1.0)
    steps(optimizer, weight, [1.0])
    saved = copy.deepcopy(optimizer.adamw.state_dict())
    saved["param_groups"][0].update(lr=7.0, betas=("a",), weight_decay=1e9)
    optimizer.load_state_dict(saved)
    assert optimizer.adamw.param_groups[0]["betas"] == (0.9, 0.95) and optimizer.adamw.param_groups[0]["lr"] == 0.1
    saved["state"][0]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="moments of weight 0 are not of shape"):
        optimizer.load_state_dict(saved)
