"""What lies between two parts of a layer, on CUDA, compiled by Triton: what one part gave is gated and added to the
residual stream, and what the next takes in is the stream's modulated norm (AdaLN; Peebles and Xie 2022, arXiv
2212.09748, and Perez et al. 2017, arXiv 1709.07871).

A program has a frame, over whose tokens gate, scale and shift are the same, so that one pass makes all gradients, those
three too, which are sums over tokens. It is bound by memory, and torch's compiler goes over the stream three times.
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
"""Numbers of a frame that a program holds at a time, and those of them that a warp has. Backward a single warp has all
of them: sums over tokens then pass no other's, which took longer than all else (100 us and more at 65,536 x 256 halves
on an H100, 77 so; a copy takes 24)."""
MOST = 2048
"""Width of the stream, at most."""


def fit(u: Tensor) -> bool:
    """Whether the kernels are for a stream like u `(B, T, N, W)`."""
    return on_tensor_cores(u) and u.shape[-1] <= MOST and u.dtype in DTYPES


def join(
    u: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """u + gate * y, like u, and its norm times scale plus shift, of that dtype; with gradients for all.

    Args:
        u: `(B, T, N, W)`. y: the same of any dtype, or None: then nothing is added.
        gate: `(B, T, 1, W)`; mods: `(B, T, 1, 2, W)`, scale and shift; both may be views, with numbers of a row side by
            side. offset: `(3, W)` float32, to be added to gate, scale and shift.
    """
    added, h = _join(u, y, gate, mods, offset, dtype)
    return (u if y is None else added), h


@triton.jit
def _condition(array, offset, w, width):
    """A row of gates, scales or shifts, with its offset."""
    there = w < width
    return tl.load(array + w, mask=there, other=0.0).to(tl.float32) + tl.load(offset + w, mask=there, other=0.0)


@triton.jit
def _normed(u, there, width):
    """Norm and what it was multiplied by, of rows `(tokens, W)`, of which those columns are there."""
    mean = tl.sum(u, 1) / width
    apart = tl.where(there[None, :], u - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(apart * apart, 1) / width + EPS)
    return apart * factor[:, None], factor


@triton.jit
def _forward_kernel(
    u, y, gate, mods, offset, added, h, tokens, width, gate_step, mods_step, ADDS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    frame, i, w = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    scale = _condition(mods + frame * mods_step, offset + width, w, width)
    shift = _condition(mods + frame * mods_step + width, offset + 2 * width, w, width)
    if ADDS:
        opened = _condition(gate + frame * gate_step, offset, w, width)
    for start in range(0, tokens, ROWS):
        at, left = (frame * tokens + start) * width, tokens - start
        stream = load(u + at, i, w, width, left, width).to(tl.float32)
        if ADDS:
            stream += opened[None, :] * load(y + at, i, w, width, left, width).to(tl.float32)
            stream = stream.to(added.dtype.element_ty)
            store(added + at, i, w, width, left, width, stream)
            stream = stream.to(tl.float32)
        norm, _ = _normed(stream, w < width, width)
        store(h + at, i, w, width, left, width, norm * scale[None, :] + shift[None, :])


@triton.jit
def _backward_kernel(
    d_added, dh, stream, y, gate, mods, offset, du, dy, d_conditions, tokens, width, gate_step, mods_step,
    ADDS: tl.constexpr, GOES_ON: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """stream: u + gate * y. GOES_ON: whether it has a gradient beside its norm's. d_conditions `(B, T, 3, W)`: of gate,
    scale and shift."""
    frame, i, w = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = w < width
    scale = _condition(mods + frame * mods_step, offset + width, w, width)
    if ADDS:
        opened = _condition(gate + frame * gate_step, offset, w, width)
    nothing = tl.zeros((WIDTH,), tl.float32)
    to_gate, to_scale, to_shift = nothing, nothing, nothing
    for start in range(0, tokens, ROWS):
        at, left = (frame * tokens + start) * width, tokens - start
        # all of it asked for before the first sum has to wait for some
        was = load(stream + at, i, w, width, left, width)
        d_out = load(dh + at, i, w, width, left, width)
        if GOES_ON:
            beyond = load(d_added + at, i, w, width, left, width)
        if ADDS:
            given = load(y + at, i, w, width, left, width)
        norm, factor = _normed(was.to(tl.float32), there, width)
        d_out = d_out.to(tl.float32)
        to_shift += tl.sum(d_out, 0)
        to_scale += tl.sum(d_out * norm, 0)
        d_norm = d_out * scale[None, :]
        d_stream = d_norm - (tl.sum(d_norm, 1) / width)[:, None] - norm * (tl.sum(d_norm * norm, 1) / width)[:, None]
        d_stream = d_stream * factor[:, None]
        if GOES_ON:
            d_stream += beyond.to(tl.float32)
        store(du + at, i, w, width, left, width, d_stream)
        if ADDS:
            to_gate += tl.sum(d_stream * given.to(tl.float32), 0)
            store(dy + at, i, w, width, left, width, d_stream * opened[None, :])
    d_conditions += frame * 3 * width + w
    tl.store(d_conditions, to_gate, mask=there)
    tl.store(d_conditions + width, to_scale, mask=there)
    tl.store(d_conditions + 2 * width, to_shift, mask=there)


def _sizes(u: Tensor, kernel: str) -> dict[str, int]:
    """Tokens and columns of a program's tile, and warps."""
    width, (at_once, warp) = padded(u.shape[-1]), SETTINGS[kernel]
    rows = max(1, min(triton.next_power_of_2(u.shape[2]), at_once // width))
    return {"ROWS": rows, "WIDTH": width, "num_warps": max(1, min(8, rows * width // warp))}


def _frame_by_frame(v: Tensor) -> Tensor:
    """v with frames one step apart and the numbers of each side by side."""
    steps = v.stride(0) == v.shape[1] * v.stride(1)
    return v if steps and v[0, 0].is_contiguous() else v.contiguous()


@torch.library.custom_op("longdream::join", mutates_args=())
def _join(
    u: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    u, gate, mods = u.contiguous(), _frame_by_frame(gate), _frame_by_frame(mods)
    added, h = _join_shapes(u, y, gate, mods, offset, dtype)
    batch, frames, tokens, width = u.shape
    with torch.cuda.device_of(u):
        _forward_kernel[(batch * frames,)](
            u, u if y is None else y.contiguous(), gate, mods, offset.contiguous(), added, h, tokens, width,
            gate.stride(1), mods.stride(1), ADDS=y is not None, **_sizes(u, "forward"),
        )  # fmt: skip
    return added, h


@_join.register_fake
def _join_shapes(
    u: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Empty tensors of what comes out."""
    return u.new_empty(0 if y is None else u.shape), u.new_empty(u.shape, dtype=dtype)


@torch.library.custom_op("longdream::join_backward", mutates_args=())
def _join_backward(
    d_added: Tensor | None, dh: Tensor, stream: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dh, stream, gate, mods = dh.contiguous(), stream.contiguous(), _frame_by_frame(gate), _frame_by_frame(mods)
    du, dy, d_conditions = _join_gradients(d_added, dh, stream, y, gate, mods, offset)
    batch, frames, tokens, width = stream.shape
    beyond, given = (dh if v is None else v.contiguous() for v in (d_added, y))
    with torch.cuda.device_of(stream):
        _backward_kernel[(batch * frames,)](
            beyond, dh, stream, given, gate, mods, offset.contiguous(), du, dy, d_conditions, tokens, width,
            gate.stride(1), mods.stride(1), ADDS=y is not None, GOES_ON=d_added is not None,
            **_sizes(stream, "backward"),
        )  # fmt: skip
    return du, dy, d_conditions


@_join_backward.register_fake
def _join_gradients(
    d_added: Tensor | None, dh: Tensor, stream: Tensor, y: Tensor | None, gate: Tensor, mods: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of what comes out: of u, of y, and of the frames' gates, scales and shifts."""
    dy = stream.new_empty(0) if y is None else y.new_empty(y.shape)
    return stream.new_empty(stream.shape), dy, offset.new_empty(*stream.shape[:2], 1, *offset.shape)


def _keep(ctx, inputs, output) -> None:
    u, y, gate, mods, offset, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u if y is None else output[0], y, gate, mods, offset)


def _gradients(ctx, d_added, dh):
    stream, y, gate, mods, offset = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(stream)
    du, dy, found = _join_backward(None if y is None else d_added, dh, stream, y, gate, mods, offset)
    d_gate, d_mods = found[..., 0, :].to(gate.dtype), found[..., 1:, :].to(mods.dtype)
    return du, None if y is None else dy, d_gate, d_mods, found.sum((0, 1, 2)), None


_join.register_autograd(_gradients, setup_context=_keep)
