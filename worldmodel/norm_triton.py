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

from worldmodel.triton_tools import DTYPES, load, on_tensor_cores, padded, store

EPS = tl.constexpr(1e-5)
AT_ONCE, WARP = 2048, 512
"""Numbers of a frame that a program holds at a time, and those of them that a warp has."""
MOST = 2048
"""Width of the stream, at most."""


def fit(u: Tensor) -> bool:
    """Whether the kernels are for a stream like u `(B, T, N, W)`."""
    return on_tensor_cores(u) and u.shape[-1] <= MOST and u.dtype in DTYPES


def join(
    u: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """u + gate * y, like u, and its norm times scale plus shift, of that dtype; with gradients for all.

    Args:
        u: `(B, T, N, W)`. y: the same of any dtype, or None, as is gate then: nothing is added.
        gate, scale, shift: `(B, T, 1, W)` float32.
    """
    added, h = _join(u, y, gate, scale, shift, dtype)
    return (u if y is None else added), h


@triton.jit
def _normed(u, there, width):
    """Norm and what it was multiplied by, of rows `(tokens, W)`, of which those columns are there."""
    mean = tl.sum(u, 1) / width
    apart = tl.where(there[None, :], u - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(apart * apart, 1) / width + EPS)
    return apart * factor[:, None], factor


@triton.jit
def _forward_kernel(
    u, y, gate, scale, shift, added, h, tokens, width, ADDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    frame, i, w = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = w < width
    by = tl.load(scale + frame * width + w, mask=there, other=0.0)
    to = tl.load(shift + frame * width + w, mask=there, other=0.0)
    if ADDS:
        opened = tl.load(gate + frame * width + w, mask=there, other=0.0)
    for start in range(0, tokens, ROWS):
        at, left = (frame * tokens + start) * width, tokens - start
        stream = load(u + at, i, w, width, left, width).to(tl.float32)
        if ADDS:
            stream += opened[None, :] * load(y + at, i, w, width, left, width).to(tl.float32)
            store(added + at, i, w, width, left, width, stream)
            stream = stream.to(added.dtype.element_ty).to(tl.float32)
        norm, _ = _normed(stream, there, width)
        store(h + at, i, w, width, left, width, norm * by[None, :] + to[None, :])


@triton.jit
def _backward_kernel(
    d_added, dh, stream, y, gate, scale, du, dy, d_gate, d_scale, d_shift, tokens, width, ADDS: tl.constexpr,
    GOES_ON: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """stream: u + gate * y. GOES_ON: whether it has a gradient beside its norm's."""
    frame, i, w = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = w < width
    by = tl.load(scale + frame * width + w, mask=there, other=0.0)
    nothing = tl.zeros((WIDTH,), tl.float32)
    to_gate, to_scale, to_shift = nothing, nothing, nothing
    if ADDS:
        opened = tl.load(gate + frame * width + w, mask=there, other=0.0)
    for start in range(0, tokens, ROWS):
        at, left = (frame * tokens + start) * width, tokens - start
        norm, factor = _normed(load(stream + at, i, w, width, left, width).to(tl.float32), there, width)
        d_out = load(dh + at, i, w, width, left, width).to(tl.float32)
        to_shift += tl.sum(d_out, 0)
        to_scale += tl.sum(d_out * norm, 0)
        d_norm = d_out * by[None, :]
        d_stream = d_norm - (tl.sum(d_norm, 1) / width)[:, None] - norm * (tl.sum(d_norm * norm, 1) / width)[:, None]
        d_stream = d_stream * factor[:, None]
        if GOES_ON:
            d_stream += load(d_added + at, i, w, width, left, width).to(tl.float32)
        store(du + at, i, w, width, left, width, d_stream)
        if ADDS:
            to_gate += tl.sum(d_stream * load(y + at, i, w, width, left, width).to(tl.float32), 0)
            store(dy + at, i, w, width, left, width, d_stream * opened[None, :])
    tl.store(d_scale + frame * width + w, to_scale, mask=there)
    tl.store(d_shift + frame * width + w, to_shift, mask=there)
    if ADDS:
        tl.store(d_gate + frame * width + w, to_gate, mask=there)


def _sizes(u: Tensor) -> dict[str, int]:
    """Tokens and columns of a program's tile, and warps."""
    width = padded(u.shape[-1])
    rows = max(1, min(triton.next_power_of_2(u.shape[2]), AT_ONCE // width))
    return {"ROWS": rows, "WIDTH": width, "num_warps": max(1, min(8, rows * width // WARP))}


def _given(y: Tensor | None, gate: Tensor | None, u: Tensor, scale: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Whether anything is added, and it and its gate, or any in their place."""
    if y is None or gate is None:
        return False, u, scale
    return True, y.contiguous(), gate.contiguous()


@torch.library.custom_op("longdream::join", mutates_args=())
def _join(
    u: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    u, scale, shift = u.contiguous(), scale.contiguous(), shift.contiguous()
    added, h = _join_shapes(u, y, gate, scale, shift, dtype)
    adds, y, gate = _given(y, gate, u, scale)
    batch, frames, tokens, width = u.shape
    with torch.cuda.device_of(u):
        _forward_kernel[(batch * frames,)](u, y, gate, scale, shift, added, h, tokens, width, ADDS=adds, **_sizes(u))
    return added, h


@_join.register_fake
def _join_shapes(
    u: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Empty tensors of what comes out."""
    return u.new_empty(0 if y is None else u.shape), u.new_empty(u.shape, dtype=dtype)


@torch.library.custom_op("longdream::join_backward", mutates_args=())
def _join_backward(
    d_added: Tensor | None, dh: Tensor, stream: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dh, stream, scale = dh.contiguous(), stream.contiguous(), scale.contiguous()
    found = _join_gradients(d_added, dh, stream, y, gate, scale)
    goes_on, beyond = (False, dh) if d_added is None else (True, d_added.contiguous())
    adds, y, gate = _given(y, gate, stream, scale)
    batch, frames, tokens, width = stream.shape
    with torch.cuda.device_of(stream):
        _backward_kernel[(batch * frames,)](
            beyond, dh, stream, y, gate, scale, *found, tokens, width, ADDS=adds, GOES_ON=goes_on, **_sizes(stream)
        )
    return found


@_join_backward.register_fake
def _join_gradients(
    d_added: Tensor | None, dh: Tensor, stream: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors of what comes out: of u, y, gate, scale and shift."""
    dy = stream.new_empty(0) if y is None else y.new_empty(y.shape)
    d_gate = scale.new_empty(0 if gate is None else gate.shape)
    return stream.new_empty(stream.shape), dy, d_gate, scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _keep(ctx, inputs, output) -> None:
    u, y, gate, scale, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u if y is None else output[0], y, gate, scale)


def _gradients(ctx, d_added, dh):
    stream, y, gate, scale = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(stream)
    du, dy, d_gate, d_scale, d_shift = _join_backward(None if y is None else d_added, dh, stream, y, gate, scale)
    return du, None if y is None else dy, None if y is None else d_gate, d_scale, d_shift, None


_join.register_autograd(_gradients, setup_context=_keep)
