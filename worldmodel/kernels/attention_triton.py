"""Attention over frames on CUDA, compiled by Triton, with a backward pass of its own: the same sums as `attend`.

A program has some tokens of one head and goes through the tokens that they can reach, and no others; what lies nearer
in it is masked by frame and by episode (`_sees`). Forward it is a softmax on the way (Dao et al. 2022, arXiv
2205.14135), of which the logarithm of the sum is kept. Backward, `_queries_kernel` goes from queries to keys as before,
and `_keys_kernel` from keys to the queries that they were seen by, so that every gradient is a sum in a fixed order:
the same inputs give the same bits.

Against FlexAttention, whose mask is known by blocks of 128 tokens: at frames of 16 tokens and a window of 10 these are
mostly empty.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longdream.worldmodel.kernels.common import DTYPES, load, on_tensor_cores, padded, store, without_wgmma

ALL, PAST, OWN = (tl.constexpr(part) for part in range(3))
"""Which keys a query sees: those of its window and chunk; of them, the clean frames before its chunk; its own chunk."""
MOST = 128
"""Channels of a head, at most."""
SETTINGS = {"ROWS": 32, "COLUMNS": 32, "num_stages": 2}
"""Tokens of a program's tiles, queries and keys, and how the kernels are compiled: of some thirty settings, on an H100,
the fastest or near it for each of the three (with a warp for 64 channels); larger tiles reach past a window's ends."""


def fit(v: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels are for heads like v, computed in that type."""
    return on_tensor_cores(v) and v.shape[-1] <= MOST and dtype in DTYPES


def attention(
    q: Tensor, k: Tensor, v: Tensor, own: tuple[Tensor, Tensor] | None, segment: Tensor, reach: int, chunk: int = 1
) -> Tensor:
    """Attention over a clip, with gradients for q, k, v and own.

    Args:
        q: `(B, T, N, H, P)`, turned by its phases. k, v: `(B, held + T, N, H, P)`, of the cache and the clean frames.
        own: keys and values `(B, T, N, H, P)` of a query stream, of which q then are too.
        segment: `(B, held + T)`, the episode that each frame is of (`key_segments`).
        reach, chunk: k - c and c of the module `attention`.

    Returns:
        y like q.
    """
    own_k, own_v = own or (None, None)
    return _attend(q, k, v, own_k, own_v, segment, reach, chunk)[0]


@triton.jit
def _sees(begin, frame, reach, CHUNK: tl.constexpr, PART: tl.constexpr):
    """Whether queries of chunks that begin at frames `begin` see keys of `frame`; frames of the cache are negative."""
    begins, ends = begin, begin + CHUNK
    if PART != OWN:
        begins = begin - reach
    if PART == PAST:
        ends = begin
    return (frame >= begins) & (frame < ends)


@triton.jit
def _reached(first, last, frames, held, reach, CHUNK: tl.constexpr, PART: tl.constexpr):
    """From and up to which frame keys are seen by queries of the frames `first` to `last`."""
    begin, end = first // CHUNK * CHUNK, last // CHUNK * CHUNK
    if PART != PAST:
        end = tl.minimum(end + CHUNK, frames)
    if PART != OWN:
        begin = tl.maximum(begin - reach, -held)
    return begin, end


@triton.jit
def _seen_by(first, last, frames, reach, CHUNK: tl.constexpr, PART: tl.constexpr):
    """From and up to which frame queries see keys of the frames `first` to `last`, which may be of the cache."""
    begin = tl.maximum(first, 0) // CHUNK * CHUNK
    if PART == PAST:
        begin = tl.where(first < 0, 0, begin + CHUNK)
    if PART == OWN:
        end = last // CHUNK * CHUNK + CHUNK
    else:
        end = (tl.maximum(last + reach, -CHUNK) + CHUNK) // CHUNK * CHUNK
    return begin, tl.minimum(end, frames)


@triton.jit
def _look(
    queries, begin, to, k, segment, start, end, held, frames, tokens, heads, h, row, reach, scale, P: tl.constexpr,
    HEAD: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys of a part from token `start` on, up to `end`: where they lie, they themselves, the queries' scores of
    them `(ROWS, COLUMNS)`, and which of these are of keys that are seen."""
    p, j = tl.arange(0, HEAD), tl.arange(0, COLUMNS)
    before = 0 if PART == OWN else held  # frames that stand before the clip's in k and v
    token = start + j
    # frames of the cache are negative, and division rounds towards zero
    frame = (token + held * tokens) // tokens - held
    since = tl.load(segment + row * (held + frames) + held + frame, mask=token < end, other=-2)
    at = (((row * (before + frames) + before) * tokens + start) * heads + h) * P
    keys = load(k + at, j, p, heads * P, end - start, P)
    score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    seen = _sees(begin[:, None], frame[None, :], reach, CHUNK, PART) & (to[:, None] == since[None, :])
    return at, keys, score, seen


@triton.jit
def _part(
    queries, best, total, out, begin, to, k, v, segment, first, last, held, frames, tokens, heads, h, row, reach, scale,
    P: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax so far, gone on with over the keys that queries of the frames `first` to `last` see of a part."""
    p, j = tl.arange(0, HEAD), tl.arange(0, COLUMNS)
    least, most = _reached(first, last, frames, held, reach, CHUNK, PART)
    for start in range(least * tokens, most * tokens, COLUMNS):
        at, _, score, seen = _look(
            queries, begin, to, k, segment, start, most * tokens, held, frames, tokens, heads, h, row, reach, scale, P,
            HEAD, CHUNK, PART, COLUMNS, PRECISION,
        )  # fmt: skip
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        against = tl.where(new == float("-inf"), 0.0, new)
        weight, left = tl.exp2(score - against[:, None]), tl.exp2(best - against)
        values = load(v + at, j, p, heads * P, most * tokens - start, P)
        out = out * left[:, None] + tl.dot(weight.to(values.dtype), values, input_precision=PRECISION)
        total = total * left + tl.sum(weight, 1)
        best = new
    return best, total, out


@triton.jit
def _forward_kernel(
    q, k, v, own_k, own_v, segment, y, sums, blocks, frames, held, tokens, heads, reach, scale, P: tl.constexpr,
    HEAD: tl.constexpr, CHUNK: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y of some queries of a head, and the logarithm of what their weights were divided by, to base 2."""
    block, h = tl.program_id(0) % blocks, tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    i, p = tl.arange(0, ROWS), tl.arange(0, HEAD)
    token = block * ROWS + i
    length, frame = frames * tokens, token // tokens
    begin = frame // CHUNK * CHUNK
    to = tl.load(segment + row * (held + frames) + held + frame, mask=token < length, other=-3)
    at = ((row * length + block * ROWS) * heads + h) * P
    queries = load(q + at, i, p, heads * P, length - block * ROWS, P)
    first, last = block * ROWS // tokens, tl.minimum(block * ROWS + ROWS - 1, length - 1) // tokens
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total, out = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, HEAD), tl.float32)
    best, total, out = _part(
        queries, best, total, out, begin, to, k, v, segment, first, last, held, frames, tokens, heads, h, row, reach,
        scale, P, HEAD, CHUNK, PAST if BESIDE else ALL, COLUMNS, PRECISION,
    )  # fmt: skip
    if BESIDE:
        best, total, out = _part(
            queries, best, total, out, begin, to, own_k, own_v, segment, first, last, held, frames, tokens, heads, h,
            row, reach, scale, P, HEAD, CHUNK, OWN, COLUMNS, PRECISION,
        )  # fmt: skip
    store(y + at, i, p, heads * P, length - block * ROWS, P, out / total[:, None])
    tl.store(sums + (row * heads + h) * length + token, best + tl.log2(total), mask=token < length)


@triton.jit
def _gradient_of_part(
    queries, d_out, gradient, sums, delta, begin, to, k, v, segment, first, last, held, frames, tokens, heads, h, row,
    reach, scale, P: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, and what keys of a part add to it."""
    p, j = tl.arange(0, HEAD), tl.arange(0, COLUMNS)
    least, most = _reached(first, last, frames, held, reach, CHUNK, PART)
    for start in range(least * tokens, most * tokens, COLUMNS):
        at, keys, score, seen = _look(
            queries, begin, to, k, segment, start, most * tokens, held, frames, tokens, heads, h, row, reach, scale, P,
            HEAD, CHUNK, PART, COLUMNS, PRECISION,
        )  # fmt: skip
        values = load(v + at, j, p, heads * P, most * tokens - start, P)
        weight = tl.where(seen, tl.exp2(score - sums[:, None]), 0.0)
        d_weight = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
        d_score = weight * (d_weight - delta[:, None])
        gradient += tl.dot(d_score.to(keys.dtype), keys, input_precision=PRECISION)
    return gradient


@triton.jit
def _queries_kernel(
    q, k, v, own_k, own_v, segment, y, sums, dy, dq, deltas, blocks, frames, held, tokens, heads, reach, scale, root,
    P: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of some queries of a head; and of each `y . dy`, which the keys' gradients need too."""
    block, h = tl.program_id(0) % blocks, tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    i, p = tl.arange(0, ROWS), tl.arange(0, HEAD)
    token = block * ROWS + i
    length, frame = frames * tokens, token // tokens
    begin = frame // CHUNK * CHUNK
    to = tl.load(segment + row * (held + frames) + held + frame, mask=token < length, other=-3)
    left, at = length - block * ROWS, ((row * length + block * ROWS) * heads + h) * P
    queries, d_out = load(q + at, i, p, heads * P, left, P), load(dy + at, i, p, heads * P, left, P)
    out = load(y + at, i, p, heads * P, left, P)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    of_head = (row * heads + h) * length + token
    tl.store(deltas + of_head, delta, mask=token < length)
    total = tl.load(sums + of_head, mask=token < length, other=0.0)
    first, last = block * ROWS // tokens, tl.minimum(block * ROWS + ROWS - 1, length - 1) // tokens
    gradient = tl.zeros((ROWS, HEAD), tl.float32)
    gradient = _gradient_of_part(
        queries, d_out, gradient, total, delta, begin, to, k, v, segment, first, last, held, frames, tokens, heads, h,
        row, reach, scale, P, HEAD, CHUNK, PAST if BESIDE else ALL, COLUMNS, PRECISION,
    )  # fmt: skip
    if BESIDE:
        gradient = _gradient_of_part(
            queries, d_out, gradient, total, delta, begin, to, own_k, own_v, segment, first, last, held, frames, tokens,
            heads, h, row, reach, scale, P, HEAD, CHUNK, OWN, COLUMNS, PRECISION,
        )  # fmt: skip
    store(dq + at, i, p, heads * P, left, P, gradient * root)


@triton.jit
def _keys_kernel(
    q, k, v, segment, sums, dy, deltas, dk, dv, blocks, frames, held, tokens, heads, reach, scale, root,
    P: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of some keys and values of a head: what they were to the queries that saw them."""
    block, h = tl.program_id(0) % blocks, tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    i, j, p = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, HEAD)
    before = 0 if PART == OWN else held
    length, keyed = frames * tokens, (before + frames) * tokens
    token = block * COLUMNS + j
    frame = token // tokens - before
    since = tl.load(segment + row * (held + frames) + held + frame, mask=token < keyed, other=-2)
    left, at = keyed - block * COLUMNS, ((row * keyed + block * COLUMNS) * heads + h) * P
    keys, values = load(k + at, j, p, heads * P, left, P), load(v + at, j, p, heads * P, left, P)
    d_keys, d_values = tl.zeros((COLUMNS, HEAD), tl.float32), tl.zeros((COLUMNS, HEAD), tl.float32)
    first = block * COLUMNS // tokens - before
    last = tl.minimum(block * COLUMNS + COLUMNS - 1, keyed - 1) // tokens - before
    least, most = _seen_by(first, last, frames, reach, CHUNK, PART)
    for start in range(least * tokens, most * tokens, ROWS):
        asked = start + i
        there = asked < most * tokens
        begin = asked // tokens // CHUNK * CHUNK
        to = tl.load(segment + row * (held + frames) + held + asked // tokens, mask=there, other=-3)
        of_head = (row * heads + h) * length + asked
        total, delta = tl.load(sums + of_head, mask=there, other=0.0), tl.load(deltas + of_head, mask=there, other=0.0)
        there_at = ((row * length + start) * heads + h) * P
        queries = load(q + there_at, i, p, heads * P, most * tokens - start, P)
        d_out = load(dy + there_at, i, p, heads * P, most * tokens - start, P)
        score = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        seen = _sees(begin[None, :], frame[:, None], reach, CHUNK, PART) & (to[None, :] == since[:, None])
        weight = tl.where(seen, tl.exp2(score - total[None, :]), 0.0)
        d_values += tl.dot(weight.to(d_out.dtype), d_out, input_precision=PRECISION)
        d_weight = tl.dot(values, tl.trans(d_out), input_precision=PRECISION)
        d_score = weight * (d_weight - delta[None, :])
        d_keys += tl.dot(d_score.to(queries.dtype), queries, input_precision=PRECISION)
    store(dk + at, j, p, heads * P, left, P, d_keys * root)
    store(dv + at, j, p, heads * P, left, P, d_values)


def _options(q: Tensor, chunk: int) -> dict[str, object]:
    """Sizes and settings that a kernel is compiled for."""
    precise = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    head = padded(q.shape[-1])
    sizes = {"P": q.shape[-1], "HEAD": head, "CHUNK": chunk, "num_warps": max(1, head // 64)}
    return {**sizes, "PRECISION": "tf32x3" if precise else "tf32", **SETTINGS}


def _numbers(q: Tensor, k: Tensor, reach: int) -> tuple[int, int, int, int, int, float]:
    """Frames, cached frames, tokens, heads, reach; and by what scores are multiplied, for powers of 2."""
    _, frames, tokens, heads, head = q.shape
    return frames, k.shape[1] - frames, tokens, heads, reach, head**-0.5 * math.log2(math.e)


def _beside(own_k: Tensor | None, own_v: Tensor | None, k: Tensor, v: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Whether a query stream has keys of its own, and these, or any in their place."""
    if own_k is None or own_v is None:
        return False, k, v
    return True, own_k.contiguous(), own_v.contiguous()


@torch.library.custom_op("longdream::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, segment: Tensor, reach: int, chunk: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (t.contiguous() for t in (q, k, v))
    beside, own_k, own_v = _beside(own_k, own_v, k, v)
    y, sums = _attend_shapes(q, k, v, own_k, own_v, segment, reach, chunk)
    rows, frames, tokens, heads, _ = q.shape
    blocks = triton.cdiv(frames * tokens, SETTINGS["ROWS"])
    with torch.cuda.device_of(q), without_wgmma():
        _forward_kernel[(blocks * rows * heads,)](
            q, k, v, own_k, own_v, segment.contiguous(), y, sums, blocks, *_numbers(q, k, reach), BESIDE=beside,
            **_options(q, chunk),
        )  # fmt: skip
    return y, sums


@_attend.register_fake
def _attend_shapes(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, segment: Tensor, reach: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Empty tensors of what comes out."""
    rows, frames, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(rows, heads, frames * tokens, dtype=torch.float32)


@torch.library.custom_op("longdream::attend_backward", mutates_args=())
def _attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, segment: Tensor, y: Tensor,
    sums: Tensor, reach: int, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, q, k, v, segment = (t.contiguous() for t in (dy, q, k, v, segment))
    beside, own_k, own_v = _beside(own_k, own_v, k, v)
    rows, frames, tokens, heads, head = q.shape
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    d_own_k, d_own_v = (t.new_empty(t.shape if beside else 0) for t in (own_k, own_v))
    deltas, numbers = torch.empty_like(sums), (*_numbers(q, k, reach), head**-0.5)
    with torch.cuda.device_of(q), without_wgmma():
        blocks = triton.cdiv(frames * tokens, SETTINGS["ROWS"])
        _queries_kernel[(blocks * rows * heads,)](
            q, k, v, own_k, own_v, segment, y, sums, dy, dq, deltas, blocks, *numbers, BESIDE=beside,
            **_options(q, chunk),
        )  # fmt: skip
        parts = [(PAST, k, v, dk, dv), (OWN, own_k, own_v, d_own_k, d_own_v)] if beside else [(ALL, k, v, dk, dv)]
        for part, keys, values, d_keys, d_values in parts:
            blocks = triton.cdiv(keys.shape[1] * tokens, SETTINGS["COLUMNS"])
            _keys_kernel[(blocks * rows * heads,)](
                q, keys, values, segment, sums, dy, deltas, d_keys, d_values, blocks, *numbers, PART=part.value,
                **_options(q, chunk),
            )  # fmt: skip
    return dq, dk, dv, d_own_k, d_own_v


@_attend_backward.register_fake
def _(dy, q, k, v, own_k, own_v, segment, y, sums, reach, chunk):
    own = (q.new_empty(0 if t is None else t.shape) for t in (own_k, own_v))
    return (*(t.new_empty(t.shape) for t in (q, k, v)), *own)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.reach, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    q, k, v, own_k, own_v, segment, y, sums = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    dy = dy.to(q.dtype).contiguous()  # here the compiler can make it so for nothing
    found = _attend_backward(dy, q, k, v, own_k, own_v, segment, y, sums, ctx.reach, ctx.chunk)
    d_own = found[3:] if own_k is not None else (None, None)
    return *found[:3], *d_own, None, None, None


_attend.register_autograd(_gradients, setup_context=_keep)
