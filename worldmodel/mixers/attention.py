"""Attention over frames as a part of a layer: projections, norms of queries and keys, and the frames it reaches.

It is a mixer of its own kind. Its state is a cache of keys and values, which all layers of M store alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.kernels.attention import (
    QKV,
    QUERY_FRAMES,
    AttentionMask,
    Cache,
    attend,
    attend_causal,
    attend_flex,
    attend_kernels,
    attend_step,
    attention_mask,
    cache_after,
    cache_at,
    flex_attention_mask,
    kernels,
    precision,
    push,
)
from longdream.worldmodel.kernels.qk_norm_rope import qk_norm, qk_norm_rope
from longdream.worldmodel.kernels.rope import rope_table

MAX_CONTEXT_FRAMES = 8192
"""Frames that attention over all frames sees at most. Its cache grows with the frames seen, up to these."""
FLEX_MIN_HEAD = 16
"""Channels per head that FlexAttention needs at least."""


class Attention(nn.Module):
    """Attention over frames.

    Args:
        grows: attend to all frames so far, so that the cache grows with them; else to the last `config.window` frames.

    Raises:
        ValueError: heads too narrow for FlexAttention, where the configuration asks for it.
    """

    rope: Tensor

    def __init__(self, config: DynamicsConfig, grows: bool = False):
        super().__init__()
        width = config.width
        head = width // config.num_heads
        self.num_heads = config.num_heads
        self.chunk_frames = config.chunk_frames
        self.grows = grows
        self.path = config.attention
        if self.path == "flex" and head < FLEX_MIN_HEAD:
            raise ValueError(
                f"worldmodel.attention = flex needs heads of {FLEX_MIN_HEAD} channels, these have {head}: lower "
                f"worldmodel.num_heads or use sdpa"
            )
        self.reach = (MAX_CONTEXT_FRAMES if grows else config.window) - self.chunk_frames
        # precomputed, since a compiled layer would recompute it for every element that it rotates
        positions = 0 if grows else QUERY_FRAMES + self.chunk_frames + self.reach
        self.register_buffer("rope", rope_table(torch.arange(positions), head), persistent=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        if config.tied_condition_keys:
            with torch.no_grad():
                self.qkv.weight[:width].copy_(self.qkv.weight[width : 2 * width])
        self.q_norm = nn.LayerNorm(head, bias=False)
        self.k_norm = nn.LayerNorm(head, bias=False)
        self.out = nn.Linear(width, width)

    def initial(self, batch: int, tokens: int, device: torch.device | str) -> Cache:
        """An empty cache: of `reach` frames, or of none if it grows."""
        frames = 0 if self.grows else self.reach
        head = self.out.in_features // self.num_heads
        empty = torch.zeros(batch, frames, tokens, self.num_heads, head, device=device)
        return Cache(empty, empty, torch.zeros(batch, dtype=torch.long, device=device))

    def mask(self, first: Tensor, cache: Cache, query: bool) -> AttentionMask | None:
        """What `forward` over a clip, with or without a query stream, needs unless it computes in dense rectangles."""
        if self.path == "triton" and kernels is not None and kernels.fit(cache.v, precision(cache.v)):
            return attention_mask(first, cache)
        if self.path == "flex" and first.is_cuda and torch.is_grad_enabled():  # compiled for each length
            return flex_attention_mask(first, cache, self.reach, query, self.chunk_frames)
        return None

    def forward(
        self,
        h: Tensor,
        first: Tensor,
        cache: Cache,
        query_h: Tensor | None,
        at: Tensor | None,
        mask: AttentionMask | None,
    ) -> tuple[Tensor, Tensor | None, Cache, Cache | None]:
        """A clip in parallel, and a query stream with it if there is one.

        Args:
            h, query_h: `(B, T, N, W)`, normed tokens. first, cache: see `attend`. mask: `Attention.mask` of this clip.
            at: `(B, M)`, frames after which the cache is returned as well.

        Returns:
            y and query_y `(B, T, N, W)`. Without gradient: the cache after the clip and, after the frames `at`, k, v
            `(B * M, ...)` and age `(B * M,)`.
        """
        projected = self._project(h)
        query_projected = None if query_h is None else self._project(query_h)
        if mask is not None and mask.clean is None:
            y, query_y = self._by_kernels(projected, cache, mask, query_projected)
        else:
            clean = self._qk_norm(projected)
            query = None if query_projected is None else self._qk_norm(query_projected)
            if mask is not None:
                y, query_y = attend_flex(clean, cache, mask, query)
            elif self.grows:
                y, query_y = attend_causal(clean, first, cache, self.reach, query, chunk_frames=self.chunk_frames)
            else:
                y, query_y = attend(clean, first, cache, query, chunk_frames=self.chunk_frames, rope=self.rope)
        end, states_at = self._caches(projected.detach(), first, cache, at)
        return self._out(y, h), None if query_y is None else self._out(query_y, h), end, states_at

    def step(self, h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One frame `(B, 1, N, W)`: y like it, and the cache after it."""
        qkv = self._qk_norm(self._project(h))
        y = attend_step(qkv, cache, None if self.grows else self.rope)
        return self._out(y, h), push(cache, qkv.k, qkv.v, self.reach)

    def _by_kernels(
        self, projected: Tensor, cache: Cache, mask: AttentionMask, query_projected: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dtype = precision(projected)
        weights = (self.q_norm.weight, self.k_norm.weight)
        clean = qk_norm_rope(projected, *weights, cache, mask.rope, dtype)
        query = None
        if query_projected is not None:
            query = qk_norm_rope(query_projected, *weights, None, mask.rope[cache.k.shape[1] :], dtype)
        return attend_kernels(clean, mask.segment, self.reach, query, self.chunk_frames)

    @torch.no_grad()
    def _caches(self, projected: Tensor, first: Tensor, cache: Cache, at: Tensor | None) -> tuple[Cache, Cache | None]:
        """The caches after a clip and after the frames `at` `(B, M)` of it."""
        needed = projected if at is not None and at.numel() else projected[:, max(0, projected.shape[1] - self.reach) :]
        qkv = self._qk_norm(needed)
        before = Cache(cache.k.detach(), cache.v.detach(), cache.age)
        end = cache_after(qkv, first, before, self.reach)
        if at is None:
            return end, None
        return end, Cache(*(v.flatten(0, 1) for v in cache_at(qkv, first, before, at, self.reach)))

    def _project(self, h: Tensor) -> Tensor:
        """`(B, T, N, W)` to projected queries, keys and values, `(B, T, N, 3, H, P)`."""
        return self.qkv(h).unflatten(-1, (3, self.num_heads, -1))

    def _qk_norm(self, projected: Tensor) -> QKV:
        return qk_norm(projected, self.q_norm.weight, self.k_norm.weight)

    def _out(self, y: Tensor, h: Tensor) -> Tensor:
        return self.out(y.flatten(-2).to(h.dtype))
