"""Gated residual addition and modulated norm (AdaLN; Peebles and Xie 2022, arXiv 2212.09748) in one Triton kernel.

Between two branches of a layer, one branch's output is gated and added to the residual stream, and the next branch
takes the stream's modulated norm. A program handles one frame. Gate, scale and shift are constant over a frame's
tokens: their gradients are sums within a program, and one pass computes all gradients. The kernel is bound by memory
bandwidth; torch.compile's version reads the stream three times.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longdream.worldmodel.kernels.common import DTYPES, load, on_tensor_cores, padded, store

EPS = tl.constexpr(1e-5)
SETTINGS = {"forward": (4096, 1024), "backward": (512, 512)}
"""Elements of a program's tile, and of them per warp. Backward, one warp holds the whole tile. Sums over tokens then
need no exchange between warps, which took longer than everything else (at 65,536 x 256 halves on an H100, over 100 us
with it and 77 us without; a copy takes 24 us)."""
MAX_WIDTH = 2048
"""Largest supported width of the stream."""


def fit(u: Tensor) -> bool:
    """Whether the kernels support a stream like u `(B, T, N, W)`."""
    return on_tensor_cores(u) and u.shape[-1] <= MAX_WIDTH and u.dtype in DTYPES


def adaln(
    u: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """u + gate * y, and the norm of that sum times scale plus shift; differentiable in all tensors.

    Args:
        u: `(B, T, N, W)`. y: like u, of any dtype; None: nothing is added.
        gate: `(B, T, 1, W)`. mods: `(B, T, 1, 2, W)`, scale and shift. Both may be views whose rows are contiguous.
        offset: `(3, W)` float32, added to gate, scale and shift.
        dtype: of the modulated norm.

    Returns:
        the sum, like u, and its modulated norm `(B, T, N, W)`.
    """
    added, h = _adaln(u, y, gate, mods, offset, dtype)
    return (u if y is None else added), h


@triton.jit
def _condition(array, offset, w, width):
    """A row of gates, scales or shifts, plus its offset."""
    valid = w < width
    return tl.load(array + w, mask=valid, other=0.0).to(tl.float32) + tl.load(offset + w, mask=valid, other=0.0)


@triton.jit
def _normed(u, valid, width):
    """Normed rows `(tokens, W)`, and the factor of each; valid: columns inside the width."""
    mean = tl.sum(u, 1) / width
    centered = tl.where(valid[None, :], u - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centered * centered, 1) / width + EPS)
    return centered * factor[:, None], factor


@triton.jit
def _forward_kernel(
    u, y, gate, mods, offset, added, h, tokens, width, gate_step, mods_step, ADDS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROWS)
    w = tl.arange(0, WIDTH)
    scale = _condition(mods + frame * mods_step, offset + width, w, width)
    shift = _condition(mods + frame * mods_step + width, offset + 2 * width, w, width)
    if ADDS:
        gate_row = _condition(gate + frame * gate_step, offset, w, width)
    for start in range(0, tokens, ROWS):
        at = (frame * tokens + start) * width
        left = tokens - start
        stream = load(u + at, i, w, width, left, width).to(tl.float32)
        if ADDS:
            stream += gate_row[None, :] * load(y + at, i, w, width, left, width).to(tl.float32)
            stream = stream.to(added.dtype.element_ty)
            store(added + at, i, w, width, left, width, stream)
            stream = stream.to(tl.float32)
        norm, _ = _normed(stream, w < width, width)
        store(h + at, i, w, width, left, width, norm * scale[None, :] + shift[None, :])


@triton.jit
def _backward_kernel(
    d_added, dh, stream, y, gate, mods, offset, du, dy, d_conditions, tokens, width, gate_step, mods_step,
    ADDS: tl.constexpr, DIRECT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a frame.

    stream: u + gate * y. d_added: the gradient of that sum itself, if DIRECT. d_conditions: `(B, T, 3, W)`, of gate,
    scale and shift.
    """
    frame = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROWS)
    w = tl.arange(0, WIDTH)
    valid = w < width
    scale = _condition(mods + frame * mods_step, offset + width, w, width)
    if ADDS:
        gate_row = _condition(gate + frame * gate_step, offset, w, width)
    zero_row = tl.zeros((WIDTH,), tl.float32)
    d_gate_sum = zero_row
    d_scale_sum = zero_row
    d_shift_sum = zero_row
    for start in range(0, tokens, ROWS):
        at = (frame * tokens + start) * width
        left = tokens - start
        # all loads are issued before the first sum waits for one
        values = load(stream + at, i, w, width, left, width)
        d_out = load(dh + at, i, w, width, left, width)
        if DIRECT:
            d_direct = load(d_added + at, i, w, width, left, width)
        if ADDS:
            branch = load(y + at, i, w, width, left, width)
        norm, factor = _normed(values.to(tl.float32), valid, width)
        d_out = d_out.to(tl.float32)
        d_shift_sum += tl.sum(d_out, 0)
        d_scale_sum += tl.sum(d_out * norm, 0)
        d_norm = d_out * scale[None, :]
        d_stream = d_norm - (tl.sum(d_norm, 1) / width)[:, None] - norm * (tl.sum(d_norm * norm, 1) / width)[:, None]
        d_stream = d_stream * factor[:, None]
        if DIRECT:
            d_stream += d_direct.to(tl.float32)
        store(du + at, i, w, width, left, width, d_stream)
        if ADDS:
            d_gate_sum += tl.sum(d_stream * branch.to(tl.float32), 0)
            store(dy + at, i, w, width, left, width, d_stream * gate_row[None, :])
    d_conditions += frame * 3 * width + w
    tl.store(d_conditions, d_gate_sum, mask=valid)
    tl.store(d_conditions + width, d_scale_sum, mask=valid)
    tl.store(d_conditions + 2 * width, d_shift_sum, mask=valid)


def _sizes(u: Tensor, kernel: str) -> dict[str, int]:
    """Tokens and columns of a program's tile, and the number of warps."""
    width = padded(u.shape[-1])
    tile_size, warp = SETTINGS[kernel]
    rows = max(1, min(triton.next_power_of_2(u.shape[2]), tile_size // width))
    return {"ROWS": rows, "WIDTH": width, "num_warps": max(1, min(8, rows * width // warp))}


def _frame_by_frame(v: Tensor) -> Tensor:
    """v with evenly spaced frames whose elements are contiguous; copied if necessary."""
    steps = v.stride(0) == v.shape[1] * v.stride(1)
    return v if steps and v[0, 0].is_contiguous() else v.contiguous()


@torch.library.custom_op("longdream::adaln", mutates_args=())
def _adaln(
    u: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    u = u.contiguous()
    gate = _frame_by_frame(gate)
    mods = _frame_by_frame(mods)
    added, h = _adaln_shapes(u, y, gate, mods, offset, dtype)
    batch, frames, tokens, width = u.shape
    with torch.cuda.device_of(u):
        _forward_kernel[(batch * frames,)](
            u, u if y is None else y.contiguous(), gate, mods, offset.contiguous(), added, h, tokens, width,
            gate.stride(1), mods.stride(1), ADDS=y is not None, **_sizes(u, "forward"),
        )  # fmt: skip
    return added, h


@_adaln.register_fake
def _adaln_shapes(
    u: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Empty outputs."""
    return u.new_empty(0 if y is None else u.shape), u.new_empty(u.shape, dtype=dtype)


@torch.library.custom_op("longdream::adaln_backward", mutates_args=())
def _adaln_backward(
    d_added: Tensor | None, dh: Tensor, stream: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dh = dh.contiguous()
    stream = stream.contiguous()
    gate = _frame_by_frame(gate)
    mods = _frame_by_frame(mods)
    du, dy, d_conditions = _adaln_gradients(d_added, dh, stream, y, gate, mods, offset)
    batch, frames, tokens, width = stream.shape
    d_direct, branch = (dh if v is None else v.contiguous() for v in (d_added, y))
    with torch.cuda.device_of(stream):
        _backward_kernel[(batch * frames,)](
            d_direct, dh, stream, branch, gate, mods, offset.contiguous(), du, dy, d_conditions, tokens, width,
            gate.stride(1), mods.stride(1), ADDS=y is not None, DIRECT=d_added is not None,
            **_sizes(stream, "backward"),
        )  # fmt: skip
    return du, dy, d_conditions


@_adaln_backward.register_fake
def _adaln_gradients(
    d_added: Tensor | None, dh: Tensor, stream: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of u, of y, and of each frame's gate, scale and shift."""
    dy = stream.new_empty(0) if y is None else y.new_empty(y.shape)
    return stream.new_empty(stream.shape), dy, offset.new_empty(*stream.shape[:2], 1, *offset.shape)


def _save(ctx, inputs, output) -> None:
    u, y, gate, mods, offset, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u if y is None else output[0], y, gate, mods, offset)


def _gradients(ctx, d_added, dh):
    stream, y, gate, mods, offset = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(stream)
    du, dy, per_frame = _adaln_backward(None if y is None else d_added, dh, stream, y, gate, mods, offset)
    d_gate = per_frame[..., 0, :].to(gate.dtype)
    d_mods = per_frame[..., 1:, :].to(mods.dtype)
    return du, None if y is None else dy, d_gate, d_mods, per_frame.sum((0, 1, 2)), None


_adaln.register_autograd(_gradients, setup_context=_save)
