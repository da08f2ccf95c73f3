"""The scan whose keys turn: what it computes, told slowly in complex numbers, and that it can count its own motion."""

import pytest
import torch
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.mixers.rotary import RotaryScanMixer


def slowly(mixer: RotaryScanMixer, h: Tensor, first: Tensor) -> Tensor:
    """What the mixer gives for h `(B, T, 1, W)`, in complex numbers and token after token: the state turns back by each
    token's angles, and keys stay as they are."""
    frame = mixer._project(h)
    inputs = frame.inputs
    half = mixer.state_size // 2
    angle = mixer.angle(h)[:, :, 0] * mixer.scales
    b, c = (torch.complex(v[:, :, 0, :half], v[:, :, 0, half : 2 * half]) for v in (inputs.b, inputs.c))
    clips, frames = first.shape
    state = torch.zeros(clips, mixer.num_heads, half, inputs.x.shape[-1], dtype=torch.complex128)
    odd = torch.zeros(clips, mixer.num_heads, mixer.state_size % 2, inputs.x.shape[-1], dtype=h.dtype)
    ys = []
    for t in range(frames):
        x, decay = inputs.x[:, t, 0], inputs.a[:, t, 0].exp()[..., None, None]
        kept = ~first[:, t, None, None, None]
        state = kept * state * decay * torch.polar(torch.ones_like(angle[:, t]), -angle[:, t])[:, None, :, None]
        state = state + b[:, t, None, :, None] * x[:, :, None]
        odd = kept * odd * decay + inputs.b[:, t, 0, None, 2 * half :, None] * x[:, :, None]
        read = (c[:, t, None, :, None].conj() * state).real.sum(2)
        ys.append(read + (inputs.c[:, t, 0, None, 2 * half :, None] * odd).sum(2))
    return mixer._frame_out(torch.stack(ys, 1)[:, :, None], frame)


@pytest.mark.parametrize("state_size", [2, 4, 7])
def test_it_is_a_scan_with_complex_states(state_size: int) -> None:
    config = DynamicsConfig(width=12, num_heads=3, state_size=state_size)
    mixer = RotaryScanMixer(config, 1, 1).double()
    h = torch.randn(3, 150, 1, 12, dtype=torch.float64, requires_grad=True)  # more than one chunk of the scan
    first = torch.rand(3, 150) < 0.05
    y, _, _, _ = mixer(h, first, mixer.initial(3, "cpu").double(), None, None)
    wanted = slowly(mixer, h, first)
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(y)
    grads = [torch.autograd.grad((v * weight).sum(), [h, *mixer.parameters()], allow_unused=True) for v in (y, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_counts_turns() -> None:
    """A sign is seen in the first frame alone; up to 31 turns later, M tells on which side it is.

    That depends on the sum of the turns. Guessing scores 1. After 400 updates, seeds 3 to 10 scored 0.11 to 0.47.
    """
    torch.manual_seed(0)
    model = Dynamics(DynamicsConfig("rotary", layers=1, width=32, num_heads=2, state_size=8), 1, 2, 2)
    head = nn.Sequential(nn.Linear(model.feature_size, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=500)
    errors = []
    for _ in range(500):
        turns = torch.randint(0, 2, (32, 32))
        sign = 6.3 * torch.rand(32, 1)
        sums = sign + 0.8 * turns.where(torch.arange(32) > 0, 0).cumsum(1)
        side = torch.stack([sums.cos(), sums.sin()], -1)
        obs = torch.where(torch.arange(32)[:, None] == 0, side, 0.0)[:, :, None]
        action = nn.functional.one_hot(turns, 2).float()
        first = (torch.arange(32) == 0).expand(32, 32)
        feat = model(obs, action, torch.ones(32, 32), first, model.initial(32)).feat
        error = (head(feat) - side).square().sum(-1)
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
        schedule.step()
        errors.append(error[:, 16:].mean().item())
    assert sum(errors[-10:]) / 10 < 0.6, errors[-10:]
