"""Where dreams begin: at any frame that was seen clean, all alike."""

import pytest
import torch

from longdream.worldmodel.config import DynamicsConfig, ForcingConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.objectives.flow import Flow
from longdream.worldmodel.objectives.mask import Mask
from longdream.worldmodel.objectives.prior import Prior
from longdream.worldmodel.objectives.teacher import Teacher


@pytest.mark.parametrize("objective", ["flow", "mask", "teacher", "prior"])
@pytest.mark.parametrize("history", ["noisy", "clean"])
def test_dreams_begin_at_clean_frames_all_alike(objective: str, history: str) -> None:
    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(width=16, num_heads=2), 1, 8, 2)
    config = ForcingConfig(objective, history)
    made = {
        "flow": lambda: Flow(config, dynamics),
        "mask": lambda: Mask(config, dynamics, 4),
        "teacher": lambda: Teacher(config, dynamics, 4, 2),
        "prior": lambda: Prior(config, dynamics, 4, 2),
    }[objective]()
    first = torch.zeros(50, 12, dtype=torch.bool)
    with torch.no_grad():
        out = made.run(dynamics, torch.zeros(50, 12, 1, 8), torch.zeros(50, 12, 2), first, 400)
    rows = torch.arange(50)[:, None]
    assert out.at.shape == (50, 400) and out.clean[rows, out.at].all()
    share = torch.bincount(out.at.flatten(), minlength=12) / out.at.numel()
    clean = out.clean.float() / out.clean.float().sum(1, keepdim=True)
    assert torch.allclose(share, clean.mean(0), atol=0.01)
