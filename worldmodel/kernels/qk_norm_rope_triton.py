"""`qk_norm_rope` on CUDA in one Triton kernel, with a backward pass of its own.

Between an attention layer's projection and its attention: queries, keys and values are split, queries and keys normed,
appended to a cache's and rotated (qk_norm_rope.py). One pass forward and one backward read and write every element
once.

A row is one head of one token. A program handles rows of queries, keys or values alone, so that many rows fit into few
registers. Channel i is rotated with channel i + P // 2: a row is held as two tiles, one for each half, in the same
threads. The last channel of an odd P belongs to the second half and is not rotated. The backward pass recomputes the
norm's mean and factor. Each program sums its part of the weights' gradients over all its rows; torch adds up the
programs in a fixed order.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longdream.worldmodel.kernels.common import DTYPES, load, on_tensor_cores, store

EPS = tl.constexpr(1e-5)
"""What LayerNorm adds to a variance."""
MAX_HEAD = 128
"""Largest supported number of channels per head."""
FORWARD = {"NUMBERS": 4096, "num_warps": 4}
BACKWARD = {"NUMBERS": 2048, "num_warps": 4, "maxnreg": 96}
"""Elements of a program's tile, and compiler options: a thread reads 16 bytes at a time and uses few registers, so that
enough other warps can run while loads are in flight."""
PROGRAMS = 2048
"""Programs for each of q, k and v in the backward pass, at most; each handles several tiles."""


def fit(qkv: Tensor) -> bool:
    """Whether the kernels support heads like those of qkv `(B, T, N, 3, H, P)`."""
    return on_tensor_cores(qkv) and qkv.shape[-1] <= MAX_HEAD and qkv.dtype in DTYPES


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rope: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of attention, computed in float32; differentiable in all tensors but rope.

    Args:
        qkv: `(B, T, N, 3, H, P)`, projected queries, keys and values.
        q_weight, k_weight: `(P,)` float32, of the LayerNorms of queries and of keys, which have no bias.
        cache_k, cache_v: `(B, held, N, H, P)`, normed keys and values of the frames before the clip, possibly none.
        rope: `(held + T, 2, P // 2)` float32, `rope_table` of these frames and the clip's.
        dtype: of the results.

    Returns:
        q `(B, T, N, H, P)`; k, v `(B, held + T, N, H, P)`; q and k are normed and rotated (`apply_rope`).
    """
    return _qk_norm_rope(qkv, q_weight, k_weight, cache_k, cache_v, rope, dtype)


@triton.jit
def _task(blocks):
    """A program's task: queries (0), keys (1) or values (2); which of the `blocks` of a batch row; which batch row."""
    index = tl.program_id(0) // 3
    return tl.program_id(0) % 3, index % blocks, (index // blocks).to(tl.int64)


@triton.jit
def _projected(row, start, length, heads, P: tl.constexpr, ROWS: tl.constexpr):
    """Where rows `start` and following, of `length` in a batch row, lie in qkv: the offset of their first token; each
    row's distance from it, in heads; and the distance at which the last token ends."""
    token = start // heads
    i = start - token * heads + tl.arange(0, ROWS)
    at = (row * (length // heads) + token) * 3 * heads * P
    return at, i // heads * 3 * heads + i % heads, (length // heads - token) * 3 * heads


@triton.jit
def _halves(array, i, rows, P: tl.constexpr, HALF: tl.constexpr):
    """Rows i of `(rows, P)`: the first and the second half of their channels, each `(ROWS, HALF)`."""
    j = tl.arange(0, HALF)
    return load(array, i, j, P, rows, P // 2), load(array + P // 2, i, j, P, rows, P - P // 2)


@triton.jit
def _store_halves(array, i, rows, a, b, P: tl.constexpr, HALF: tl.constexpr):
    """Store a and b where `_halves` reads."""
    j = tl.arange(0, HALF)
    store(array, i, j, P, rows, P // 2, a)
    store(array + P // 2, i, j, P, rows, P - P // 2, b)


@triton.jit
def _copy(source, i, source_rows, target, k, target_rows, P: tl.constexpr, HALF: tl.constexpr):
    """Copy rows i of one array to rows k of another."""
    j = tl.arange(0, 2 * HALF)
    store(target, k, j, P, target_rows, P, load(source, i, j, P, source_rows, P))


@triton.jit
def _rope(rope, frame, frames, P: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines of each row's frame, `(ROWS, HALF)`; 1 and 0 for the last channel of an odd P."""
    j = tl.arange(0, HALF)
    at = rope + frame[:, None] * (P // 2 * 2) + j[None, :]
    there = (frame < frames)[:, None] & (j < P // 2)[None, :]
    return tl.load(at, mask=there, other=1.0), tl.load(at + P // 2, mask=there, other=0.0)


@triton.jit
def _rotate(a, b, cos, sin):
    """Rotated halves of rows; -sin rotates back."""
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _weights(weight, P: tl.constexpr, HALF: tl.constexpr):
    """Both halves of a norm's weights, `(1, HALF)`, padded with zeros."""
    j = tl.arange(0, HALF)
    a = tl.load(weight + j, mask=j < P // 2, other=0.0)
    return a[None, :], tl.load(weight + P // 2 + j, mask=j < P - P // 2, other=0.0)[None, :]


@triton.jit
def _normed(a, b, P: tl.constexpr, HALF: tl.constexpr):
    """Halves of normed rows, padded with zeros, in float32; and the factor of each row."""
    j = tl.arange(0, HALF)[None, :]
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    mean = tl.sum(a + b, 1)[:, None] * (1 / P)
    a = tl.where(j < P // 2, a - mean, 0.0)
    b = tl.where(j < P - P // 2, b - mean, 0.0)
    factor = tl.rsqrt(tl.sum(a * a + b * b, 1) * (1 / P) + EPS)[:, None]
    return a * factor, b * factor, factor


@triton.jit
def _norm_and_rotate(
    x, i, x_rows, weight, rope, frame, frames, out, rows, P: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """Norm and rotate rows i of x, projected queries or keys, and store them as the first ROWS rows of `out`."""
    a, b = _halves(x, i, x_rows, P, HALF)
    cos, sin = _rope(rope, frame, frames, P, HALF)
    weight_a, weight_b = _weights(weight, P, HALF)
    a, b, _ = _normed(a, b, P, HALF)
    a, b = _rotate(a * weight_a, b * weight_b, cos, sin)
    _store_halves(out, tl.arange(0, ROWS), rows, a, b, P, HALF)


@triton.jit
def _forward_kernel(
    qkv, q_weight, k_weight, cache_k, cache_v, rope, q, k, v, blocks, cached, frames, held, tokens, heads,
    P: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows of q, k or v: the first `blocks` of a batch row are of the clip, the others of the cache."""
    part, block, row = _task(blocks + cached)
    i = tl.arange(0, ROWS)
    length = frames * tokens * heads
    before = held * tokens * heads
    if block < blocks:
        start = block * ROWS
        frame = held + (start + i) // (tokens * heads)
        at, x_i, x_rows = _projected(row, start, length, heads, P, ROWS)
        target_at = (row * (before + length) + before + start) * P
        if part == 0:
            _norm_and_rotate(
                qkv + at, x_i, x_rows, q_weight, rope, frame, held + frames, q + (row * length + start) * P,
                length - start, P, HALF, ROWS,
            )  # fmt: skip
        elif part == 1:
            _norm_and_rotate(
                qkv + at + heads * P, x_i, x_rows, k_weight, rope, frame, held + frames, k + target_at, length - start,
                P, HALF, ROWS,
            )  # fmt: skip
        else:
            _copy(qkv + at + 2 * heads * P, x_i, x_rows, v + target_at, i, length - start, P, HALF)
    else:
        start = (block - blocks) * ROWS
        at = (row * before + start) * P
        target_at = (row * (before + length) + start) * P
        if part == 1:
            a, b = _halves(cache_k + at, i, before - start, P, HALF)
            cos, sin = _rope(rope, (start + i) // (tokens * heads), held, P, HALF)
            a, b = _rotate(a.to(tl.float32), b.to(tl.float32), cos, sin)
            _store_halves(k + target_at, i, before - start, a, b, P, HALF)
        elif part == 2:
            _copy(cache_v + at, i, before - start, v + target_at, i, before - start, P, HALF)


@triton.jit
def _part_gradients(
    x, weight, rope, dy, dx, sums, row, block, blocks, length, before, heads, held, frame_rows, P: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of projected queries or keys, for every `blocks`-th block of a batch row; their part of the gradient
    of the norm's weights goes to `sums`. dy: the gradient of the result, which begins with `before` rows of a cache."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, HALF)
    weight_a, weight_b = _weights(weight, P, HALF)
    sum_a = tl.zeros((ROWS, HALF), tl.float32)
    sum_b = tl.zeros((ROWS, HALF), tl.float32)
    for start in range(block * ROWS, length, blocks * ROWS):
        at, x_i, x_rows = _projected(row, start, length, heads, P, ROWS)
        a, b = _halves(x + at, x_i, x_rows, P, HALF)
        da, db = _halves(dy + (row * (before + length) + before + start) * P, i, length - start, P, HALF)
        cos, sin = _rope(rope, held + (start + i) // frame_rows, held + length // frame_rows, P, HALF)
        a, b, factor = _normed(a, b, P, HALF)
        da, db = _rotate(da.to(tl.float32), db.to(tl.float32), cos, -sin)
        sum_a = sum_a + da * a
        sum_b = sum_b + db * b
        da = da * weight_a
        db = db * weight_b
        mean = tl.sum(da + db, 1)[:, None] * (1 / P)
        projected = tl.sum(da * a + db * b, 1)[:, None] * (1 / P)
        da = (da - mean - a * projected) * factor
        db = (db - mean - b * projected) * factor
        _store_halves(dx + at, x_i, x_rows, da, db, P, HALF)
    tl.store(sums + j, tl.sum(sum_a, 0), mask=j < P // 2)
    tl.store(sums + P // 2 + j, tl.sum(sum_b, 0), mask=j < P - P // 2)


@triton.jit
def _backward_kernel(
    qkv, q_weight, k_weight, rope, dq, dk, dv, dqkv, d_cache_k, d_cache_v, sums, blocks, cached, frames, held, tokens,
    heads, P: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of some rows of projected q, k or v or, after the first `blocks` of a batch row, of the cache.

    sums: `(B * blocks, 2, P)`, each program's part of the gradients of both norms' weights.
    """
    part, block, row = _task(blocks + cached)
    i = tl.arange(0, ROWS)
    length = frames * tokens * heads
    before = held * tokens * heads
    if block < blocks:
        program_sums = sums + (row * blocks + block) * 2 * P
        if part == 0:
            _part_gradients(
                qkv, q_weight, rope, dq, dqkv, program_sums, row, block, blocks, length, 0, heads, held, tokens * heads,
                P, HALF, ROWS,
            )  # fmt: skip
        elif part == 1:
            _part_gradients(
                qkv + heads * P, k_weight, rope, dk, dqkv + heads * P, program_sums + P, row, block, blocks, length,
                before, heads, held, tokens * heads, P, HALF, ROWS,
            )  # fmt: skip
        else:
            for start in range(block * ROWS, length, blocks * ROWS):
                at, x_i, x_rows = _projected(row, start, length, heads, P, ROWS)
                target_at = (row * (before + length) + before + start) * P
                _copy(dv + target_at, i, length - start, dqkv + at + 2 * heads * P, x_i, x_rows, P, HALF)
    else:
        start = (block - blocks) * ROWS
        at = (row * before + start) * P
        target_at = (row * (before + length) + start) * P
        if part == 1:
            a, b = _halves(dk + target_at, i, before - start, P, HALF)
            cos, sin = _rope(rope, (start + i) // (tokens * heads), held, P, HALF)
            a, b = _rotate(a.to(tl.float32), b.to(tl.float32), cos, -sin)
            _store_halves(d_cache_k + at, i, before - start, a, b, P, HALF)
        elif part == 2:
            _copy(dv + target_at, i, before - start, d_cache_v + at, i, before - start, P, HALF)


def _options(head: int, settings: dict[str, int]) -> dict[str, int]:
    """Constants and compiler options of a kernel."""
    half = triton.next_power_of_2(head - head // 2)
    sizes = {"P": head, "HALF": half, "ROWS": settings["NUMBERS"] // (2 * half)}
    return {**sizes, **{name: value for name, value in settings.items() if name != "NUMBERS"}}


@torch.library.custom_op("longdream::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache_k: Tensor, cache_v: Tensor, rope: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [t.contiguous() for t in (qkv, q_weight, k_weight, cache_k, cache_v, rope)]
    q, k, v = _shapes(*inputs, dtype)
    rows, frames, tokens, _, heads, head = qkv.shape
    held = cache_k.shape[1]
    options = _options(head, FORWARD)
    blocks, cached = (triton.cdiv(n * tokens * heads, options["ROWS"]) for n in (frames, held))
    with torch.cuda.device_of(qkv):
        _forward_kernel[(3 * (blocks + cached) * rows,)](
            *inputs, q, k, v, blocks, cached, frames, held, tokens, heads, **options
        )
    return q, k, v


@_qk_norm_rope.register_fake
def _shapes(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache_k: Tensor, cache_v: Tensor, rope: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Empty outputs."""
    rows, frames, tokens, _, heads, head = qkv.shape
    k, v = (qkv.new_empty(rows, cache_k.shape[1] + frames, tokens, heads, head, dtype=dtype) for _ in range(2))
    return qkv.new_empty(rows, frames, tokens, heads, head, dtype=dtype), k, v


@torch.library.custom_op("longdream::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache_k: Tensor,
    cache_v: Tensor, rope: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, of both weights `(2, P)`, and of the cache."""
    dq, dk, dv, qkv, q_weight, k_weight, rope = (t.contiguous() for t in (dq, dk, dv, qkv, q_weight, k_weight, rope))
    dqkv, d_cache_k, d_cache_v = (t.new_empty(t.shape) for t in (qkv, cache_k, cache_v))
    rows, frames, tokens, _, heads, head = qkv.shape
    held = cache_k.shape[1]
    options = _options(head, BACKWARD)
    blocks, cached = (triton.cdiv(n * tokens * heads, options["ROWS"]) for n in (frames, held))
    blocks = min(blocks, triton.cdiv(PROGRAMS, rows))
    sums = qkv.new_empty(rows * blocks, 2, head, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _backward_kernel[(3 * (blocks + cached) * rows,)](
            qkv, q_weight, k_weight, rope, dq, dk, dv, dqkv, d_cache_k, d_cache_v, sums, blocks, cached, frames, held,
            tokens, heads, **options,
        )  # fmt: skip
    return dqkv, sums.sum(0), d_cache_k, d_cache_v


@_qk_norm_rope_backward.register_fake
def _(dq, dk, dv, qkv, q_weight, k_weight, cache_k, cache_v, rope):
    dqkv, d_cache_k, d_cache_v = (t.new_empty(t.shape) for t in (qkv, cache_k, cache_v))
    return dqkv, q_weight.new_empty(2, *q_weight.shape), d_cache_k, d_cache_v


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _gradients(ctx, dq, dk, dv):
    dq, dk, dv = (t.contiguous() for t in (dq, dk, dv))  # here the compiler can fuse the copies with what comes before
    dqkv, d_weights, d_cache_k, d_cache_v = _qk_norm_rope_backward(dq, dk, dv, *ctx.saved_tensors)
    return dqkv, *d_weights.unbind(), d_cache_k, d_cache_v, None, None


_qk_norm_rope.register_autograd(_gradients, setup_context=_save)
