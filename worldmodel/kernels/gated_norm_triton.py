"""What follows the scan on CUDA, in one pass, compiled by Triton, with a backward pass of its own: its output goes back
from tubes to frames, is normed over the width, and gated.

This is bound by memory. A program has some tiles of tokens in the order of frames, finds where each token lies in its
tube, and reads and writes every number once; tiles are on their way while others are computed. Backward, the norm is
computed anew, and each program leaves a partial sum of the weight's gradient; torch adds these up, so that every sum
has a fixed order: the same inputs give the same bits.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longdream.worldmodel.kernels.common import DTYPES, load, on_tensor_cores, padded, store

EPS = tl.constexpr(1e-5)
MOST = 2048
"""Width of the stream, at most."""
SETTINGS = {
    "forward": {"TILE": 2048, "WARP": 512, "STAGES": 1, "PROGRAMS": 1 << 20},
    "backward": {"TILE": 2048, "WARP": 512, "STAGES": 3, "PROGRAMS": 1024},
}
"""Of each kernel: numbers of a program's tile, and those of them that a warp has, powers of two; tiles that are read or
computed at a time; and about how many programs there are at most. Without stages (1), the compiler puts off reading
the gate until the norm is there, whatever the order here."""


def fit(y: Tensor) -> bool:
    """Whether the kernels are for a scan's output like y `(B, T, n, H, P)`."""
    return on_tensor_cores(y) and y.shape[-2] * y.shape[-1] <= MOST and y.dtype in DTYPES


def gated(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    """`norm(y) * weight * silu(gate)` of a frame's tokens in raster order, with gradients for y, gate and weight.

    Args:
        y: `(B * side * side, T, n, H, P)`, of tubes of `block * block = n` tokens a frame, whose width is W = H * P.
        gate: `(B, T, N, W)` of N = side * side * n tokens a frame; a part of the columns of a wider tensor is read
            where it is.
        weight: `(W,)` float32, of the norm.
        side: tubes along an edge of the token grid.

    Returns:
        h like gate.
    """
    return _gated(y, gate, weight, side)


@triton.jit
def _in_tubes(token, frames, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Where tokens of a clip lie in its tubes; those behind the last are kept there."""
    frame, place = token // (SIDE * BLOCK * SIDE * BLOCK), token % (SIDE * BLOCK * SIDE * BLOCK)
    i, j = place // (SIDE * BLOCK), place % (SIDE * BLOCK)
    tube = i // BLOCK * SIDE + j // BLOCK
    found = (tube * frames + frame) * (BLOCK * BLOCK) + i % BLOCK * BLOCK + j % BLOCK
    return tl.where(frame < frames, found, token).to(tl.int64)


@triton.jit
def _normed(y, w, W: tl.constexpr):
    """The norm of rows of W numbers, and what they were multiplied by."""
    mean = tl.sum(y, 1) / W
    apart = tl.where((w < W)[None, :], y - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(apart * apart, 1) / W + EPS)[:, None]
    return apart * factor, factor


@triton.jit
def _forward_kernel(
    y, gate, weight, h, blocks, frames, each, W: tl.constexpr, ROW: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of `each` tiles of tokens; from a row of the gate to the next there are ROW numbers."""
    block, clip = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    i, w = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    length = frames * (SIDE * BLOCK * SIDE * BLOCK)
    by = tl.load(weight + w, mask=w < W, other=0.0)[None, :]
    for tile in tl.range(block * each, block * each + each, num_stages=STAGES):
        start = tile * ROWS
        at, left, in_tubes = clip * length + start, length - start, _in_tubes(start + i, frames, SIDE, BLOCK)
        values = load(y + clip * length * W, in_tubes, w, W, length, W).to(tl.float32)
        opening = load(gate + at * ROW, i, w, ROW, left, W).to(tl.float32)
        norm, _ = _normed(values, w, W)
        store(h + at * W, i, w, W, left, W, norm * by * opening * tl.sigmoid(opening))


@triton.jit
def _backward_kernel(
    dh, y, gate, weight, dy, d_gate, parts, blocks, frames, each, W: tl.constexpr, ROW: tl.constexpr,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of `each` tiles of tokens, and what they add to the weight's, to `parts` `(programs, W)`."""
    block, clip = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    i, w = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    length = frames * (SIDE * BLOCK * SIDE * BLOCK)
    by = tl.load(weight + w, mask=w < W, other=0.0)[None, :]
    d_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(block * each, block * each + each, num_stages=STAGES):
        start = tile * ROWS
        at, left, in_tubes = clip * length + start, length - start, _in_tubes(start + i, frames, SIDE, BLOCK)
        values = load(y + clip * length * W, in_tubes, w, W, length, W).to(tl.float32)
        opening = load(gate + at * ROW, i, w, ROW, left, W).to(tl.float32)
        d_out = load(dh + at * W, i, w, W, left, W).to(tl.float32)
        norm, factor = _normed(values, w, W)
        part = tl.sigmoid(opening)
        opened, turned = opening * part, d_out * norm
        store(d_gate + at * W, i, w, W, left, W, turned * by * (part + opened * (1 - part)))
        d_weight += turned * opened
        d_norm = d_out * opened * by
        shared, along = tl.sum(d_norm, 1) / W, tl.sum(d_norm * norm, 1) / W
        d_values = factor * (d_norm - shared[:, None] - norm * along[:, None])
        store(dy + clip * length * W, in_tubes, w, W, length, W, d_values)
    tl.store(parts + tl.program_id(0).to(tl.int64) * W + w, tl.sum(d_weight, 0), mask=w < W)


def _rows_of(gate: Tensor) -> Tensor:
    """The gate's rows `(B * T * N, W)`, where they are if they are equally far apart."""
    rows = gate.flatten(0, 2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _plan(gate: Tensor, rows: Tensor, side: int, name: str) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Of a kernel: its programs; those of a clip, its frames, and the tiles of a program; what it is compiled for."""
    batch, frames, tokens, width = gate.shape
    settings, wide = SETTINGS[name], padded(width)
    of_tile = max(1, settings["TILE"] // wide)
    tiles = triton.cdiv(frames * tokens, of_tile)
    each = triton.cdiv(batch * tiles, settings["PROGRAMS"])
    blocks = triton.cdiv(tiles, each)
    sizes = {"W": width, "ROW": rows.stride(0), "SIDE": side, "BLOCK": math.isqrt(tokens) // side, "ROWS": of_tile}
    options = {"WIDTH": wide, "STAGES": settings["STAGES"], "num_warps": max(1, of_tile * wide // settings["WARP"])}
    return blocks * batch, (blocks, frames, each), {**sizes, **options}


@torch.library.custom_op("longdream::gated", mutates_args=())
def _gated(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    h, y, rows = _gated_shape(y, gate, weight, side), y.contiguous(), _rows_of(gate)
    programs, numbers, options = _plan(gate, rows, side, "forward")
    with torch.cuda.device_of(y):
        _forward_kernel[(programs,)](y, rows, weight.contiguous(), h, *numbers, **options)
    return h


@_gated.register_fake
def _gated_shape(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    """An empty tensor of what comes out."""
    return gate.new_empty(gate.shape)


@torch.library.custom_op("longdream::gated_backward", mutates_args=())
def _gated_backward(dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    dh, y, rows = dh.contiguous(), y.contiguous(), _rows_of(gate)
    dy, d_gate, _ = _gated_gradients(dh, y, gate, weight, side)
    programs, numbers, options = _plan(gate, rows, side, "backward")
    parts = weight.new_empty(programs, gate.shape[-1])
    with torch.cuda.device_of(y):
        _backward_kernel[(programs,)](dh, y, rows, weight.contiguous(), dy, d_gate, parts, *numbers, **options)
    return dy, d_gate, parts.sum(0)


@_gated_backward.register_fake
def _gated_gradients(dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of what comes out."""
    return y.new_empty(y.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.side = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dh):
    dh = dh.contiguous()  # here the compiler can make it so for nothing
    return *_gated_backward(dh, *ctx.saved_tensors, ctx.side), None


_gated.register_autograd(_gradients, setup_context=_keep)
