"""A world of numbered places that stands in for M where a controller dreams: what is best in it is known exactly."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Places:
    """Features are one-hots of the place. `step(place (B,), action (B, A))` gives reward, cont and the next place."""

    def __init__(self, count: int, step: Step):
        self.count = count
        self.step = step
        self.dreamt = 0
        self.reward_continue = self

    def feat(self, place: Tensor) -> Tensor:
        return F.one_hot(place, self.count).float()

    def expect(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        lead = feat.shape[:-1]
        reward, cont, _ = self.step(feat.reshape(-1, self.count).argmax(-1), action.reshape(-1, action.shape[-1]))
        return reward.view(lead), cont.view(lead)

    def dream_step(self, feat, state, action, temperature=1.0, steps=None):
        """The state is a clock, so that a mix-up of states would be seen."""
        assert (state[0][:, 0] == state[0][:, 1]).all()
        place = self.step(feat.argmax(-1), action)[2]
        self.dreamt += len(feat)
        return place[:, None, None].float(), self.feat(place), (state[0] + 1,)

    def start(self, place: Tensor):
        return self.feat(place), (place[:, None].expand(-1, 2).float(),)


def chain(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Five places in a row. Action 0 takes 0.2 and ends; action 1 walks on, and from the last place pays 1 and ends."""
    walk = action[:, 1] > 0.5
    last = place == 4
    reward = torch.where(walk, last.float(), 0.2)
    return reward, (walk & ~last).float(), (place + walk.long()).clamp(max=4)


@pytest.fixture
def chained() -> Places:
    return Places(5, chain)


@pytest.fixture
def places() -> Callable[[int, Step], Places]:
    return Places
