"""Gymnasium spaces and rendered frames of an environment, from its spec alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
from gymnasium import spaces

from longdream.envs.contract import ActionSpec, ObsSpec
from longdream.envs.images import rgb

Observation = Literal["latent", "feature", "image"]
"""What a dream shows of each frame."""
RENDERED = 256
"""Frames are enlarged by an integer factor to about this many pixels."""


def action_space(spec: ActionSpec) -> spaces.Space:
    """The real environment's action space."""
    native = spec.native
    shape = tuple(native["shape"])
    dtype = np.dtype(native["dtype"])
    if native["kind"] == "discrete":
        return spaces.Discrete(spec.parts[0], start=native["start"], dtype=dtype.type)
    if native["kind"] == "multi_discrete":
        parts = np.array(spec.parts).reshape(shape)
        return spaces.MultiDiscrete(parts, dtype=dtype.type, start=np.array(native["start"]).reshape(shape))
    low = np.array(spec.low, dtype).reshape(shape)
    high = np.array(spec.high, dtype).reshape(shape)
    return spaces.Box(low, high, dtype=dtype.type)


def observation_space(spec: ObsSpec) -> spaces.Space:
    """The space of one observation as the agent stores it, but with discrete values and categories from their
    native start."""
    if spec.kind == "image":
        return spaces.Box(0, 255, spec.shape, np.uint8)
    if spec.kind == "discrete":
        return spaces.Discrete(spec.n, start=spec.start)
    if spec.kind == "categories":
        return spaces.MultiDiscrete(np.full(spec.shape, spec.n), start=np.full(spec.shape, spec.start))
    return spaces.Box(-np.inf, np.inf, spec.shape, np.float32)


def picture(decoded: dict[str, np.ndarray]) -> np.ndarray:
    """One frame `(H, W, 3)` uint8 of decoded observations: the first image, enlarged. Without an image, a bar of height
    x / (1 + |x|) for each value x."""
    for value in decoded.values():
        if value.ndim == 3 and value.dtype == np.uint8:
            colours = rgb(value)
            factor = max(1, RENDERED // max(colours.shape[:2]))
            return colours.repeat(factor, 0).repeat(factor, 1)
    values = np.concatenate([np.ravel(value) for value in decoded.values()]).astype(np.float64)
    height = (RENDERED // 2 * values / (1 + np.abs(values))).round().astype(int)
    width = max(2, RENDERED // len(values))
    up = RENDERED // 2 - np.arange(RENDERED)[:, None]  # height of each row of pixels above the middle
    bars = np.where(height > 0, (up > 0) & (up <= height), (up <= 0) & (up > height))
    canvas = np.full((RENDERED, len(values), 3), (13, 17, 23), np.uint8)
    canvas[bars] = (240, 136, 62)
    return canvas.repeat(width, 1)
