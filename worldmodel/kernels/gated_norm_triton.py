"""`gated_norm` on CUDA in one Triton kernel, with a backward pass of its own.

A scan's output is brought back from tubes to frames, normed over the width, and gated (gated_norm.py). The kernel is
bound by memory bandwidth. A program handles some tiles of tokens in frame order, finds where each token lies in its
tube, and reads and writes every element once; tiles are prefetched while others are computed. The backward pass
recomputes the norm. Each program leaves a partial sum of the weight's gradient, and torch adds these up. Every sum has
a fixed order: the same inputs give the same bits.
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
MAX_WIDTH = 2048
"""Largest supported width of the stream."""
SETTINGS = {
    "forward": {"TILE": 2048, "WARP": 512, "STAGES": 1, "PROGRAMS": 1 << 20},
    "backward": {"TILE": 2048, "WARP": 512, "STAGES": 3, "PROGRAMS": 1024},
}
"""For each kernel: elements of a program's tile and of them per warp, powers of two; pipeline stages over tiles; and
about how many programs there are at most. With a single stage, the compiler delays reading the gate until the norm is
computed, whatever the order here."""


def fit(y: Tensor) -> bool:
    """Whether the kernels support a scan's output like y `(B, T, n, H, P)`."""
    return on_tensor_cores(y) and y.shape[-2] * y.shape[-1] <= MAX_WIDTH and y.dtype in DTYPES


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    """`norm(y) * weight * silu(gate)` with a frame's tokens in raster order; differentiable in y, gate and weight.

    Args:
        y: `(B * side * side, T, n, H, P)`, of tubes with `block * block = n` tokens per frame, whose width is W = H *
            P.
        gate: `(B, T, N, W)`, of N = side * side * n tokens per frame; columns of a wider tensor are read without a
            copy.
        weight: `(W,)` float32, of the norm.
        side: tubes along an edge of the token grid.

    Returns:
        h, like gate.
    """
    return _gated_norm(y, gate, weight, side)


@triton.jit
def _in_tubes(token, frames, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions in the tubes of a clip's tokens; positions past the last token stay as they are."""
    frame = token // (SIDE * BLOCK * SIDE * BLOCK)
    place = token % (SIDE * BLOCK * SIDE * BLOCK)
    i = place // (SIDE * BLOCK)
    j = place % (SIDE * BLOCK)
    tube = i // BLOCK * SIDE + j // BLOCK
    in_tube = (tube * frames + frame) * (BLOCK * BLOCK) + i % BLOCK * BLOCK + j % BLOCK
    return tl.where(frame < frames, in_tube, token).to(tl.int64)


@triton.jit
def _normed(y, w, W: tl.constexpr):
    """Normed rows of W elements, and the factor of each."""
    mean = tl.sum(y, 1) / W
    centered = tl.where((w < W)[None, :], y - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centered * centered, 1) / W + EPS)[:, None]
    return centered * factor, factor


@triton.jit
def _forward_kernel(
    y, gate, weight, h, blocks, frames, each, W: tl.constexpr, ROW: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of `each` tiles of tokens; rows of the gate are ROW elements apart."""
    block = tl.program_id(0) % blocks
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.arange(0, ROWS)
    w = tl.arange(0, WIDTH)
    length = frames * (SIDE * BLOCK * SIDE * BLOCK)
    weights = tl.load(weight + w, mask=w < W, other=0.0)[None, :]
    for tile in tl.range(block * each, block * each + each, num_stages=STAGES):
        start = tile * ROWS
        at = clip * length + start
        left = length - start
        in_tubes = _in_tubes(start + i, frames, SIDE, BLOCK)
        values = load(y + clip * length * W, in_tubes, w, W, length, W).to(tl.float32)
        gates = load(gate + at * ROW, i, w, ROW, left, W).to(tl.float32)
        norm, _ = _normed(values, w, W)
        store(h + at * W, i, w, W, left, W, norm * weights * gates * tl.sigmoid(gates))


@triton.jit
def _backward_kernel(
    dh, y, gate, weight, dy, d_gate, parts, blocks, frames, each, W: tl.constexpr, ROW: tl.constexpr,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of `each` tiles of tokens, and their part of the weight's gradient, to `parts` `(programs, W)`."""
    block = tl.program_id(0) % blocks
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.arange(0, ROWS)
    w = tl.arange(0, WIDTH)
    length = frames * (SIDE * BLOCK * SIDE * BLOCK)
    weights = tl.load(weight + w, mask=w < W, other=0.0)[None, :]
    d_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(block * each, block * each + each, num_stages=STAGES):
        start = tile * ROWS
        at = clip * length + start
        left = length - start
        in_tubes = _in_tubes(start + i, frames, SIDE, BLOCK)
        values = load(y + clip * length * W, in_tubes, w, W, length, W).to(tl.float32)
        gates = load(gate + at * ROW, i, w, ROW, left, W).to(tl.float32)
        d_out = load(dh + at * W, i, w, W, left, W).to(tl.float32)
        norm, factor = _normed(values, w, W)
        sigmoid = tl.sigmoid(gates)
        silu = gates * sigmoid
        d_out_norm = d_out * norm
        store(d_gate + at * W, i, w, W, left, W, d_out_norm * weights * (sigmoid + silu * (1 - sigmoid)))
        d_weight += d_out_norm * silu
        d_norm = d_out * silu * weights
        mean = tl.sum(d_norm, 1) / W
        projected = tl.sum(d_norm * norm, 1) / W
        d_values = factor * (d_norm - mean[:, None] - norm * projected[:, None])
        store(dy + clip * length * W, in_tubes, w, W, length, W, d_values)
    tl.store(parts + tl.program_id(0).to(tl.int64) * W + w, tl.sum(d_weight, 0), mask=w < W)


def _rows_of(gate: Tensor) -> Tensor:
    """The gate's rows `(B * T * N, W)`, without a copy if they are evenly spaced."""
    rows = gate.flatten(0, 2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _plan(gate: Tensor, rows: Tensor, side: int, name: str) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """A kernel's number of programs; its programs per clip, frames per clip and tiles per program; its constants."""
    batch, frames, tokens, width = gate.shape
    settings = SETTINGS[name]
    padded_width = padded(width)
    tile_rows = max(1, settings["TILE"] // padded_width)
    tiles = triton.cdiv(frames * tokens, tile_rows)
    each = triton.cdiv(batch * tiles, settings["PROGRAMS"])
    blocks = triton.cdiv(tiles, each)
    sizes = {"W": width, "ROW": rows.stride(0), "SIDE": side, "BLOCK": math.isqrt(tokens) // side, "ROWS": tile_rows}
    options = {
        "WIDTH": padded_width,
        "STAGES": settings["STAGES"],
        "num_warps": max(1, tile_rows * padded_width // settings["WARP"]),
    }
    return blocks * batch, (blocks, frames, each), {**sizes, **options}


@torch.library.custom_op("longdream::gated_norm", mutates_args=())
def _gated_norm(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    h = _gated_norm_shape(y, gate, weight, side)
    y = y.contiguous()
    rows = _rows_of(gate)
    programs, numbers, options = _plan(gate, rows, side, "forward")
    with torch.cuda.device_of(y):
        _forward_kernel[(programs,)](y, rows, weight.contiguous(), h, *numbers, **options)
    return h


@_gated_norm.register_fake
def _gated_norm_shape(y: Tensor, gate: Tensor, weight: Tensor, side: int) -> Tensor:
    """An empty output."""
    return gate.new_empty(gate.shape)


@torch.library.custom_op("longdream::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    dh = dh.contiguous()
    y = y.contiguous()
    rows = _rows_of(gate)
    dy, d_gate, _ = _gated_norm_gradients(dh, y, gate, weight, side)
    programs, numbers, options = _plan(gate, rows, side, "backward")
    parts = weight.new_empty(programs, gate.shape[-1])
    with torch.cuda.device_of(y):
        _backward_kernel[(programs,)](dh, y, rows, weight.contiguous(), dy, d_gate, parts, *numbers, **options)
    return dy, d_gate, parts.sum(0)


@_gated_norm_backward.register_fake
def _gated_norm_gradients(
    dh: Tensor, y: Tensor, gate: Tensor, weight: Tensor, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of y, gate and weight."""
    return y.new_empty(y.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.side = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dh):
    dh = dh.contiguous()  # here the compiler can fuse the copy with what comes before
    return *_gated_norm_backward(dh, *ctx.saved_tensors, ctx.side), None


_gated_norm.register_autograd(_gradients, setup_context=_save)
