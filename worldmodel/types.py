"""The few types that V, M and C exchange.

Shapes: B batch, T time, N latent tokens per frame, D latent channels, A encoded action, F feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """What every part that learns returns: a scalar to minimise and detached scalars to log."""

    value: Tensor
    metrics: dict[str, Tensor]


@dataclass
class Batch:
    """Clips of time rows `(obs, is_first, reward, terminated, truncated | action)`.

    reward and flags at t arrive with obs_t, caused by action_{t-1}; action_t is chosen from obs_t.

    Attributes:
        obs: each `(B, T, ...)`: images uint8 HWC, vectors float32, discrete values int64.
        action: `(B, T, A)` float32, one-hots side by side or a box scaled to [-1, 1].
        reward, surprise: `(B, T)` float32. is_first, terminated, truncated: `(B, T)` bool.
        before: `(B, A)` float32, the action before row 0, where that is known.
    """

    obs: dict[str, Tensor]
    action: Tensor
    reward: Tensor
    is_first: Tensor
    terminated: Tensor
    truncated: Tensor
    surprise: Tensor
    before: Tensor | None = None

    @classmethod
    def of(cls, rows: dict, device: torch.device | str = "cpu") -> Batch:
        """Build from the arrays or tensors that a replay returns, in one transfer per field."""

        def move(x):
            return torch.as_tensor(x).to(device, non_blocking=True)

        fields = {k: move(v) for k, v in rows.items() if k != "obs"}
        return cls(obs={k: move(v) for k, v in rows["obs"].items()}, **fields)

    def fields(self) -> dict[str, Any]:
        """What it is built of: a tree of tensors."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def prev_action(self) -> Tensor:
        """`(B, T, A)`: action_{t-1} at t; where a clip begins (M masks it there) `before`, or zeros."""
        before = torch.zeros_like(self.action[:, 0]) if self.before is None else self.before
        return torch.cat([before[:, None], self.action[:, :-1]], 1)

    def clip_first(self) -> Tensor:
        """`(B, T)` bool: is_first, and true at t = 0, since a clip starts without memory."""
        first = self.is_first.clone()
        first[:, 0] = True
        return first


def named(field: str, name: str, known: Mapping[str, type]) -> type:
    """The class behind a field of the configuration: a known word or a dotted path `package.module:Class`.

    Raises:
        ValueError: neither.
    """
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{field} = {name}: use one of {', '.join(known)} or package.module:Class")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field} = {name}: {error}") from None
