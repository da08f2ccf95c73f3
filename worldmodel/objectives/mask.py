"""Diffusion forcing on categorical latents, whose noise is a mask: absorbing-state diffusion (Austin et al. 2021, arXiv
2107.03006)."""

from __future__ import annotations

import torch
from torch import Tensor

from longdream.worldmodel.categorical import cross_entropy, draw_one_hots
from longdream.worldmodel.config import ForcingConfig
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.objectives.base import Forcing


class Mask(Forcing):
    """Each variable is hidden with probability 1 - tau; a hidden one is all zeros instead of one-hot."""

    latent = "categorical"

    def __init__(self, config: ForcingConfig, dynamics: Dynamics, classes: int):
        super().__init__(config, dynamics)
        self.classes = classes

    def pure_noise(self, like: Tensor, temperature: float | Tensor) -> Tensor:
        return torch.zeros_like(like)

    def corrupt(self, z: Tensor, level: Tensor) -> Tensor:
        z = z.unflatten(-1, (-1, self.classes))
        seen = torch.rand(z.shape[:-1], device=z.device) < level[..., None, None]
        return (z * seen[..., None]).flatten(-2)

    def error(self, pred: Tensor, z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        hidden = noisy.unflatten(-1, (-1, self.classes)).sum(-1) < 0.5
        nats = cross_entropy(pred, z, self.classes)
        return (nats * hidden).sum((-2, -1)) / hidden.sum((-2, -1)).clamp(min=1)

    def denoise(self, z: Tensor, pred: Tensor, level: Tensor, to: Tensor, temperature: float | Tensor) -> Tensor:
        """Reveal each hidden variable with the probability that leads from `level` to `to`."""
        drawn = draw_one_hots(pred, self.classes, temperature)
        known = z.unflatten(-1, (-1, self.classes))
        hidden = known.sum(-1, keepdim=True) < 0.5
        share = ((to - level) / (1 - level).clamp(min=1e-6))[..., None, None, None]
        revealed = hidden & (torch.rand_like(known[..., :1]) < share)
        return torch.where(revealed, drawn.unflatten(-1, (-1, self.classes)), known).flatten(-2)

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy `(B,)` of the prediction from level 0, in nats per variable."""
        level = torch.zeros_like(action[:, 0])
        pred = dynamics.predict(state, torch.zeros_like(z), action, level)
        return cross_entropy(pred, z, self.classes).mean((-2, -1))
