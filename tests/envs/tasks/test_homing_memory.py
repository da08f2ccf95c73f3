"""What Homing-v0 asks of memory: M has to add up its moves, with the turns in between."""

import numpy as np
import torch
from torch import Tensor, nn

from longdream.envs.tasks.homing import HEADINGS, HomingEnv
from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.dynamics import Dynamics

FRAMES = 31


def walks(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random walks: what the agent just did `(count, FRAMES, 4)`, the actions that led there `(count, FRAMES, 4)`, and
    where home is from the agent, in cells ahead and to its right `(count, FRAMES, 2)`."""
    env = HomingEnv(away=15, back=FRAMES - 16)
    rng = np.random.default_rng(seed)
    moved = np.zeros((count, FRAMES, 4), np.float32)
    actions = np.zeros((count, FRAMES, 4), np.float32)
    home = np.zeros((count, FRAMES, 2), np.float32)
    for i in range(count):
        obs, _ = env.reset(seed=1000 * seed + i)
        for t in range(FRAMES):
            moved[i, t, obs["moved"]] = 1
            away = env.home - env.agent
            home[i, t] = away @ HEADINGS[env.heading], away @ HEADINGS[(env.heading + 1) % 4]
            if t + 1 < FRAMES:
                action = rng.choice(4, p=(0.1, 0.5, 0.2, 0.2))
                actions[i, t + 1, action] = 1
                obs = env.step(action)[0]
    return torch.from_numpy(moved), torch.from_numpy(actions), torch.from_numpy(home)


def test_keys_that_turn_know_where_home_is() -> None:
    """On walks that M was not trained on, frames 10 to 30, in squared cells. Saying always that home is here errs by
    6.9."""
    torch.manual_seed(0)
    moved, actions, home = walks(600, seed=1)
    model = Dynamics(DynamicsConfig("rotary", layers=2, width=48, num_heads=4, state_size=16), 1, 4, 4)
    head = nn.Sequential(nn.Linear(model.feature_size, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.3, total_iters=400)

    def errors(moved: Tensor, actions: Tensor, home: Tensor) -> Tensor:
        first = (torch.arange(FRAMES) == 0).expand(len(moved), FRAMES)
        ones = torch.ones(first.shape)
        feat = model(moved[:, :, None], actions, ones, first, model.initial(len(moved))).feat
        return (head(feat) - home).square().sum(-1)

    for _ in range(400):
        rows = torch.randint(0, len(moved), (32,))
        optimizer.zero_grad()
        errors(moved[rows], actions[rows], home[rows]).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        held_out = walks(100, seed=2)
        assert held_out[2][:, 10:].square().sum(-1).mean() > 6
        assert errors(*held_out)[:, 10:].mean() < 1.5
