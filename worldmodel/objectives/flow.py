"""Diffusion forcing on continuous latents in flow-matching form, with optional shortcut steps.

z_tau = (1 - tau) noise + tau z. M predicts z itself (x-prediction and x-loss; Hafner et al. 2025, arXiv 2509.24527).

With `forcing.shortcut`, M is conditioned on the length of a denoising step and learns long steps from itself: one step
is to lead where two steps of half its length lead (Frans et al. 2024, arXiv 2410.12557; in x-space, arXiv 2509.24527).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longdream.worldmodel.config import ForcingConfig
from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.objectives.base import MAX_DENOISING_STEPS, Forcing, RunClip


class Flow(Forcing):
    """Gaussian flow matching with a noise level per frame."""

    latent = "continuous"

    def __init__(self, config: ForcingConfig, dynamics: Dynamics):
        super().__init__(config, dynamics)
        self.exponent = int(math.log2(MAX_DENOISING_STEPS))
        if config.shortcut:
            dynamics.condition_on_step_size()

    def pure_noise(self, like: Tensor, temperature: float | Tensor) -> Tensor:
        return torch.randn_like(like) * temperature

    def corrupt(self, z: Tensor, level: Tensor) -> Tensor:
        level = level[..., None, None]
        return (1 - level) * torch.randn_like(z) + level * z

    def error(self, pred: Tensor, z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        error = (pred - z).square().mean((-2, -1))
        return error * (0.9 * level + 0.1) if self.config.ramp else error

    def denoise(self, z: Tensor, pred: Tensor, level: Tensor, to: Tensor, temperature: float | Tensor) -> Tensor:
        """An Euler step along v = (pred - z) / (1 - tau); latents are bounded, and predictions are clipped to that."""
        pred = pred.clamp(-1, 1)
        share = ((to - level) / (1 - level).clamp(min=1e-6)).clamp(0, 1)[..., None, None]
        return z + share * (pred - z)

    def sample_step_sizes(self, level: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.config.shortcut:
            return level, None
        long = torch.rand_like(level) < self.config.shortcut
        steps = 2.0 ** torch.randint_like(level, self.exponent)
        # long steps begin at multiples of their length
        begin = (torch.rand_like(level) * steps).floor() / steps
        return torch.where(long, begin, level), torch.where(long, steps, MAX_DENOISING_STEPS)

    def step_size(self, steps: Tensor | None) -> Tensor | None:
        if steps is None or not self.config.shortcut:
            return None
        return (steps.log2() / self.exponent).clamp(max=1)

    @torch.no_grad()
    def shortcut_target(self, run_clip: RunClip, z: Tensor, noisy: Tensor, level: Tensor, steps: Tensor) -> Tensor:
        """The clean latents z; for long steps, the latents at which the mean velocity of two half steps points."""
        long = steps < MAX_DENOISING_STEPS
        half = torch.where(long, 0.5 / steps, 0.0)
        step_size = self.step_size(2 * steps)
        first = velocity(run_clip(noisy, level, step_size).pred, noisy, level)
        middle = noisy + half[..., None, None] * first
        middle_level = level + half
        second = velocity(run_clip(middle, middle_level, step_size).pred, middle, middle_level)
        target = noisy + (1 - level)[..., None, None] * (first + second) / 2
        return torch.where(long[..., None, None], target, z)

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        """Squared error `(B,)` of the prediction from level 0."""
        level = torch.zeros_like(action[:, 0])
        pred = dynamics.predict(state, torch.zeros_like(z), action, level)
        return (pred - z).square().mean((-2, -1))


def velocity(z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
    """z - noise, the velocity `(..., N, D)` of the path from noise to clean latents z, for a frame that is at `level`
    `(...)` on it."""
    return (z - noisy) / (1 - level).clamp(min=1e-6)[..., None, None]
