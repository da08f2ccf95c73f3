"""From an attention layer's projection to the inputs of its attention: norms of queries and keys, cache, rotary
embedding.

Queries and keys are normed as in Dehghani et al. 2023 (arXiv 2302.05442). On CUDA one kernel computes all of it for a
clip (qk_norm_rope_triton.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longdream.worldmodel.kernels.attention import QKV, Cache, RotatedQKV, rotate_qkv

try:
    from longdream.worldmodel.kernels import qk_norm_rope_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> QKV:
    """Projected queries, keys and values `(B, T, N, 3, H, P)`, split, with queries and keys normed.

    Args:
        q_weight, k_weight: `(P,)`, of LayerNorms without bias.
    """
    q, k, v = qkv.unbind(-3)
    k = F.layer_norm(k, k_weight.shape, k_weight)
    # autocast computes norms in float32; values, and with them the cache, then have that precision too
    return QKV(F.layer_norm(q, q_weight.shape, q_weight), k, v.to(k.dtype))


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache: Cache | None, rope: Tensor, dtype: torch.dtype
) -> RotatedQKV:
    """Inputs of attention over a clip: by the kernel where it fits, else by `qk_norm_rope_reference`.

    Args:
        qkv: `(B, T, N, 3, H, P)`, projected queries, keys and values.
        q_weight, k_weight: `(P,)` float32, of LayerNorms without bias.
        cache: normed keys and values of the `held` frames before the clip; None: held = 0.
        rope: `(held + T, 2, P // 2)` float32, `rope_table` of the cached frames and the clip's.
        dtype: of the result.
    """
    if kernels is None or not kernels.fit(qkv):
        return qk_norm_rope_reference(qkv, q_weight, k_weight, cache, rope, dtype)
    no_frames = qkv.detach()[:, :0, :, 0]
    cache_k, cache_v = (no_frames, no_frames) if cache is None else cache[:2]
    return RotatedQKV(*kernels.qk_norm_rope(qkv, q_weight, k_weight, cache_k, cache_v, rope, dtype))


def qk_norm_rope_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache: Cache | None, rope: Tensor, dtype: torch.dtype
) -> RotatedQKV:
    """`qk_norm_rope` in torch."""
    rotated = rotate_qkv(qk_norm(qkv, q_weight, k_weight), cache, rope)
    return RotatedQKV(*(v.to(dtype) for v in rotated))
