"""Frame-local attention: every token of frame t attends to all tokens of frames [t - k + 1, t] of its own episode.

Parallel over a clip it is computed as dense rectangles, blocks of query frames against the frames they can reach,
through `scaled_dot_product_attention`; streamed, as one query frame against a cache of the last k - 1 frames. Time
enters as rotary phases (Su et al. 2021, arXiv 2104.09864) of the distance between frames, so that the cache holds
keys without any position and nothing grows with the age of an episode.

A *query* stream may run beside the clean one: query frame t attends to the clean frames [t - k + 1, t - 1] and to
itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Heads(NamedTuple):
    """Queries, keys and values, each `(B, T, N, H, P)`."""

    q: Tensor
    k: Tensor
    v: Tensor


class Cache(NamedTuple):
    """Keys and values of the last k - 1 frames, `(B, k - 1, N, H, P)`, oldest first; age `(B,)`: how many of them are
    valid."""

    k: Tensor
    v: Tensor
    age: Tensor


def attend(
    clean: Heads, first: Tensor, cache: Cache, query: Heads | None = None, block: int = 16
) -> tuple[Tensor, Tensor | None]:
    """Attention over a clip: y `(B, T, N, H, P)` and, with a query stream, its y.

    Args:
        clean, query: see the module's text. first: `(B, T)` bool, frames that begin an episode.
        cache: what came before frame 0. block: query frames per rectangle.
    """
    frames = clean.q.shape[1]
    reach = cache.k.shape[1]
    block = min(block, frames)
    pad = -frames % block
    keys, values = torch.cat([cache.k, clean.k], 1), torch.cat([cache.v, clean.v], 1)
    segment = key_segments(first, cache.age, reach)
    if pad:
        keys, values = (F.pad(v, (0, 0) * 3 + (0, pad)) for v in (keys, values))
        segment = F.pad(segment, (0, pad), value=-1)
    keys, values = (_windows(v, block, reach) for v in (keys, values))  # (B * blocks, block + reach, N, H, P)
    to = _windows(segment[:, reach:], block, 0)
    since = _windows(segment, block, reach)
    where = torch.arange(block + reach, device=first.device)
    distance = where[reach:, None] - where  # (block, block + reach)
    local = (distance >= 0) & (distance <= reach)
    mask = local & (to[:, :, None] == since[:, None, :])
    mask = mask | ((distance == 0) & (to[:, :, None] < 0))  # padded frames see themselves: no row without a key

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, k_where: Tensor) -> Tensor:
        if pad:
            q = F.pad(q, (0, 0) * 3 + (0, pad))
        q = _windows(q, block, 0)
        y = _sdpa(rotate(q, where[reach:]), rotate(k, k_where), v, mask)
        return y.reshape(-1, frames + pad, *y.shape[2:])[:, :frames]

    y = run(clean.q, keys, values, mask, where)
    if query is None:
        return y, None
    own_k, own_v = query.k, query.v
    if pad:
        own_k, own_v = (F.pad(v, (0, 0) * 3 + (0, pad)) for v in (own_k, own_v))
    keys, values = torch.cat([keys, _windows(own_k, block, 0)], 1), torch.cat([values, _windows(own_v, block, 0)], 1)
    own = torch.eye(block, dtype=torch.bool, device=mask.device).expand(len(mask), -1, -1)
    query_y = run(query.q, keys, values, torch.cat([mask & (distance > 0), own], 2), torch.cat([where, where[reach:]]))
    return y, query_y


def attend_step(heads: Heads, cache: Cache) -> Tensor:
    """One frame (T = 1) against the cache and itself: y `(B, 1, N, H, P)`."""
    reach = cache.k.shape[1]
    where = torch.arange(reach + 1, device=heads.q.device)
    valid = where >= reach - cache.age[:, None]  # the frame itself always is
    k, v = torch.cat([cache.k, heads.k], 1), torch.cat([cache.v, heads.v], 1)
    return _sdpa(rotate(heads.q, where[reach:]), rotate(k, where), v, valid[:, None])


def push(cache: Cache, k: Tensor, v: Tensor) -> Cache:
    """The cache after one more frame, k and v `(B, 1, N, H, P)`."""
    reach = cache.k.shape[1]
    k, v = torch.cat([cache.k, k], 1)[:, 1:], torch.cat([cache.v, v], 1)[:, 1:]
    return Cache(k, v, (cache.age + 1).clamp(max=reach))


def cache_at(clean: Heads, first: Tensor, cache: Cache, at: Tensor) -> Cache:
    """Caches after the frames `at` `(B, M)` of a clip: k, v `(B, M, k - 1, N, H, P)`, age `(B, M)`."""
    reach = cache.k.shape[1]
    rows = torch.arange(len(at), device=at.device)[:, None, None]
    index = at[..., None] + 1 + torch.arange(reach, device=at.device)
    k, v = torch.cat([cache.k, clean.k], 1)[rows, index], torch.cat([cache.v, clean.v], 1)[rows, index]
    segment = key_segments(first, cache.age, reach)
    now = segment[:, reach:].gather(1, at)
    return Cache(k, v, (segment[rows, index] == now[..., None]).sum(-1))


def attend_reference(clean: Heads, first: Tensor, cache: Cache, query: Heads | None = None) -> Tensor:
    """The slow truth: one query frame after another, a masked softmax over every key of the clip. y of `query`, or of
    `clean`."""
    reach = cache.k.shape[1]
    keys, values = torch.cat([cache.k, clean.k], 1), torch.cat([cache.v, clean.v], 1)
    segment = key_segments(first, cache.age, reach)
    outputs = []
    for t in range(clean.q.shape[1]):
        now = t + reach
        stream = clean if query is None else query
        where = torch.arange(now + 1, device=first.device)
        k, v = (
            torch.cat([keys[:, :now], stream.k[:, t : t + 1]], 1),
            torch.cat([values[:, :now], stream.v[:, t : t + 1]], 1),
        )
        seen = (segment[:, : now + 1] == segment[:, now : now + 1]) & (where >= now - reach)
        q, k = rotate(stream.q[:, t : t + 1], where[now:]), rotate(k, where)
        score = torch.einsum("bqnhp,bkmhp->bhnkm", q, k) / q.shape[-1] ** 0.5
        score = score.masked_fill(~seen[:, None, None, :, None], -torch.inf).flatten(-2).softmax(-1)
        outputs.append(torch.einsum("bhnk,bkhp->bnhp", score, v.flatten(1, 2)))
    return torch.stack(outputs, 1)


def key_segments(first: Tensor, age: Tensor, reach: int) -> Tensor:
    """`(B, reach + T)`: the episode (counted from the clip's start) that each cached and each new frame is of; -1 if
    not valid."""
    cached = torch.arange(reach, device=first.device) >= reach - age[:, None]
    return torch.cat([cached.long() - 1, first.long().cumsum(1)], 1)


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary phases for x `(B, T, N, H, P)` at frame positions `(T,)`; periods from 2 pi to 2 pi * 1000 frames."""
    half = x.shape[-1] // 2
    rate = 1000.0 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (position[:, None] * rate)[:, None, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]], -1)


def _windows(v: Tensor, block: int, reach: int) -> Tensor:
    """`(B, reach + T, ...)` to `(B * T / block, reach + block, ...)`: each block with the `reach` frames before it."""
    v = v.unfold(1, block + reach, block)  # (B, blocks, ..., block + reach)
    return v.movedim(-1, 2).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q `(B, Tq, N, H, P)`, k, v `(B, Tk, N, H, P)`, mask `(B, Tq, Tk)` over frames: y `(B, Tq, N, H, P)`."""
    tokens = q.shape[2]
    if tokens > 1:
        mask = mask.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    kind = v.dtype
    if v.is_cuda and kind == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        kind = torch.bfloat16  # in float32 this was a fifth of the time of training M on an H200
    fold = [t.flatten(1, 2).transpose(1, 2).to(kind) for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*fold, attn_mask=mask[:, None])
    return y.transpose(1, 2).unflatten(1, (-1, tokens)).to(v.dtype)
