"""The output of M: predicted latents, and the feature that C and the heads read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.networks import mlp


class Predictor(nn.Module):
    """Maps tokens after the last layer to predicted latents and to features.

    Args:
        grid: side of the token grid; N = grid * grid tokens per frame.
        channels: D of the latents. actions: A, length of an encoded action.

    Attributes:
        feature_size: F.
    """

    def __init__(self, config: DynamicsConfig, grid: int, channels: int, actions: int):
        super().__init__()
        self.grid = grid
        self.feature_skip = config.feature_skip
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.out = nn.Linear(config.width, channels)
        nn.init.zeros_(self.out.bias)
        # With predict_residual the prediction is the previous frame at first: layers that know nothing yet would only
        # blur it. `keep` is the share of each of its channels that stays.
        if config.predict_residual:
            nn.init.zeros_(self.out.weight)
        self.keep = nn.Parameter(torch.ones(channels)) if config.predict_residual else None
        frame = grid**2 * channels
        hidden = config.frame_mlp_width
        self.frame_mlp = mlp(frame + actions, hidden, frame, zero=True) if hidden else None
        # a feature is the frame's tokens side by side, pooled to 4 x 4 where the grid is finer
        self.feature_grid = min(grid, 4)
        self.feature_size = self.feature_grid**2 * (config.width + channels * config.feature_skip)

    def forward(self, u: Tensor, last: Tensor, action: Tensor) -> Tensor:
        """Predicted latents `(..., N, D)`, or their logits.

        Args:
            u: `(..., N, W)`, tokens through `norm`. last: `(..., N, D)`, latents of the frame before, zeros if there is
                none. action: `(..., A)`, the action that led from it to this frame.
        """
        pred = self.out(u)
        if self.keep is not None:
            pred = pred + self.keep * last
        if self.frame_mlp is not None:
            pred = pred + self.frame_mlp(torch.cat([last.flatten(-2), action], -1)).unflatten(-1, last.shape[-2:])
        return pred

    def feature(self, u: Tensor, z: Tensor) -> Tensor:
        """Tokens through `norm` `(B, T, N, W)` and the frames' latents `(B, T, N, D)` to features `(B, T, F)`."""
        if self.feature_skip:
            u = torch.cat([u, z], -1)
        if self.grid > self.feature_grid:
            maps = u.flatten(0, 1).transpose(1, 2).unflatten(-1, (self.grid, self.grid))
            u = F.adaptive_avg_pool2d(maps, self.feature_grid).flatten(2).transpose(1, 2).unflatten(0, u.shape[:2])
        return u.flatten(2)
