"""Between an attention layer's projection and its attention on CUDA, compiled by Triton: queries, keys and values out
of what was projected, queries and keys normed, behind those of a cache, turned by their phases; one pass forward and
one backward, each number read once and written once.

A row is a head of a token; a program has some of queries, keys or values alone, so that few registers hold many rows
on their way. Channel i turns with channel i + P // 2: a row is two tiles beside each other, in the same threads, and a
last channel of odd P, turned by nothing, is the second one's. Backward, the norm's mean and factor are computed again;
what the weights' gradients are sums of is added up by each program over all its rows, and then over programs, in a
fixed order.
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
MOST = 128
"""Channels of a head, at most."""
FORWARD = {"NUMBERS": 4096, "num_warps": 4}
BACKWARD = {"NUMBERS": 2048, "num_warps": 4, "maxnreg": 96}
"""Channels of a program's tile, over all its rows, and how the kernels are compiled: a thread takes in 16 bytes at a
time, and as few registers as it can do with, since loads are waited for by having other warps at work."""
PROGRAMS = 2048
"""Of each part in the backward pass, over all batch rows, if there are as many tiles; each goes from tile to tile."""


def fit(qkv: Tensor) -> bool:
    """Whether the kernels are for heads like those of qkv `(B, T, N, 3, H, P)`."""
    return on_tensor_cores(qkv) and qkv.shape[-1] <= MOST and qkv.dtype in DTYPES


def turned(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    phases: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention takes in, computed in float32, with gradients for all but the phases.

    Args:
        qkv: `(B, T, N, 3, H, P)`, projected queries, keys and values.
        q_weight, k_weight: `(P,)` float32, of the LayerNorms of queries and of keys, which have no bias.
        cache_k, cache_v: `(B, held, N, H, P)`, normed keys and values of the frames before, none or more.
        phases: `(held + T, 2, P // 2)` float32, `phases_of` these frames and the clip's.
        dtype: of what comes out.

    Returns:
        q `(B, T, N, H, P)`; k, v `(B, held + T, N, H, P)`; q and k normed and turned (`rotate`).
    """
    return _turned(qkv, q_weight, k_weight, cache_k, cache_v, phases, dtype)


@triton.jit
def _here(blocks):
    """What a program is for: queries (0), keys (1) or values (2); which of so many blocks of a batch row; that row."""
    of_part = tl.program_id(0) // 3
    return tl.program_id(0) % 3, of_part % blocks, (of_part // blocks).to(tl.int64)


@triton.jit
def _projected(row, start, length, heads, P: tl.constexpr, ROWS: tl.constexpr):
    """Where in qkv the rows from `start` on lie, of `length` in a batch row: their first token; each row, in heads from
    there; and where the last token ends."""
    token = start // heads
    i = start - token * heads + tl.arange(0, ROWS)
    at = (row * (length // heads) + token) * 3 * heads * P
    return at, i // heads * 3 * heads + i % heads, (length // heads - token) * 3 * heads


@triton.jit
def _halves(array, i, rows, P: tl.constexpr, HALF: tl.constexpr):
    """Rows i of `(rows, P)`: the first half of their channels and the others, each `(ROWS, HALF)`."""
    j = tl.arange(0, HALF)
    return load(array, i, j, P, rows, P // 2), load(array + P // 2, i, j, P, rows, P - P // 2)


@triton.jit
def _store_halves(array, i, rows, a, b, P: tl.constexpr, HALF: tl.constexpr):
    """a and b to where `_halves` would read."""
    j = tl.arange(0, HALF)
    store(array, i, j, P, rows, P // 2, a)
    store(array + P // 2, i, j, P, rows, P - P // 2, b)


@triton.jit
def _copy(source, i, source_rows, target, k, target_rows, P: tl.constexpr, HALF: tl.constexpr):
    """Rows i of one array to rows k of another."""
    j = tl.arange(0, 2 * HALF)
    store(target, k, j, P, target_rows, P, load(source, i, j, P, source_rows, P))


@triton.jit
def _phases(phases, frame, frames, P: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines of each row's frame, `(ROWS, HALF)`; of an odd P's last channel, 1 and 0."""
    j = tl.arange(0, HALF)
    at = phases + frame[:, None] * (P // 2 * 2) + j[None, :]
    there = (frame < frames)[:, None] & (j < P // 2)[None, :]
    return tl.load(at, mask=there, other=1.0), tl.load(at + P // 2, mask=there, other=0.0)


@triton.jit
def _turn(a, b, cos, sin):
    """Halves of rows, turned; back again with -sin."""
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _weights(weight, P: tl.constexpr, HALF: tl.constexpr):
    """Both halves of a norm's weights, `(1, HALF)`, zero where there is none."""
    j = tl.arange(0, HALF)
    a = tl.load(weight + j, mask=j < P // 2, other=0.0)
    return a[None, :], tl.load(weight + P // 2 + j, mask=j < P - P // 2, other=0.0)[None, :]


@triton.jit
def _normed(a, b, P: tl.constexpr, HALF: tl.constexpr):
    """Halves of rows less the mean of both and times a factor, zero where there is none, in float32; and the factor."""
    j = tl.arange(0, HALF)[None, :]
    a, b = a.to(tl.float32), b.to(tl.float32)
    mean = tl.sum(a + b, 1)[:, None] * (1 / P)
    a, b = tl.where(j < P // 2, a - mean, 0.0), tl.where(j < P - P // 2, b - mean, 0.0)
    factor = tl.rsqrt(tl.sum(a * a + b * b, 1) * (1 / P) + EPS)[:, None]
    return a * factor, b * factor, factor


@triton.jit
def _norm_and_turn(
    x, i, x_rows, weight, phases, frame, frames, out, rows, P: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """Rows i of x, projected queries or keys, normed and turned, to the first ROWS rows of `out`."""
    a, b = _halves(x, i, x_rows, P, HALF)
    cos, sin = _phases(phases, frame, frames, P, HALF)
    of_a, of_b = _weights(weight, P, HALF)
    a, b, _ = _normed(a, b, P, HALF)
    a, b = _turn(a * of_a, b * of_b, cos, sin)
    _store_halves(out, tl.arange(0, ROWS), rows, a, b, P, HALF)


@triton.jit
def _forward_kernel(
    qkv, q_weight, k_weight, cache_k, cache_v, phases, q, k, v, blocks, cached, frames, held, tokens, heads,
    P: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows of q, k or v: in the first `blocks` of a batch row of the clip, in the others of the cache."""
    part, block, row = _here(blocks + cached)
    i, length, before = tl.arange(0, ROWS), frames * tokens * heads, held * tokens * heads
    if block < blocks:
        start = block * ROWS
        frame = held + (start + i) // (tokens * heads)
        at, x_i, x_rows = _projected(row, start, length, heads, P, ROWS)
        kept = (row * (before + length) + before + start) * P
        if part == 0:
            _norm_and_turn(
                qkv + at, x_i, x_rows, q_weight, phases, frame, held + frames, q + (row * length + start) * P,
                length - start, P, HALF, ROWS,
            )  # fmt: skip
        elif part == 1:
            _norm_and_turn(
                qkv + at + heads * P, x_i, x_rows, k_weight, phases, frame, held + frames, k + kept, length - start,
                P, HALF, ROWS,
            )  # fmt: skip
        else:
            _copy(qkv + at + 2 * heads * P, x_i, x_rows, v + kept, i, length - start, P, HALF)
    else:
        start = (block - blocks) * ROWS
        at, kept = (row * before + start) * P, (row * (before + length) + start) * P
        if part == 1:
            a, b = _halves(cache_k + at, i, before - start, P, HALF)
            cos, sin = _phases(phases, (start + i) // (tokens * heads), held, P, HALF)
            a, b = _turn(a.to(tl.float32), b.to(tl.float32), cos, sin)
            _store_halves(k + kept, i, before - start, a, b, P, HALF)
        elif part == 2:
            _copy(cache_v + at, i, before - start, v + kept, i, before - start, P, HALF)


@triton.jit
def _gradients_of_part(
    x, weight, phases, dy, dx, sums, row, block, blocks, length, before, heads, held, of_frame, P: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of queries or keys as projected, of every so many-th block of a batch row; what they add to that of
    the norm's weights goes to `sums`. dy: of what comes out, behind `before` rows of a cache."""
    i, j = tl.arange(0, ROWS), tl.arange(0, HALF)
    of_a, of_b = _weights(weight, P, HALF)
    sum_a, sum_b = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    for start in range(block * ROWS, length, blocks * ROWS):
        at, x_i, x_rows = _projected(row, start, length, heads, P, ROWS)
        a, b = _halves(x + at, x_i, x_rows, P, HALF)
        da, db = _halves(dy + (row * (before + length) + before + start) * P, i, length - start, P, HALF)
        cos, sin = _phases(phases, held + (start + i) // of_frame, held + length // of_frame, P, HALF)
        a, b, factor = _normed(a, b, P, HALF)
        da, db = _turn(da.to(tl.float32), db.to(tl.float32), cos, -sin)
        sum_a, sum_b = sum_a + da * a, sum_b + db * b
        da, db = da * of_a, db * of_b
        mean, along = tl.sum(da + db, 1)[:, None] * (1 / P), tl.sum(da * a + db * b, 1)[:, None] * (1 / P)
        da, db = (da - mean - a * along) * factor, (db - mean - b * along) * factor
        _store_halves(dx + at, x_i, x_rows, da, db, P, HALF)
    tl.store(sums + j, tl.sum(sum_a, 0), mask=j < P // 2)
    tl.store(sums + P // 2 + j, tl.sum(sum_b, 0), mask=j < P - P // 2)


@triton.jit
def _backward_kernel(
    qkv, q_weight, k_weight, phases, dq, dk, dv, dqkv, d_cache_k, d_cache_v, sums, blocks, cached, frames, held, tokens,
    heads, P: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of some rows of q, k or v as projected or, behind the first `blocks` of a batch row, of the cache;
    sums: `(B * blocks, 2, P)`, of what the weights' gradients are, those of this program's rows."""
    part, block, row = _here(blocks + cached)
    i, length, before = tl.arange(0, ROWS), frames * tokens * heads, held * tokens * heads
    if block < blocks:
        of_program = sums + (row * blocks + block) * 2 * P
        if part == 0:
            _gradients_of_part(
                qkv, q_weight, phases, dq, dqkv, of_program, row, block, blocks, length, 0, heads, held, tokens * heads,
                P, HALF, ROWS,
            )  # fmt: skip
        elif part == 1:
            _gradients_of_part(
                qkv + heads * P, k_weight, phases, dk, dqkv + heads * P, of_program + P, row, block, blocks, length,
                before, heads, held, tokens * heads, P, HALF, ROWS,
            )  # fmt: skip
        else:
            for start in range(block * ROWS, length, blocks * ROWS):
                at, x_i, x_rows = _projected(row, start, length, heads, P, ROWS)
                kept = (row * (before + length) + before + start) * P
                _copy(dv + kept, i, length - start, dqkv + at + 2 * heads * P, x_i, x_rows, P, HALF)
    else:
        start = (block - blocks) * ROWS
        at, kept = (row * before + start) * P, (row * (before + length) + start) * P
        if part == 1:
            a, b = _halves(dk + kept, i, before - start, P, HALF)
            cos, sin = _phases(phases, (start + i) // (tokens * heads), held, P, HALF)
            a, b = _turn(a.to(tl.float32), b.to(tl.float32), cos, -sin)
            _store_halves(d_cache_k + at, i, before - start, a, b, P, HALF)
        elif part == 2:
            _copy(dv + kept, i, before - start, d_cache_v + at, i, before - start, P, HALF)


def _options(head: int, settings: dict[str, int]) -> dict[str, int]:
    """Sizes and settings that a kernel is compiled for."""
    half = triton.next_power_of_2(head - head // 2)
    sizes = {"P": head, "HALF": half, "ROWS": settings["NUMBERS"] // (2 * half)}
    return {**sizes, **{name: value for name, value in settings.items() if name != "NUMBERS"}}


@torch.library.custom_op("longdream::turned", mutates_args=())
def _turned(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache_k: Tensor, cache_v: Tensor, phases: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [t.contiguous() for t in (qkv, q_weight, k_weight, cache_k, cache_v, phases)]
    q, k, v = _shapes(*inputs, dtype)
    rows, frames, tokens, _, heads, head = qkv.shape
    held, options = cache_k.shape[1], _options(head, FORWARD)
    blocks, cached = (triton.cdiv(n * tokens * heads, options["ROWS"]) for n in (frames, held))
    with torch.cuda.device_of(qkv):
        _forward_kernel[(3 * (blocks + cached) * rows,)](
            *inputs, q, k, v, blocks, cached, frames, held, tokens, heads, **options
        )
    return q, k, v


@_turned.register_fake
def _shapes(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache_k: Tensor, cache_v: Tensor, phases: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Empty tensors of what comes out."""
    rows, frames, tokens, _, heads, head = qkv.shape
    k, v = (qkv.new_empty(rows, cache_k.shape[1] + frames, tokens, heads, head, dtype=dtype) for _ in range(2))
    return qkv.new_empty(rows, frames, tokens, heads, head, dtype=dtype), k, v


@torch.library.custom_op("longdream::turned_backward", mutates_args=())
def _turned_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache_k: Tensor,
    cache_v: Tensor, phases: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, of both weights `(2, P)`, and of the cache."""
    dq, dk, dv, qkv, q_weight, k_weight, phases = (
        t.contiguous() for t in (dq, dk, dv, qkv, q_weight, k_weight, phases)
    )
    dqkv, d_cache_k, d_cache_v = (t.new_empty(t.shape) for t in (qkv, cache_k, cache_v))
    rows, frames, tokens, _, heads, head = qkv.shape
    held, options = cache_k.shape[1], _options(head, BACKWARD)
    blocks, cached = (triton.cdiv(n * tokens * heads, options["ROWS"]) for n in (frames, held))
    blocks = min(blocks, triton.cdiv(PROGRAMS, rows))
    sums = qkv.new_empty(rows * blocks, 2, head, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _backward_kernel[(3 * (blocks + cached) * rows,)](
            qkv, q_weight, k_weight, phases, dq, dk, dv, dqkv, d_cache_k, d_cache_v, sums, blocks, cached, frames, held,
            tokens, heads, **options,
        )  # fmt: skip
    return dqkv, sums.sum(0), d_cache_k, d_cache_v


@_turned_backward.register_fake
def _(dq, dk, dv, qkv, q_weight, k_weight, cache_k, cache_v, phases):
    dqkv, d_cache_k, d_cache_v = (t.new_empty(t.shape) for t in (qkv, cache_k, cache_v))
    return dqkv, q_weight.new_empty(2, *q_weight.shape), d_cache_k, d_cache_v


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _gradients(ctx, dq, dk, dv):
    dq, dk, dv = (t.contiguous() for t in (dq, dk, dv))  # here the compiler can make them so for nothing
    dqkv, d_weights, d_cache_k, d_cache_v = _turned_backward(dq, dk, dv, *ctx.saved_tensors)
    return dqkv, *d_weights.unbind(), d_cache_k, d_cache_v, None, None


_turned.register_autograd(_gradients, setup_context=_keep)
