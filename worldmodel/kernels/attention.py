"""Attention over frames: every token of frame t attends to all tokens of frames [t - k + 1, t] of its own episode.

In chunks of c frames (Po et al. 2025, arXiv 2505.20171: c = 5, k = 10) every frame of a chunk attends to the whole
chunk and to the k - c frames before it. c = 1 is the line above. Chunks are counted from the start of a clip, and a
cache ends where a chunk does. `reach` below is k - c, what a chunk sees of its past.

Parallel over a clip it is computed as dense rectangles, blocks of query frames against the frames they can reach,
through `scaled_dot_product_attention`: all of one size where the reach is a window (`attend`), growing with the past
where it is all that was seen (`attend_far`). Streamed, it is one query frame against a cache. Time enters as rotary
phases (Su et al. 2021, arXiv 2104.09864) of the distance between frames, so that the cache holds keys without any
position and nothing grows with the age of an episode.

A *query* stream may run beside the clean one: a query chunk attends to the clean frames before it and to itself.
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

try:
    from longdream.worldmodel.kernels import attention_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None


class Heads(NamedTuple):
    """Queries, keys and values, each `(B, T, N, H, P)`."""

    q: Tensor
    k: Tensor
    v: Tensor


class Turned(NamedTuple):
    """What attention computes with: queries `(B, T, N, H, P)`, keys and values `(B, held + T, N, H, P)` behind those of
    a cache; queries and keys turned by the phases of their frames."""

    q: Tensor
    k: Tensor
    v: Tensor


class Cache(NamedTuple):
    """Keys and values of the last frames, `(B, reach, N, H, P)` or fewer where it grows, oldest first; age `(B,)`: how
    many of them are valid."""

    k: Tensor
    v: Tensor
    age: Tensor


BLOCK = 16
"""Query frames per rectangle of local attention."""


def attend(
    clean: Heads,
    first: Tensor,
    cache: Cache,
    query: Heads | None = None,
    block: int = BLOCK,
    chunk: int = 1,
    phases: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a clip: y `(B, T, N, H, P)` and, with a query stream, its y.

    Args:
        clean, query: see the module's text. first: `(B, T)` bool, frames that begin an episode.
        cache: what came before frame 0, of as many frames as are reached. block: query frames per rectangle.
        chunk: c. phases: `phases_of` the positions from 0 to block + reach at least, if they are at hand.
    """
    frames = clean.q.shape[1]
    reach = cache.k.shape[1]
    block = _whole(min(block, frames), chunk)
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
    turn = phases_of(where, clean.q.shape[-1]) if phases is None else phases[: block + reach]
    begin = (reach + torch.arange(block, device=first.device) // chunk * chunk)[:, None]  # of each frame's chunk
    local = (where >= begin - reach) & (where < begin + chunk)  # (block, block + reach)
    mask = local & (to[:, :, None] == since[:, None, :])  # padded frames, -1 all of them, see each other

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, k_turn: Tensor) -> Tensor:
        if pad:
            q = F.pad(q, (0, 0) * 3 + (0, pad))
        q = _windows(q, block, 0)
        y = _sdpa(rotate(q, turn[reach:]), rotate(k, k_turn), v, mask)
        return y.reshape(-1, frames + pad, *y.shape[2:])[:, :frames]

    y = run(clean.q, keys, values, mask, turn)
    if query is None:
        return y, None
    own_k, own_v = query.k, query.v
    if pad:
        own_k, own_v = (F.pad(v, (0, 0) * 3 + (0, pad)) for v in (own_k, own_v))
    keys, values = torch.cat([keys, _windows(own_k, block, 0)], 1), torch.cat([values, _windows(own_v, block, 0)], 1)
    own = (begin == begin.T) & (to[:, :, None] == to[:, None, :])
    query_y = run(query.q, keys, values, torch.cat([mask & (where < begin), own], 2), torch.cat([turn, turn[reach:]]))
    return y, query_y


def attend_far(
    clean: Heads,
    first: Tensor,
    cache: Cache,
    reach: int,
    query: Heads | None = None,
    block: int = 32,
    chunk: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """`attend` where the reach is far and the cache holds what there was so far, at most `reach` frames of it.

    One rectangle after another. What is kept for the backward pass grows with the clip and with the square of its
    frames, not of its tokens: a mask over tokens is made again when it is needed.
    """
    held, frames = cache.k.shape[1], clean.q.shape[1]
    block = _whole(min(block, frames), chunk)
    segment = key_segments(first, cache.age, held)
    where = torch.arange(held + frames, device=first.device)
    begin = (held + torch.arange(frames, device=first.device) // chunk * chunk)[:, None]
    turn = phases_of(where, clean.q.shape[-1])
    keys, values = rotate(torch.cat([cache.k, clean.k], 1), turn), torch.cat([cache.v, clean.v], 1)
    q, ys, query_ys = rotate(clean.q, turn[held:]), [], []
    if query is not None:
        query = Heads(rotate(query.q, turn[held:]), rotate(query.k, turn[held:]), query.v)
    for start in range(0, frames, block):
        now = slice(start, min(start + block, frames))
        past = slice(max(0, held + start - reach), held + now.stop)
        to, since = segment[:, held:][:, now, None], segment[:, None, past]
        mask = (where[past] >= begin[now] - reach) & (where[past] < begin[now] + chunk) & (to == since)
        ys.append(_forgetful(q[:, now], keys[:, past], values[:, past], mask))
        if query is not None:
            own = (begin[now] == begin[now].T) & (to == to.transpose(1, 2))
            k, v = torch.cat([keys[:, past], query.k[:, now]], 1), torch.cat([values[:, past], query.v[:, now]], 1)
            mask = torch.cat([mask & (where[past] < begin[now]), own], 2)
            query_ys.append(_forgetful(query.q[:, now], k, v, mask))
    return torch.cat(ys, 1), torch.cat(query_ys, 1) if query is not None else None


class Sight(NamedTuple):
    """What a clip's attention needs beside the heads, alike for all layers of a pass: the episode that each cached and
    new frame is of `(B, held + T)` int32 and its phases `(held + T, 2, P // 2)`; and for FlexAttention, which tokens of
    the clean stream see which, and of the query stream if there is one."""

    segment: Tensor
    phases: Tensor
    clean: BlockMask | None = None
    query: BlockMask | None = None


def sight_of(first: Tensor, cache: Cache) -> Sight:
    """What `attend_kernels` needs beside the heads; first `(B, T)` bool and the cache as for `attend`."""
    held = cache.k.shape[1]
    segment = key_segments(first, cache.age, held)
    where = torch.arange(segment.shape[1], device=first.device)
    return Sight(segment.int(), phases_of(where, cache.k.shape[-1]))


def turned(heads: Heads, cache: Cache | None, phases: Tensor) -> Turned:
    """Heads behind a cache, if there is one; phases `(held + T, 2, P // 2)` of all these frames."""
    q, k, v = heads
    if cache is not None:
        k, v = torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1)
    return Turned(rotate(q, phases[len(phases) - q.shape[1] :]), rotate(k, phases), v)


def attend_kernels(
    clean: Turned, segment: Tensor, reach: int, query: Turned | None = None, chunk: int = 1
) -> tuple[Tensor, Tensor | None]:
    """`attend` and `attend_far` by kernels for CUDA (attention_triton.py), where `kernels.fit`.

    Args:
        clean: of a clip and what came before it; heads may be of any size up to `kernels.MOST` channels. query: of a
            query stream alone. segment: the frames' episodes (`Sight`).
        reach: frames before its chunk that a query sees, at least those held. chunk: c.

    Returns:
        y `(B, T, N, H, P)`, like clean.q, and, with a query stream, its y.
    """
    assert kernels is not None
    y = kernels.attention(*clean, None, segment, reach, chunk)
    if query is None:
        return y, None
    return y, kernels.attention(query.q, clean.k, clean.v, (query.k, query.v), segment, reach, chunk)


def flex_sight_of(first: Tensor, cache: Cache, reach: int, query: bool, chunk: int = 1) -> Sight:
    """The sight of `attend_flex`; arguments as there and for `attend`. It looks at every pair of tokens once, to find
    blocks that nothing sees; compiled on CUDA."""
    held, tokens = cache.k.shape[1:3]
    segment, phases = sight_of(first, cache)[:2]
    clean_keys = segment.shape[1]

    def begin(frame: Tensor) -> Tensor:
        return held + (frame - held) // chunk * chunk

    def sees(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        to, since = q // tokens + held, k // tokens
        near = (since >= begin(to) - reach) & (since < begin(to) + chunk)
        return near & (segment[b, to] == segment[b, since])

    def sees_past_and_itself(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        to, key = q // tokens + held, k // tokens
        own = key >= clean_keys
        since = torch.where(own, key - clean_keys + held, key)
        near = torch.where(own, begin(since) == begin(to), (since >= begin(to) - reach) & (since < begin(to)))
        return near & (segment[b, to] == segment[b, since])

    def mask(sees: Callable[..., Tensor], keys: int) -> BlockMask:
        make = _compiled()[1] if first.is_cuda else create_block_mask
        return make(sees, len(first), None, first.shape[1] * tokens, keys * tokens, device=first.device)

    own = mask(sees_past_and_itself, clean_keys + first.shape[1]) if query else None
    return Sight(segment, phases, mask(sees, clean_keys), own)


def attend_flex(clean: Heads, cache: Cache, sight: Sight, query: Heads | None = None) -> tuple[Tensor, Tensor | None]:
    """`attend` and `attend_far` as one call of FlexAttention, which skips the blocks of tokens that nothing sees
    (Dong et al. 2024, arXiv 2412.05496); the cache as when `flex_sight_of` looked. Compiled, on CUDA, for heads of 16
    channels or more; elsewhere its slow form, without gradient."""
    assert sight.clean is not None
    q, k, v = turned(clean, cache, sight.phases)
    y = _flex(q, k, v, sight.clean)
    if query is None:
        return y, None
    assert sight.query is not None
    own = turned(query, None, sight.phases[cache.k.shape[1] :])
    return y, _flex(own.q, torch.cat([k, own.k], 1), torch.cat([v, own.v], 1), sight.query)


def attend_step(heads: Heads, cache: Cache, phases: Tensor | None = None) -> Tensor:
    """One frame (T = 1, c = 1) against the cache and itself: y `(B, 1, N, H, P)`. phases: see `attend`."""
    reach = cache.k.shape[1]
    where = torch.arange(reach + 1, device=heads.q.device)
    valid = where >= reach - cache.age[:, None]  # the frame itself always is
    k, v = torch.cat([cache.k, heads.k], 1), torch.cat([cache.v, heads.v], 1)
    turn = phases_of(where, k.shape[-1]) if phases is None else phases[: reach + 1]
    return _sdpa(rotate(heads.q, turn[reach:]), rotate(k, turn), v, valid[:, None])


def push(cache: Cache, k: Tensor, v: Tensor, reach: int) -> Cache:
    """The cache after one more frame, k and v `(B, 1, N, H, P)`; it holds at most `reach`."""
    over = max(0, cache.k.shape[1] + 1 - reach)
    k, v = torch.cat([cache.k, k], 1)[:, over:], torch.cat([cache.v, v], 1)[:, over:]
    return Cache(k, v, (cache.age + 1).clamp(max=reach))


def cache_at(clean: Heads, first: Tensor, cache: Cache, at: Tensor, reach: int) -> Cache:
    """Caches after the frames `at` `(B, M)` of a clip, of `reach` frames or as many as there were: k, v
    `(B, M, reach, N, H, P)`, age `(B, M)`."""
    held = cache.k.shape[1]
    reach = min(reach, held + first.shape[1])
    rows = torch.arange(len(at), device=at.device)[:, None, None]
    index = at[..., None] + (held - reach + 1) + torch.arange(reach, device=at.device)
    there, index = index >= 0, index.clamp(min=0)
    k, v = torch.cat([cache.k, clean.k], 1)[rows, index], torch.cat([cache.v, clean.v], 1)[rows, index]
    segment = key_segments(first, cache.age, held)
    now = segment[:, held:].gather(1, at)
    return Cache(k, v, (there & (segment[rows, index] == now[..., None])).sum(-1))


def cache_after(clean: Heads, first: Tensor, cache: Cache, reach: int) -> Cache:
    """The cache after the last frame of a clip; see `cache_at`. Of clean, the last `reach` frames will do."""
    held = cache.k.shape[1]
    reach = min(reach, held + first.shape[1])
    # a view would keep the whole clip in memory
    k, v = (torch.cat(pair, 1) for pair in ((cache.k, clean.k), (cache.v, clean.v)))
    k, v = (t[:, t.shape[1] - reach :].clone() for t in (k, v))
    segment = key_segments(first, cache.age, held)
    return Cache(k, v, (segment[:, segment.shape[1] - reach :] == segment[:, -1:]).sum(-1))


def attend_reference(
    clean: Heads, first: Tensor, cache: Cache, query: Heads | None = None, chunk: int = 1, reach: int | None = None
) -> Tensor:
    """The slow truth: one query frame after another, a masked softmax over every key of the clip. y of `query`, or of
    `clean`. reach: the cache's frames, if not told."""
    held, frames = cache.k.shape[1], clean.q.shape[1]
    reach = held if reach is None else reach
    keys, values = torch.cat([cache.k, clean.k], 1), torch.cat([cache.v, clean.v], 1)
    segment = key_segments(first, cache.age, held)
    stream = clean if query is None else query
    outputs = []
    for t in range(frames):
        begin = t // chunk * chunk
        end = min(begin + chunk, frames)
        where = torch.arange(held + end, device=first.device)
        k, v = (
            torch.cat([keys[:, : held + begin], stream.k[:, begin:end]], 1),
            torch.cat([values[:, : held + begin], stream.v[:, begin:end]], 1),
        )
        now = segment[:, held + t : held + t + 1]
        seen = (segment[:, : held + end] == now) & (where >= held + begin - reach)
        turn = phases_of(where, k.shape[-1])
        q, k = rotate(stream.q[:, t : t + 1], turn[held + t :][:1]), rotate(k, turn)
        score = torch.einsum("bqnhp,bkmhp->bhnkm", q, k) / q.shape[-1] ** 0.5
        score = score.masked_fill(~seen[:, None, None, :, None], -torch.inf).flatten(-2).softmax(-1)
        outputs.append(torch.einsum("bhnk,bkhp->bnhp", score, v.flatten(1, 2)))
    return torch.stack(outputs, 1)


def key_segments(first: Tensor, age: Tensor, reach: int) -> Tensor:
    """`(B, reach + T)`: the episode (counted from the clip's start) that each cached and each new frame is of; -1 if
    not valid."""
    cached = torch.arange(reach, device=first.device) >= reach - age[:, None]
    return torch.cat([cached.long() - 1, first.long().cumsum(1)], 1)


def phases_of(position: Tensor, channels: int) -> Tensor:
    """Rotary phases of frame positions `(T,)`, cosines and sines `(T, 2, channels // 2)`; periods from 2 pi to 2 pi *
    1000 frames."""
    half = channels // 2
    rate = 1000.0 ** -(torch.arange(half, device=position.device, dtype=torch.float32) / half)
    angle = position[:, None] * rate
    return torch.stack([angle.cos(), angle.sin()], 1)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """x `(B, T, N, H, P)` turned by the phases `(T, 2, P // 2)` of its frames."""
    half = phases.shape[-1]
    cos, sin = phases.to(x.dtype)[:, :, None, None].unbind(1)
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    return torch.cat([*turned, x[..., 2 * half :]], -1)


def _whole(frames: int, chunk: int) -> int:
    """That many frames, or a few more: whole chunks."""
    return -(-frames // chunk) * chunk


def _windows(v: Tensor, block: int, reach: int) -> Tensor:
    """`(B, reach + T, ...)` to `(B * T / block, reach + block, ...)`: each block with the `reach` frames before it."""
    v = v.unfold(1, block + reach, block)  # (B, blocks, ..., block + reach)
    return v.movedim(-1, 2).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q `(B, Tq, N, H, P)`, k, v `(B, Tk, N, H, P)`, mask `(B, Tq, Tk)` over frames: y `(B, Tq, N, H, P)`."""
    tokens = q.shape[2]
    if tokens > 1:
        mask = mask.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    fold = [t.flatten(1, 2).transpose(1, 2).to(precision(v)) for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*fold, attn_mask=mask[:, None])
    return y.transpose(1, 2).unflatten(1, (-1, tokens)).to(v.dtype)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """As `_sdpa`, with a mask over blocks of tokens."""
    fold = [t.flatten(1, 2).transpose(1, 2).to(precision(v)) for t in (q, k, v)]
    inside = torch.compiler.is_compiling() or not v.is_cuda  # compiled with what surrounds it
    run: Any = flex_attention if inside else _compiled()[0]
    y = run(*fold, block_mask=mask)
    return y.transpose(1, 2).unflatten(1, (-1, q.shape[2])).to(v.dtype)


@once
def _compiled() -> tuple[Any, Any]:
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _forgetful(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`_sdpa`, computed once more in the backward pass rather than kept for it."""
    if not torch.is_grad_enabled():
        return _sdpa(q, k, v, mask)
    return cast(Tensor, checkpoint(_sdpa, q, k, v, mask, use_reentrant=False, preserve_rng_state=False))


def precision(v: Tensor) -> torch.dtype:
    """The type that attention is computed in: on CUDA, bfloat16 in place of float32, unless that has to be exact."""
    if v.is_cuda and v.dtype == torch.float32 and not _exact():
        return torch.bfloat16  # in float32 this was a fifth of the time of training M on an H200
    return v.dtype


@torch.compiler.assume_constant_result  # asked within what is compiled, it would cut a layer's graph in pieces
def _exact() -> bool:
    return torch.get_float32_matmul_precision() == "highest"
