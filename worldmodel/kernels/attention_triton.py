"""Attention over frames on CUDA as Triton kernels, with a backward pass of their own: the same sums as `attend`.

A program handles some query tokens of one head and loops over the tokens within their reach; inside that range, keys
are masked by frame and by episode (`_sees`). Forward it computes an online softmax (FlashAttention; Dao et al. 2022,
arXiv 2205.14135) and keeps the logarithm of its denominator. Backward, `_queries_kernel` loops from queries over keys,
and `_keys_kernel` from keys over the queries that saw them. Every gradient is a sum in a fixed order: the same inputs
give the same bits.

FlexAttention masks blocks of 128 tokens. With 16 tokens per frame and a window of 10 frames, most of such a block is
masked; these kernels use smaller tiles.
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
"""Which keys a query sees. ALL: those of its window and chunk. PAST: of these, the clean frames before its chunk. OWN:
its own chunk."""
MAX_HEAD = 128
"""Largest supported number of channels per head."""
SETTINGS = {"ROWS": 32, "COLUMNS": 32, "num_stages": 2}
"""Query and key tokens per tile, and compiler options: of some thirty settings, the fastest or nearly so for each of
the three kernels on an H100 (with one warp per 64 channels). Larger tiles extend past the ends of a window."""


def fit(v: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels support heads like v, computed in that dtype."""
    return on_tensor_cores(v) and v.shape[-1] <= MAX_HEAD and dtype in DTYPES


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor, Tensor] | None,
    segment: Tensor,
    reach: int,
    chunk_frames: int = 1,
) -> Tensor:
    """Attention over a clip; differentiable in q, k, v and own.

    Args:
        q: `(B, T, N, H, P)`, rotated. k, v: `(B, held + T, N, H, P)`, of the cache and the clean frames, k rotated.
        own: keys and values `(B, T, N, H, P)` of the query stream, if q is the query stream's.
        segment: `(B, held + T)`, each frame's episode (`key_segments`).
        reach, chunk_frames: k - c and c of attention.py.

    Returns:
        y, like q.
    """
    own_k, own_v = own or (None, None)
    return _attend(q, k, v, own_k, own_v, segment, reach, chunk_frames)[0]


@triton.jit
def _sees(begin, frame, reach, CHUNK_FRAMES: tl.constexpr, PART: tl.constexpr):
    """Whether queries of chunks that begin at frames `begin` see keys of `frame`; cached frames are negative."""
    begins = begin
    ends = begin + CHUNK_FRAMES
    if PART != OWN:
        begins = begin - reach
    if PART == PAST:
        ends = begin
    return (frame >= begins) & (frame < ends)


@triton.jit
def _reached(first, last, frames, held, reach, CHUNK_FRAMES: tl.constexpr, PART: tl.constexpr):
    """The range of frames whose keys the queries of frames `first` to `last` see."""
    begin = first // CHUNK_FRAMES * CHUNK_FRAMES
    end = last // CHUNK_FRAMES * CHUNK_FRAMES
    if PART != PAST:
        end = tl.minimum(end + CHUNK_FRAMES, frames)
    if PART != OWN:
        begin = tl.maximum(begin - reach, -held)
    return begin, end


@triton.jit
def _seen_by(first, last, frames, reach, CHUNK_FRAMES: tl.constexpr, PART: tl.constexpr):
    """The range of frames whose queries see the keys of frames `first` to `last`, which may be cached ones."""
    begin = tl.maximum(first, 0) // CHUNK_FRAMES * CHUNK_FRAMES
    if PART == PAST:
        begin = tl.where(first < 0, 0, begin + CHUNK_FRAMES)
    if PART == OWN:
        end = last // CHUNK_FRAMES * CHUNK_FRAMES + CHUNK_FRAMES
    else:
        end = (tl.maximum(last + reach, -CHUNK_FRAMES) + CHUNK_FRAMES) // CHUNK_FRAMES * CHUNK_FRAMES
    return begin, tl.minimum(end, frames)


@triton.jit
def _scores(
    queries, begin, q_segment, k, segment, start, end, held, frames, tokens, heads, h, row, reach, scale,
    P: tl.constexpr, HEAD: tl.constexpr, CHUNK_FRAMES: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a part's keys, tokens `start` to `end` at most: their offset, the keys, the queries' scores
    `(ROWS, COLUMNS)`, and which of the scores count."""
    p = tl.arange(0, HEAD)
    j = tl.arange(0, COLUMNS)
    before = 0 if PART == OWN else held  # frames that precede the clip's in k and v
    token = start + j
    # cached frames are negative, and division rounds towards zero
    frame = (token + held * tokens) // tokens - held
    k_segment = tl.load(segment + row * (held + frames) + held + frame, mask=token < end, other=-2)
    at = (((row * (before + frames) + before) * tokens + start) * heads + h) * P
    keys = load(k + at, j, p, heads * P, end - start, P)
    score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    seen = _sees(begin[:, None], frame[None, :], reach, CHUNK_FRAMES, PART) & (q_segment[:, None] == k_segment[None, :])
    return at, keys, score, seen


@triton.jit
def _attend_part(
    queries, running_max, total, out, begin, q_segment, k, v, segment, first, last, held, frames, tokens, heads, h, row,
    reach, scale, P: tl.constexpr, HEAD: tl.constexpr, CHUNK_FRAMES: tl.constexpr, PART: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Continue an online softmax over a part's keys that queries of frames `first` to `last` see."""
    p = tl.arange(0, HEAD)
    j = tl.arange(0, COLUMNS)
    begin_frame, end_frame = _reached(first, last, frames, held, reach, CHUNK_FRAMES, PART)
    for start in range(begin_frame * tokens, end_frame * tokens, COLUMNS):
        at, _, score, seen = _scores(
            queries, begin, q_segment, k, segment, start, end_frame * tokens, held, frames, tokens, heads, h, row,
            reach, scale, P, HEAD, CHUNK_FRAMES, PART, COLUMNS, PRECISION,
        )  # fmt: skip
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(running_max, tl.max(score, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(score - shift[:, None])
        left = tl.exp2(running_max - shift)
        values = load(v + at, j, p, heads * P, end_frame * tokens - start, P)
        out = out * left[:, None] + tl.dot(weight.to(values.dtype), values, input_precision=PRECISION)
        total = total * left + tl.sum(weight, 1)
        running_max = new
    return running_max, total, out


@triton.jit
def _forward_kernel(
    q, k, v, own_k, own_v, segment, y, sums, blocks, frames, held, tokens, heads, reach, scale, P: tl.constexpr,
    HEAD: tl.constexpr, CHUNK_FRAMES: tl.constexpr, HAS_OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y of some queries of a head, and the base-2 logarithm of the softmax denominators."""
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    i = tl.arange(0, ROWS)
    p = tl.arange(0, HEAD)
    token = block * ROWS + i
    length = frames * tokens
    frame = token // tokens
    begin = frame // CHUNK_FRAMES * CHUNK_FRAMES
    q_segment = tl.load(segment + row * (held + frames) + held + frame, mask=token < length, other=-3)
    at = ((row * length + block * ROWS) * heads + h) * P
    queries = load(q + at, i, p, heads * P, length - block * ROWS, P)
    first = block * ROWS // tokens
    last = tl.minimum(block * ROWS + ROWS - 1, length - 1) // tokens
    running_max = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, HEAD), tl.float32)
    running_max, total, out = _attend_part(
        queries, running_max, total, out, begin, q_segment, k, v, segment, first, last, held, frames, tokens, heads, h,
        row, reach, scale, P, HEAD, CHUNK_FRAMES, PAST if HAS_OWN else ALL, COLUMNS, PRECISION,
    )  # fmt: skip
    if HAS_OWN:
        running_max, total, out = _attend_part(
            queries, running_max, total, out, begin, q_segment, own_k, own_v, segment, first, last, held, frames,
            tokens, heads, h, row, reach, scale, P, HEAD, CHUNK_FRAMES, OWN, COLUMNS, PRECISION,
        )  # fmt: skip
    store(y + at, i, p, heads * P, length - block * ROWS, P, out / total[:, None])
    tl.store(sums + (row * heads + h) * length + token, running_max + tl.log2(total), mask=token < length)


@triton.jit
def _part_gradient(
    queries, d_out, gradient, sums, delta, begin, q_segment, k, v, segment, first, last, held, frames, tokens, heads, h,
    row, reach, scale, P: tl.constexpr, HEAD: tl.constexpr, CHUNK_FRAMES: tl.constexpr, PART: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a part's contribution to the gradient of queries."""
    p = tl.arange(0, HEAD)
    j = tl.arange(0, COLUMNS)
    begin_frame, end_frame = _reached(first, last, frames, held, reach, CHUNK_FRAMES, PART)
    for start in range(begin_frame * tokens, end_frame * tokens, COLUMNS):
        at, keys, score, seen = _scores(
            queries, begin, q_segment, k, segment, start, end_frame * tokens, held, frames, tokens, heads, h, row,
            reach, scale, P, HEAD, CHUNK_FRAMES, PART, COLUMNS, PRECISION,
        )  # fmt: skip
        values = load(v + at, j, p, heads * P, end_frame * tokens - start, P)
        weight = tl.where(seen, tl.exp2(score - sums[:, None]), 0.0)
        d_weight = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
        d_score = weight * (d_weight - delta[:, None])
        gradient += tl.dot(d_score.to(keys.dtype), keys, input_precision=PRECISION)
    return gradient


@triton.jit
def _queries_kernel(
    q, k, v, own_k, own_v, segment, y, sums, dy, dq, deltas, blocks, frames, held, tokens, heads, reach, scale, root,
    P: tl.constexpr, HEAD: tl.constexpr, CHUNK_FRAMES: tl.constexpr, HAS_OWN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of some queries of a head, and `y . dy` of each, which the keys' gradients need as well."""
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    i = tl.arange(0, ROWS)
    p = tl.arange(0, HEAD)
    token = block * ROWS + i
    length = frames * tokens
    frame = token // tokens
    begin = frame // CHUNK_FRAMES * CHUNK_FRAMES
    q_segment = tl.load(segment + row * (held + frames) + held + frame, mask=token < length, other=-3)
    left = length - block * ROWS
    at = ((row * length + block * ROWS) * heads + h) * P
    queries = load(q + at, i, p, heads * P, left, P)
    d_out = load(dy + at, i, p, heads * P, left, P)
    out = load(y + at, i, p, heads * P, left, P)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    row_at = (row * heads + h) * length + token
    tl.store(deltas + row_at, delta, mask=token < length)
    total = tl.load(sums + row_at, mask=token < length, other=0.0)
    first = block * ROWS // tokens
    last = tl.minimum(block * ROWS + ROWS - 1, length - 1) // tokens
    gradient = tl.zeros((ROWS, HEAD), tl.float32)
    gradient = _part_gradient(
        queries, d_out, gradient, total, delta, begin, q_segment, k, v, segment, first, last, held, frames, tokens,
        heads, h, row, reach, scale, P, HEAD, CHUNK_FRAMES, PAST if HAS_OWN else ALL, COLUMNS, PRECISION,
    )  # fmt: skip
    if HAS_OWN:
        gradient = _part_gradient(
            queries, d_out, gradient, total, delta, begin, q_segment, own_k, own_v, segment, first, last, held, frames,
            tokens, heads, h, row, reach, scale, P, HEAD, CHUNK_FRAMES, OWN, COLUMNS, PRECISION,
        )  # fmt: skip
    store(dq + at, i, p, heads * P, left, P, gradient * root)


@triton.jit
def _keys_kernel(
    q, k, v, segment, sums, dy, deltas, dk, dv, blocks, frames, held, tokens, heads, reach, scale, root,
    P: tl.constexpr, HEAD: tl.constexpr, CHUNK_FRAMES: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of some keys and values of a head, from the queries that saw them."""
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    p = tl.arange(0, HEAD)
    before = 0 if PART == OWN else held
    length = frames * tokens
    key_tokens = (before + frames) * tokens
    token = block * COLUMNS + j
    frame = token // tokens - before
    k_segment = tl.load(segment + row * (held + frames) + held + frame, mask=token < key_tokens, other=-2)
    left = key_tokens - block * COLUMNS
    at = ((row * key_tokens + block * COLUMNS) * heads + h) * P
    keys = load(k + at, j, p, heads * P, left, P)
    values = load(v + at, j, p, heads * P, left, P)
    d_keys = tl.zeros((COLUMNS, HEAD), tl.float32)
    d_values = tl.zeros((COLUMNS, HEAD), tl.float32)
    first = block * COLUMNS // tokens - before
    last = tl.minimum(block * COLUMNS + COLUMNS - 1, key_tokens - 1) // tokens - before
    begin_frame, end_frame = _seen_by(first, last, frames, reach, CHUNK_FRAMES, PART)
    for start in range(begin_frame * tokens, end_frame * tokens, ROWS):
        query_token = start + i
        valid = query_token < end_frame * tokens
        begin = query_token // tokens // CHUNK_FRAMES * CHUNK_FRAMES
        q_segment = tl.load(segment + row * (held + frames) + held + query_token // tokens, mask=valid, other=-3)
        row_at = (row * heads + h) * length + query_token
        total = tl.load(sums + row_at, mask=valid, other=0.0)
        delta = tl.load(deltas + row_at, mask=valid, other=0.0)
        query_at = ((row * length + start) * heads + h) * P
        queries = load(q + query_at, i, p, heads * P, end_frame * tokens - start, P)
        d_out = load(dy + query_at, i, p, heads * P, end_frame * tokens - start, P)
        score = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        seen = _sees(begin[None, :], frame[:, None], reach, CHUNK_FRAMES, PART) & (
            q_segment[None, :] == k_segment[:, None]
        )
        weight = tl.where(seen, tl.exp2(score - total[None, :]), 0.0)
        d_values += tl.dot(weight.to(d_out.dtype), d_out, input_precision=PRECISION)
        d_weight = tl.dot(values, tl.trans(d_out), input_precision=PRECISION)
        d_score = weight * (d_weight - delta[None, :])
        d_keys += tl.dot(d_score.to(queries.dtype), queries, input_precision=PRECISION)
    store(dk + at, j, p, heads * P, left, P, d_keys * root)
    store(dv + at, j, p, heads * P, left, P, d_values)


def _options(q: Tensor, chunk_frames: int) -> dict[str, object]:
    """Constants and compiler options of a kernel."""
    precise = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    head = padded(q.shape[-1])
    sizes = {"P": q.shape[-1], "HEAD": head, "CHUNK_FRAMES": chunk_frames, "num_warps": max(1, head // 64)}
    return {**sizes, "PRECISION": "tf32x3" if precise else "tf32", **SETTINGS}


def _sizes(q: Tensor, k: Tensor, reach: int) -> tuple[int, int, int, int, int, float]:
    """Frames, cached frames, tokens, heads, reach, and the scale of the scores, for a softmax to base 2."""
    _, frames, tokens, heads, head = q.shape
    return frames, k.shape[1] - frames, tokens, heads, reach, head**-0.5 * math.log2(math.e)


def _own_or_placeholders(
    own_k: Tensor | None, own_v: Tensor | None, k: Tensor, v: Tensor
) -> tuple[bool, Tensor, Tensor]:
    """Whether there are the query stream's own keys and values, and these, or placeholders."""
    if own_k is None or own_v is None:
        return False, k, v
    return True, own_k.contiguous(), own_v.contiguous()


@torch.library.custom_op("longdream::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    segment: Tensor,
    reach: int,
    chunk_frames: int,
) -> tuple[Tensor, Tensor]:
    q, k, v = (t.contiguous() for t in (q, k, v))
    has_own, own_k, own_v = _own_or_placeholders(own_k, own_v, k, v)
    y, sums = _attend_shapes(q, k, v, own_k, own_v, segment, reach, chunk_frames)
    rows, frames, tokens, heads, _ = q.shape
    blocks = triton.cdiv(frames * tokens, SETTINGS["ROWS"])
    with torch.cuda.device_of(q), without_wgmma():
        _forward_kernel[(blocks * rows * heads,)](
            q, k, v, own_k, own_v, segment.contiguous(), y, sums, blocks, *_sizes(q, k, reach), HAS_OWN=has_own,
            **_options(q, chunk_frames),
        )  # fmt: skip
    return y, sums


@_attend.register_fake
def _attend_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    segment: Tensor,
    reach: int,
    chunk_frames: int,
) -> tuple[Tensor, Tensor]:
    """Empty outputs."""
    rows, frames, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(rows, heads, frames * tokens, dtype=torch.float32)


@torch.library.custom_op("longdream::attend_backward", mutates_args=())
def _attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, segment: Tensor, y: Tensor,
    sums: Tensor, reach: int, chunk_frames: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, q, k, v, segment = (t.contiguous() for t in (dy, q, k, v, segment))
    has_own, own_k, own_v = _own_or_placeholders(own_k, own_v, k, v)
    rows, frames, tokens, heads, head = q.shape
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    d_own_k, d_own_v = (t.new_empty(t.shape if has_own else 0) for t in (own_k, own_v))
    deltas = torch.empty_like(sums)
    numbers = (*_sizes(q, k, reach), head**-0.5)
    with torch.cuda.device_of(q), without_wgmma():
        blocks = triton.cdiv(frames * tokens, SETTINGS["ROWS"])
        _queries_kernel[(blocks * rows * heads,)](
            q, k, v, own_k, own_v, segment, y, sums, dy, dq, deltas, blocks, *numbers, HAS_OWN=has_own,
            **_options(q, chunk_frames),
        )  # fmt: skip
        parts = [(PAST, k, v, dk, dv), (OWN, own_k, own_v, d_own_k, d_own_v)] if has_own else [(ALL, k, v, dk, dv)]
        for part, keys, values, d_keys, d_values in parts:
            blocks = triton.cdiv(keys.shape[1] * tokens, SETTINGS["COLUMNS"])
            _keys_kernel[(blocks * rows * heads,)](
                q, keys, values, segment, sums, dy, deltas, d_keys, d_values, blocks, *numbers, PART=part.value,
                **_options(q, chunk_frames),
            )  # fmt: skip
    return dq, dk, dv, d_own_k, d_own_v


@_attend_backward.register_fake
def _(dy, q, k, v, own_k, own_v, segment, y, sums, reach, chunk_frames):
    own = (q.new_empty(0 if t is None else t.shape) for t in (own_k, own_v))
    return (*(t.new_empty(t.shape) for t in (q, k, v)), *own)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.reach, ctx.chunk_frames = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    q, k, v, own_k, own_v, segment, y, sums = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    dy = dy.to(q.dtype).contiguous()  # here the compiler can fuse the copy with what comes before
    grads = _attend_backward(dy, q, k, v, own_k, own_v, segment, y, sums, ctx.reach, ctx.chunk_frames)
    d_own = grads[3:] if own_k is not None else (None, None)
    return *grads[:3], *d_own, None, None, None


_attend.register_autograd(_gradients, setup_context=_save)
