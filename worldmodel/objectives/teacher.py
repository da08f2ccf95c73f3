"""Teacher forcing: categorical latents are predicted from the last feature and action, without noise. The baseline."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from longdream.worldmodel.categorical import cross_entropy, draw_one_hots
from longdream.worldmodel.config import ForcingConfig
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.networks import mlp
from longdream.worldmodel.objectives.base import Pass


class Teacher(nn.Module):
    """A head on (feat_t, a_t) predicts all variables of frame t + 1 at once, independently of each other."""

    latent: Literal["continuous", "categorical"] = "categorical"
    capturable = True

    def __init__(self, config: ForcingConfig, dynamics: Dynamics, classes: int, actions: int):
        super().__init__()
        self.classes = classes
        hidden = 2 * dynamics.config.width
        self.head = mlp(dynamics.feature_size + actions, hidden, dynamics.tokens * dynamics.channels, layers=1)

    def run(
        self,
        dynamics: Dynamics,
        z: Tensor,
        prev_action: Tensor,
        first: Tensor,
        num_starts: int,
        state: State | None = None,
    ) -> Pass:
        """See `Objective.run`."""
        batch, frames = z.shape[:2]
        ones = torch.ones(batch, frames, device=z.device)
        at = torch.randint(0, frames, (batch, num_starts), device=z.device)
        before = dynamics.initial(batch, z.device) if state is None else state
        out = dynamics(z, prev_action, ones, first, before, None, at)
        # the first frame of an episode has nothing to be predicted from
        feat = torch.cat([torch.zeros_like(out.feat[:, :1]), out.feat[:, :-1]], 1) * ~first[..., None]
        pred = self._logits(feat, prev_action * ~first[..., None], z)
        loss = cross_entropy(pred, z, self.classes).mean()
        assert out.states_at is not None
        end = None if state is None else out.state
        return Pass(loss, {"prediction": loss.detach()}, out.feat, ones.bool(), at, out.states_at, end)

    def sample(
        self,
        dynamics: Dynamics,
        feat: Tensor,
        state: State,
        action: Tensor,
        steps: int,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """See `Objective.sample`."""
        like = feat.new_empty(feat.shape[0], dynamics.tokens, dynamics.channels)
        return draw_one_hots(self._logits(feat, action, like), self.classes, temperature)

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy `(B,)` of the prediction, in nats per variable."""
        return cross_entropy(self._logits(feat, action, z), z, self.classes).mean((-2, -1))

    def _logits(self, feat: Tensor, action: Tensor, like: Tensor) -> Tensor:
        """feat `(..., F)` and action `(..., A)` to logits of the next frame, of the shape of `like`."""
        return self.head(torch.cat([feat, action], -1)).view_as(like)
