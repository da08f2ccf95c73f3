"""The reference between projection and attention."""

import pytest
import torch

from longdream.worldmodel.kernels.attention import Cache
from longdream.worldmodel.kernels.qk_norm_rope import qk_norm, qk_norm_rope, qk_norm_rope_reference
from longdream.worldmodel.kernels.rope import apply_rope, rope_table

FRAMES, TOKENS, HEADS, HEAD = 4, 3, 2, 6


@pytest.mark.parametrize("held", [None, 0, 5])
def test_the_reference_by_hand(held: int | None) -> None:
    """Queries and keys are normed and rotated by their frames; keys of a cache are normed already."""
    qkv = torch.randn(2, FRAMES, TOKENS, 3, HEADS, HEAD, dtype=torch.float64)
    q_weight = torch.rand(HEAD, dtype=torch.float64) + 0.5
    k_weight = torch.rand(HEAD, dtype=torch.float64) + 0.5
    before = torch.randn(2, 2, held or 0, TOKENS, HEADS, HEAD, dtype=torch.float64)
    cache = None if held is None else Cache(*before, torch.full((2,), held))
    rope = rope_table(torch.arange(FRAMES + (held or 0)), HEAD).double()
    got = qk_norm_rope_reference(qkv, q_weight, k_weight, cache, rope, torch.float64)

    def normed(part: int, weight: torch.Tensor) -> torch.Tensor:
        x = qkv[..., part, :, :]
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    keys = torch.cat([before[0], normed(1, k_weight)], 1)
    torch.testing.assert_close(got.q, apply_rope(normed(0, q_weight), rope[held or 0 :]))
    torch.testing.assert_close(got.k, apply_rope(keys, rope))
    assert torch.equal(got.v, torch.cat([before[1], qkv[..., 2, :, :]], 1))
    same = qk_norm_rope(qkv, q_weight, k_weight, cache, rope, torch.float64)  # no kernel computes in float64
    assert all(torch.equal(a, b) for a, b in zip(same, got, strict=True))
    rounded = qk_norm_rope_reference(qkv, q_weight, k_weight, cache, rope, torch.float32)
    assert {v.dtype for v in rounded} == {torch.float32}


def test_values_have_the_precision_of_the_norms_under_autocast() -> None:
    qkv = torch.randn(1, 2, 1, 3, HEADS, HEAD).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        normed = qk_norm(qkv, torch.ones(HEAD), torch.ones(HEAD))
    assert normed.k.dtype == normed.v.dtype
