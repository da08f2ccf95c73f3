"""`scan_step` of one token per frame on CUDA in one Triton kernel, without gradients.

A dreamt step reads a state of megabytes per layer and writes it back; everything else that it touches is small. The
kernel moves every element once in each direction, where separate operations for decay, write and read move it four
times. A program handles one head of one sequence. Sums are in float32 whatever the state is stored in.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longdream.worldmodel.kernels.common import DTYPES, load, on_tensor_cores, store

MAX_SIZE = 16384
"""Largest number of elements of a head's state that a program can hold, padded to powers of two."""


def fit(x: Tensor, state: Tensor) -> bool:
    """Whether the kernel supports values x `(B, 1, 1, H, P)` and a state `(B, H, S, P)`."""
    size = triton.next_power_of_2(state.shape[-2]) * triton.next_power_of_2(state.shape[-1])
    one_token = x.shape[1] * x.shape[2] == 1
    return one_token and on_tensor_cores(x) and size <= MAX_SIZE and x.dtype in DTYPES and state.dtype in DTYPES


def scan_step(
    x: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor, turn: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token per sequence: y `(B, H, P)`, like x, and the state after it, like `state`.

    Args:
        x: `(B, H, P)`. b, c: `(B, S)`. a: `(B, H)`, log decay. state: `(B, H, S, P)`.
        turn: `(B, S // 2)`, angles by which the state turns back before the token (`scan.turned`); None for no turn.
    """
    if turn is not None:
        turn = turn.contiguous()
    return _scan_step(*(v.contiguous() for v in (x, b, c, a, state)), turn)


@triton.jit
def _kernel(
    x,
    b,
    c,
    a,
    state,
    turn,
    y,
    after,
    heads,
    S: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """A head of a sequence."""
    program = tl.program_id(0).to(tl.int64)
    sequence = program // heads
    s = tl.arange(0, ROWS)
    p = tl.arange(0, COLUMNS)
    values = tl.load(x + program * P + p, mask=p < P, other=0.0).to(tl.float32)
    write = tl.load(b + sequence * S + s, mask=s < S, other=0.0).to(tl.float32)
    read = tl.load(c + sequence * S + s, mask=s < S, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(a + program).to(tl.float32))
    before = load(state + program * S * P, s, p, P, S, P).to(tl.float32)
    if TURNS:
        HALF: tl.constexpr = S // 2
        paired = s < 2 * HALF  # of an odd S, the last channel stays as it is
        lower = s < HALF
        angle = tl.load(turn + sequence * HALF + s % HALF, mask=paired, other=0.0).to(tl.float32)
        partner = tl.where(paired, tl.where(lower, s + HALF, s - HALF), s)
        other = load(state + program * S * P, partner, p, P, S, P).to(tl.float32)
        sine = tl.where(lower, tl.sin(angle), -tl.sin(angle))
        before = tl.cos(angle)[:, None] * before + sine[:, None] * other
    now = decay * before + write[:, None] * values[None, :]
    store(after + program * S * P, s, p, P, S, P, now)
    tl.store(y + program * P + p, tl.sum(read[:, None] * now, 0).to(y.dtype.element_ty), mask=p < P)


@torch.library.custom_op("longdream::scan_step", mutates_args=())
def _scan_step(x: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    after = torch.empty_like(state)
    sequences, heads, size, width = state.shape
    if sequences:
        rows = triton.next_power_of_2(size)
        columns = triton.next_power_of_2(width)
        warps = max(1, min(8, rows * columns // 512))
        _kernel[(sequences * heads,)](
            *(x, b, c, a, state, turn, y, after, heads),
            S=size,
            P=width,
            ROWS=rows,
            COLUMNS=columns,
            TURNS=turn is not None and size > 1,
            num_warps=warps,
        )
    return y, after


@_scan_step.register_fake
def _(x: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(state)
