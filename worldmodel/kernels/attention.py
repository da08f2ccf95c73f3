"""Attention over frames: every token of frame t attends to all tokens of frames [t - k + 1, t] of its own episode.

With chunks of c frames (Po et al. 2025, arXiv 2505.20171: c = 5, k = 10), every frame of a chunk attends to its whole
chunk and to the k - c frames before the chunk. c = 1 is the rule above. Chunks are counted from the start of a clip,
and a cache ends where a chunk ends. `reach` below is k - c, the frames before its chunk that a query sees.

Over a clip, attention is computed in dense rectangles of query frames by key frames, through
`scaled_dot_product_attention`. The rectangles have one size if the reach is a window (`attend`) and grow with the past
if it is everything seen so far (`attend_causal`). Streamed, one query frame attends to a cache. Queries and keys are
rotated by their frames' positions (rope.py) when attention is computed; the cache holds them unrotated, and so nothing
in it depends on the age of an episode.

A query stream may accompany the clean stream (as in XLNet's two-stream attention; Yang et al. 2019, arXiv 1906.08237).
A chunk of it attends to the clean frames before it and to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from longdream.worldmodel.kernels.rope import apply_rope, rope_table

try:
    from longdream.worldmodel.kernels import attention_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None

QUERY_FRAMES = 16
"""Query frames per rectangle of attention over a window."""


class QKV(NamedTuple):
    """Queries, keys and values of a clip, each `(B, T, N, H, P)`, before rotation."""

    q: Tensor
    k: Tensor
    v: Tensor


class RotatedQKV(NamedTuple):
    """Rotated queries `(B, T, N, H, P)`, rotated keys and values `(B, held + T, N, H, P)`, the cache's first."""

    q: Tensor
    k: Tensor
    v: Tensor


class Cache(NamedTuple):
    """Keys and values of the last frames, `(B, held, N, H, P)`, oldest first; age `(B,)`: how many of them are valid.

    held is the reach, or fewer frames while a growing cache is shorter.
    """

    k: Tensor
    v: Tensor
    age: Tensor


class AttentionMask(NamedTuple):
    """What attention over a clip needs beside queries, keys and values. All layers share it.

    segment: `(B, held + T)` int32, the episode of each cached and new frame. rope: `(held + T, 2, P // 2)`, the rotary
    table of these frames. clean, query: for FlexAttention, which tokens each stream's tokens see.
    """

    segment: Tensor
    rope: Tensor
    clean: BlockMask | None = None
    query: BlockMask | None = None


def attend(
    clean: QKV,
    first: Tensor,
    cache: Cache,
    query: QKV | None = None,
    query_frames: int = QUERY_FRAMES,
    chunk_frames: int = 1,
    rope: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a clip through a window of frames.

    Args:
        clean, query: of the two streams. first: `(B, T)` bool, frames that begin an episode.
        cache: of the frames before the clip; it holds exactly the reach.
        query_frames: query frames per rectangle. chunk_frames: c.
        rope: `rope_table` of positions from 0 to query_frames + reach at least, if it is precomputed.

    Returns:
        y `(B, T, N, H, P)` of the clean stream and, where there is one, of the query stream.
    """
    frames = clean.q.shape[1]
    reach = cache.k.shape[1]
    query_frames = _round_up(min(query_frames, frames), chunk_frames)
    pad = -frames % query_frames
    keys = torch.cat([cache.k, clean.k], 1)
    values = torch.cat([cache.v, clean.v], 1)
    segment = key_segments(first, cache.age, reach)
    if pad:
        keys = _pad_frames(keys, pad)
        values = _pad_frames(values, pad)
        segment = F.pad(segment, (0, pad), value=-1)
    keys = _windows(keys, query_frames, reach)  # (B * rectangles, query_frames + reach, N, H, P)
    values = _windows(values, query_frames, reach)
    query_segment = _windows(segment[:, reach:], query_frames, 0)
    key_segment = _windows(segment, query_frames, reach)
    position = torch.arange(query_frames + reach, device=first.device)
    rope = rope_table(position, clean.q.shape[-1]) if rope is None else rope[: query_frames + reach]
    chunk_start = (reach + torch.arange(query_frames, device=first.device) // chunk_frames * chunk_frames)[:, None]
    near = (position >= chunk_start - reach) & (position < chunk_start + chunk_frames)
    # padded frames are all of segment -1 and see each other: no row of the mask is empty
    mask = near & (query_segment[:, :, None] == key_segment[:, None, :])

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_rope: Tensor) -> Tensor:
        if pad:
            q = _pad_frames(q, pad)
        q = _windows(q, query_frames, 0)
        y = _sdpa(apply_rope(q, rope[reach:]), apply_rope(k, key_rope), v, mask)
        return y.reshape(-1, frames + pad, *y.shape[2:])[:, :frames]

    y = run(clean.q, keys, values, mask, rope)
    if query is None:
        return y, None
    own_keys = _pad_frames(query.k, pad) if pad else query.k
    own_values = _pad_frames(query.v, pad) if pad else query.v
    keys = torch.cat([keys, _windows(own_keys, query_frames, 0)], 1)
    values = torch.cat([values, _windows(own_values, query_frames, 0)], 1)
    past = mask & (position < chunk_start)
    own = (chunk_start == chunk_start.T) & (query_segment[:, :, None] == query_segment[:, None, :])
    query_y = run(query.q, keys, values, torch.cat([past, own], 2), torch.cat([rope, rope[reach:]]))
    return y, query_y


def attend_causal(
    clean: QKV,
    first: Tensor,
    cache: Cache,
    reach: int,
    query: QKV | None = None,
    query_frames: int = 32,
    chunk_frames: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """`attend` where the reach is long and the cache holds all frames so far, up to the reach.

    Rectangles are computed one after another, and their masks over tokens are recomputed in the backward pass. What is
    kept for it grows with the square of the clip's frames, not of its tokens.
    """
    held = cache.k.shape[1]
    frames = clean.q.shape[1]
    query_frames = _round_up(min(query_frames, frames), chunk_frames)
    segment = key_segments(first, cache.age, held)
    position = torch.arange(held + frames, device=first.device)
    chunk_start = (held + torch.arange(frames, device=first.device) // chunk_frames * chunk_frames)[:, None]
    rope = rope_table(position, clean.q.shape[-1])
    keys = apply_rope(torch.cat([cache.k, clean.k], 1), rope)
    values = torch.cat([cache.v, clean.v], 1)
    queries = apply_rope(clean.q, rope[held:])
    if query is not None:
        query = QKV(apply_rope(query.q, rope[held:]), apply_rope(query.k, rope[held:]), query.v)
    ys = []
    query_ys = []
    for start in range(0, frames, query_frames):
        now = slice(start, min(start + query_frames, frames))
        past = slice(max(0, held + start - reach), held + now.stop)
        query_segment = segment[:, held:][:, now, None]
        near = (position[past] >= chunk_start[now] - reach) & (position[past] < chunk_start[now] + chunk_frames)
        mask = near & (query_segment == segment[:, None, past])
        ys.append(_recomputed_sdpa(queries[:, now], keys[:, past], values[:, past], mask))
        if query is not None:
            own = (chunk_start[now] == chunk_start[now].T) & (query_segment == query_segment.transpose(1, 2))
            k = torch.cat([keys[:, past], query.k[:, now]], 1)
            v = torch.cat([values[:, past], query.v[:, now]], 1)
            mask = torch.cat([mask & (position[past] < chunk_start[now]), own], 2)
            query_ys.append(_recomputed_sdpa(query.q[:, now], k, v, mask))
    return torch.cat(ys, 1), torch.cat(query_ys, 1) if query is not None else None


def attention_mask(first: Tensor, cache: Cache) -> AttentionMask:
    """The mask of `attend_kernels`; first `(B, T)` bool and the cache as for `attend`."""
    segment = key_segments(first, cache.age, cache.k.shape[1])
    position = torch.arange(segment.shape[1], device=first.device)
    return AttentionMask(segment.int(), rope_table(position, cache.k.shape[-1]))


def rotate_qkv(qkv: QKV, cache: Cache | None, rope: Tensor) -> RotatedQKV:
    """Inputs of attention from a clip's queries, keys and values and from the cache, if there is one.

    rope: `(held + T, 2, P // 2)`, of all these frames.
    """
    keys = qkv.k if cache is None else torch.cat([cache.k, qkv.k], 1)
    values = qkv.v if cache is None else torch.cat([cache.v, qkv.v], 1)
    held = len(rope) - qkv.q.shape[1]
    return RotatedQKV(apply_rope(qkv.q, rope[held:]), apply_rope(keys, rope), values)


def attend_kernels(
    clean: RotatedQKV, segment: Tensor, reach: int, query: RotatedQKV | None = None, chunk_frames: int = 1
) -> tuple[Tensor, Tensor | None]:
    """`attend` and `attend_causal` by the kernels for CUDA (attention_triton.py), where `kernels.fit`.

    Args:
        clean: of the cache and the clip, with at most `kernels.MAX_HEAD` channels per head.
        query: of the query stream alone. segment: the frames' episodes (`AttentionMask`).
        reach: frames before its chunk that a query sees, at least as many as the cache holds. chunk_frames: c.

    Returns:
        y `(B, T, N, H, P)`, like clean.q, and, with a query stream, its y.
    """
    assert kernels is not None
    y = kernels.attention(*clean, None, segment, reach, chunk_frames)
    if query is None:
        return y, None
    return y, kernels.attention(query.q, clean.k, clean.v, (query.k, query.v), segment, reach, chunk_frames)


def flex_attention_mask(first: Tensor, cache: Cache, reach: int, query: bool, chunk_frames: int = 1) -> AttentionMask:
    """The mask of `attend_flex`; query: whether there is a query stream. Other arguments as for `attend`.

    It evaluates every pair of tokens once, to find the blocks of pairs that are masked altogether; compiled on CUDA.
    """
    held, tokens = cache.k.shape[1:3]
    mask = attention_mask(first, cache)
    segment = mask.segment
    clean_frames = segment.shape[1]

    def chunk_start(frame: Tensor) -> Tensor:
        return held + (frame - held) // chunk_frames * chunk_frames

    def sees(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query_frame = q // tokens + held
        key_frame = k // tokens
        start = chunk_start(query_frame)
        near = (key_frame >= start - reach) & (key_frame < start + chunk_frames)
        return near & (segment[b, query_frame] == segment[b, key_frame])

    def sees_past_and_own_chunk(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query_frame = q // tokens + held
        key = k // tokens
        own = key >= clean_frames  # the query stream's keys follow the clean stream's
        key_frame = torch.where(own, key - clean_frames + held, key)
        start = chunk_start(query_frame)
        past = (key_frame >= start - reach) & (key_frame < start)
        near = torch.where(own, chunk_start(key_frame) == start, past)
        return near & (segment[b, query_frame] == segment[b, key_frame])

    def block_mask(sees: Callable[..., Tensor], key_frames: int) -> BlockMask:
        make = _compiled()[1] if first.is_cuda else create_block_mask
        return make(sees, len(first), None, first.shape[1] * tokens, key_frames * tokens, device=first.device)

    own = block_mask(sees_past_and_own_chunk, clean_frames + first.shape[1]) if query else None
    return mask._replace(clean=block_mask(sees, clean_frames), query=own)


def attend_flex(
    clean: QKV, cache: Cache, mask: AttentionMask, query: QKV | None = None
) -> tuple[Tensor, Tensor | None]:
    """`attend` and `attend_causal` as one call of FlexAttention, which skips blocks of tokens that are masked
    altogether (Dong et al. 2024, arXiv 2412.05496).

    The mask is `flex_attention_mask` of the same cache. On CUDA it is compiled and needs heads of 16 channels or more;
    elsewhere it runs uncompiled and without gradient.
    """
    assert mask.clean is not None
    q, k, v = rotate_qkv(clean, cache, mask.rope)
    y = _flex(q, k, v, mask.clean)
    if query is None:
        return y, None
    assert mask.query is not None
    own = rotate_qkv(query, None, mask.rope[cache.k.shape[1] :])
    return y, _flex(own.q, torch.cat([k, own.k], 1), torch.cat([v, own.v], 1), mask.query)


def attend_step(qkv: QKV, cache: Cache, rope: Tensor | None = None) -> Tensor:
    """One frame (T = 1, c = 1) attends to the cache and itself: y `(B, 1, N, H, P)`. rope: see `attend`."""
    held = cache.k.shape[1]
    position = torch.arange(held + 1, device=qkv.q.device)
    valid = position >= held - cache.age[:, None]  # the frame itself always is
    k = torch.cat([cache.k, qkv.k], 1)
    v = torch.cat([cache.v, qkv.v], 1)
    rope = rope_table(position, k.shape[-1]) if rope is None else rope[: held + 1]
    return _sdpa(apply_rope(qkv.q, rope[held:]), apply_rope(k, rope), v, valid[:, None])


def push(cache: Cache, k: Tensor, v: Tensor, reach: int) -> Cache:
    """The cache after one more frame, k and v `(B, 1, N, H, P)`; it holds at most `reach` frames."""
    excess = max(0, cache.k.shape[1] + 1 - reach)
    k = torch.cat([cache.k, k], 1)[:, excess:]
    v = torch.cat([cache.v, v], 1)[:, excess:]
    return Cache(k, v, (cache.age + 1).clamp(max=reach))


def cache_at(clean: QKV, first: Tensor, cache: Cache, at: Tensor, reach: int) -> Cache:
    """Caches after the frames `at` `(B, M)` of a clip: k, v `(B, M, held, N, H, P)`, age `(B, M)`.

    They hold `reach` frames, or as many as there were.
    """
    held = cache.k.shape[1]
    reach = min(reach, held + first.shape[1])
    rows = torch.arange(len(at), device=at.device)[:, None, None]
    index = at[..., None] + (held - reach + 1) + torch.arange(reach, device=at.device)
    exists = index >= 0
    index = index.clamp(min=0)
    k = torch.cat([cache.k, clean.k], 1)[rows, index]
    v = torch.cat([cache.v, clean.v], 1)[rows, index]
    segment = key_segments(first, cache.age, held)
    now = segment[:, held:].gather(1, at)
    return Cache(k, v, (exists & (segment[rows, index] == now[..., None])).sum(-1))


def cache_after(clean: QKV, first: Tensor, cache: Cache, reach: int) -> Cache:
    """The cache after the last frame of a clip; see `cache_at`. clean need only hold the clip's last `reach` frames."""
    held = cache.k.shape[1]
    reach = min(reach, held + first.shape[1])
    k = torch.cat([cache.k, clean.k], 1)
    v = torch.cat([cache.v, clean.v], 1)
    segment = key_segments(first, cache.age, held)
    age = (segment[:, segment.shape[1] - reach :] == segment[:, -1:]).sum(-1)
    # cloned, since a view would keep the whole clip in memory
    return Cache(k[:, k.shape[1] - reach :].clone(), v[:, v.shape[1] - reach :].clone(), age)


def attend_reference(
    clean: QKV,
    first: Tensor,
    cache: Cache,
    query: QKV | None = None,
    chunk_frames: int = 1,
    reach: int | None = None,
) -> Tensor:
    """The slow reference: one query frame after another, a masked softmax over every key of the clip.

    Args:
        reach: None for the number of frames in the cache. Others as for `attend`.

    Returns:
        y of the query stream, or of the clean stream if there is none.
    """
    held = cache.k.shape[1]
    frames = clean.q.shape[1]
    reach = held if reach is None else reach
    keys = torch.cat([cache.k, clean.k], 1)
    values = torch.cat([cache.v, clean.v], 1)
    segment = key_segments(first, cache.age, held)
    own = clean if query is None else query
    outputs = []
    for t in range(frames):
        start = t // chunk_frames * chunk_frames
        end = min(start + chunk_frames, frames)
        position = torch.arange(held + end, device=first.device)
        k = torch.cat([keys[:, : held + start], own.k[:, start:end]], 1)
        v = torch.cat([values[:, : held + start], own.v[:, start:end]], 1)
        now = segment[:, held + t : held + t + 1]
        seen = (segment[:, : held + end] == now) & (position >= held + start - reach)
        rope = rope_table(position, k.shape[-1])
        q = apply_rope(own.q[:, t : t + 1], rope[held + t :][:1])
        k = apply_rope(k, rope)
        score = torch.einsum("bqnhp,bkmhp->bhnkm", q, k) / q.shape[-1] ** 0.5
        score = score.masked_fill(~seen[:, None, None, :, None], -torch.inf).flatten(-2).softmax(-1)
        outputs.append(torch.einsum("bhnk,bkhp->bnhp", score, v.flatten(1, 2)))
    return torch.stack(outputs, 1)


def key_segments(first: Tensor, age: Tensor, held: int) -> Tensor:
    """`(B, held + T)`: the episode, counted from the clip's start, of each cached and each new frame; -1 where a cached
    frame is not valid."""
    valid = torch.arange(held, device=first.device) >= held - age[:, None]
    return torch.cat([valid.long() - 1, first.long().cumsum(1)], 1)


def _round_up(frames: int, chunk_frames: int) -> int:
    """The next multiple of chunk_frames."""
    return -(-frames // chunk_frames) * chunk_frames


def _pad_frames(v: Tensor, pad: int) -> Tensor:
    """`(B, T, N, H, P)` with so many more frames, of zeros."""
    return F.pad(v, (0, 0) * 3 + (0, pad))


def _windows(v: Tensor, size: int, reach: int) -> Tensor:
    """`(B, reach + T, ...)` to `(B * T / size, reach + size, ...)`: runs of `size` frames, each with the `reach` frames
    before it."""
    v = v.unfold(1, size + reach, size)  # (B, runs, ..., size + reach)
    return v.movedim(-1, 2).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q `(B, Tq, N, H, P)`, k, v `(B, Tk, N, H, P)`, mask `(B, Tq, Tk)` over frames: y `(B, Tq, N, H, P)`."""
    tokens = q.shape[2]
    if tokens > 1:
        mask = mask.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    folded = [t.flatten(1, 2).transpose(1, 2).to(precision(v)) for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*folded, attn_mask=mask[:, None])
    return y.transpose(1, 2).unflatten(1, (-1, tokens)).to(v.dtype)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """As `_sdpa`, with a mask over blocks of tokens."""
    folded = [t.flatten(1, 2).transpose(1, 2).to(precision(v)) for t in (q, k, v)]
    inside = torch.compiler.is_compiling() or not v.is_cuda  # compiled as part of what surrounds it
    run: Any = flex_attention if inside else _compiled()[0]
    y = run(*folded, block_mask=mask)
    return y.transpose(1, 2).unflatten(1, (-1, q.shape[2])).to(v.dtype)


@once
def _compiled() -> tuple[Any, Any]:
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _recomputed_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`_sdpa`, recomputed in the backward pass instead of stored for it."""
    if not torch.is_grad_enabled():
        return _sdpa(q, k, v, mask)
    return cast(Tensor, checkpoint(_sdpa, q, k, v, mask, use_reentrant=False, preserve_rng_state=False))


def precision(v: Tensor) -> torch.dtype:
    """The dtype that attention is computed in: on CUDA, bfloat16 instead of float32, unless float32 has to be exact."""
    if v.is_cuda and v.dtype == torch.float32 and not _exact():
        return torch.bfloat16  # in float32 this was a fifth of the time of training M on an H200
    return v.dtype


@torch.compiler.assume_constant_result  # otherwise the call would break the graph of a compiled layer
def _exact() -> bool:
    return torch.get_float32_matmul_precision() == "highest"
