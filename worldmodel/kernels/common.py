"""Helpers of the kernels for CUDA (`*_triton.py`)."""

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
    """Whether x is on a GPU whose tensor cores support all DTYPES."""
    return x.is_cuda and _capability(x.get_device()) >= 8


@torch.compiler.assume_constant_result
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


@triton.jit
def load(array, i, j, stride, rows, columns):
    """Elements i, j of a matrix of `rows` x `columns` whose rows are `stride` elements apart; zero outside it."""
    return tl.load(
        array + i[:, None] * stride + j[None, :], mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0
    )


@triton.jit
def store(array, i, j, stride, rows, columns, value):
    """Store `value` at the elements that `load` reads; nothing outside the matrix."""
    at = array + i[:, None] * stride + j[None, :]
    tl.store(at, value.to(array.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@contextmanager
def without_wgmma() -> Iterator[None]:
    """A context in which kernels are compiled to multiply matrices by `mma.sync`, on Hopper too.

    `wgmma` reads shared memory asynchronously and needs a fence between a write and the barrier after it. If another
    barrier is near, Triton 3.6 places the fence after it, and some warps read stale data: gradients of b in the scan
    were occasionally NaN.
    """
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
    """The padded width that Triton computes with: a power of two, and at least 16 for matrix products."""
    return max(16, triton.next_power_of_2(size))
