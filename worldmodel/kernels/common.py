"""What the kernels for CUDA share (scan_triton.py, attention_triton.py)."""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_tensor_cores(x: Tensor) -> bool:
    """Whether x is on a GPU whose tensor cores multiply all DTYPES."""
    return x.is_cuda and _capability(x.get_device()) >= 8


@torch.compiler.assume_constant_result
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


@triton.jit
def load(array, i, j, stride, rows, columns):
    """Rows i and columns j of a matrix of so many, with `stride` numbers to a row; zero where there is none."""
    return tl.load(
        array + i[:, None] * stride + j[None, :], mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0
    )


@triton.jit
def store(array, i, j, stride, rows, columns, value):
    """`value` to where `load` would read; nothing beyond the rows and columns that there are."""
    at = array + i[:, None] * stride + j[None, :]
    tl.store(at, value.to(array.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@contextmanager
def without_wgmma() -> Iterator[None]:
    """Kernels that are compiled within make their products by `mma.sync`, on Hopper too. `wgmma` reads shared memory
    past the ordinary order of things, for which a fence has to come between writing and the barrier; where another
    barrier is near, Triton 3.6 sets the fence behind it, and some warps then read what was there before: gradients of b
    in the scan were now and then NaN."""
    name = "DISABLE_MMA_V3"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def padded(size: int) -> int:
    """The width in which Triton computes: a power of two, 16 for a matrix product."""
    return max(16, triton.next_power_of_2(size))
