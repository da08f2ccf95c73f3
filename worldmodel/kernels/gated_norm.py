"""The output stage of a scan: norm over the width, times a gate, as in Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

The scan runs over tubes. A tube is one square block of the token grid through all frames; its tokens are scanned one
after another, in raster order within a frame. On CUDA one kernel brings a clip's tokens back to raster order of the
whole frame, norms and gates them (gated_norm_triton.py).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

try:
    from longdream.worldmodel.kernels import gated_norm_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    """`norm(y) * weight * silu(gate)` over a clip: by the kernel where it fits, else by `gated_norm_reference`.

    Args:
        y: `(B * side * side, T, n, H, P)`, of tubes with n tokens per frame, whose width is W = H * P.
        gate: `(B, T, N, W)`, of N = side * side * n tokens per frame.
        weight: `(W,)`, of the LayerNorm, which has no bias.
        side: tubes along an edge of the token grid.

    Returns:
        a tensor like gate.
    """
    if kernels is not None and kernels.fit(y):
        return kernels.gated_norm(y, gate, weight, side)
    return gated_norm_reference(y, gate, weight, side)


def gated_norm_reference(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    """`gated_norm` in torch."""
    y = from_tubes(y, side).flatten(-2).to(gate.dtype)
    return F.layer_norm(y, weight.shape, weight) * F.silu(gate)


def to_tubes(v: Tensor, side: int) -> Tensor:
    """`(B, T, N, ...)` to `(B * side * side, T, n, ...)`: one row per tube."""
    if side == 1:
        return v
    block = math.isqrt(v.shape[2]) // side
    v = v.unflatten(2, (side, block, side, block))
    return v.movedim((2, 4), (1, 2)).flatten(0, 2).flatten(2, 3)


def from_tubes(v: Tensor, side: int) -> Tensor:
    """The inverse of `to_tubes`."""
    if side == 1:
        return v
    block = math.isqrt(v.shape[2])
    v = v.unflatten(2, (block, block)).unflatten(0, (-1, side, side))
    return v.movedim((1, 2), (2, 4)).flatten(2, 5)
