"""Pictures in other sizes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def resize_area(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images `(..., H, W, C)` uint8 to `(..., height, width, C)`: a new pixel is the mean of the area that it covers,
    parts of old pixels included."""
    if images.shape[-3:-1] == (height, width):
        return images
    rows, columns = _shares(images.shape[-3], height), _shares(images.shape[-2], width)
    low = np.matmul(rows, images.reshape(*images.shape[:-2], -1).astype(np.float32))  # (..., height, W * C)
    low = np.matmul(columns, low.reshape(*low.shape[:-1], *images.shape[-2:]))
    return np.clip(low + 0.5, 0, 255).astype(np.uint8)


@lru_cache
def _shares(old: int, new: int) -> np.ndarray:
    """`(new, old)`: the share of each old pixel in each new one; rows sum to 1."""
    edges = np.arange(new + 1) * (old / new)
    starts = np.arange(old)
    upper, lower = np.minimum(edges[1:, None], starts + 1), np.maximum(edges[:-1, None], starts)
    return (np.clip(upper - lower, 0, None) * (new / old)).astype(np.float32)
