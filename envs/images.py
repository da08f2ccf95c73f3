"""Resizing of images, and their colours."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def resize_area(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize images `(..., H, W, C)` uint8 to `(..., height, width, C)` by area averaging.

    A new pixel is the mean of the area that it covers; an old pixel that is partly covered counts in proportion."""
    if images.shape[-3:-1] == (height, width):
        return images
    rows = _weights(images.shape[-3], height)
    columns = _weights(images.shape[-2], width)
    resized = np.matmul(rows, images.reshape(*images.shape[:-2], -1).astype(np.float32))  # (..., height, W * C)
    resized = np.matmul(columns, resized.reshape(*resized.shape[:-1], *images.shape[-2:]))
    return np.clip(resized + 0.5, 0, 255).astype(np.uint8)


@lru_cache
def _weights(old: int, new: int) -> np.ndarray:
    """`(new, old)`: the weight of each old pixel in each new pixel. Rows sum to 1."""
    edges = np.arange(new + 1) * (old / new)
    starts = np.arange(old)
    upper = np.minimum(edges[1:, None], starts + 1)
    lower = np.maximum(edges[:-1, None], starts)
    return (np.clip(upper - lower, 0, None) * (new / old)).astype(np.float32)


def rgb(images: np.ndarray) -> np.ndarray:
    """Images `(..., C)` of any number of channels as `(..., 3)`: one channel as grey, of two the third is black, and of
    more than three the first three."""
    channels = images.shape[-1]
    if channels == 1:
        return images.repeat(3, -1)
    if channels == 2:
        return np.concatenate([images, np.zeros_like(images[..., :1])], -1)
    return images[..., :3]
