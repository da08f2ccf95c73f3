"""Rotary position embedding over frames (RoPE; Su et al. 2021, arXiv 2104.09864).

Scores of rotated queries and keys depend on the distance between their frames alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(position: Tensor, channels: int) -> Tensor:
    """Cosines and sines of the rotary angles at frame positions `(T,)`: `(T, 2, channels // 2)` float32.

    Periods are spaced logarithmically from 2 pi to 2 pi * 1000 frames.
    """
    half = channels // 2
    rate = 1000.0 ** -(torch.arange(half, device=position.device, dtype=torch.float32) / half)
    angle = position[:, None] * rate
    return torch.stack([angle.cos(), angle.sin()], 1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """x `(B, T, N, H, P)` rotated by the rotary table `(T, 2, P // 2)` of its frames.

    Channel i is paired with channel i + P // 2; of an odd P, the last channel stays as it is.
    """
    half = rope.shape[-1]
    cos, sin = rope.to(x.dtype)[:, :, None, None].unbind(1)
    a = x[..., :half]
    b = x[..., half : 2 * half]
    rotated_a = torch.addcmul(a * cos, b, sin, value=-1)
    rotated_b = torch.addcmul(a * sin, b, cos)
    return torch.cat([rotated_a, rotated_b, x[..., 2 * half :]], -1)
