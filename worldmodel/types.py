"""Types that V, M and C exchange.

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
    """A scalar to minimise, and detached scalars to log."""

    value: Tensor
    metrics: dict[str, Tensor]


@dataclass
class Batch:
    """Clips of time rows `(obs, is_first, reward, terminated, truncated | action)`.

    Reward and flags of row t arrive with obs_t, as a consequence of action_{t-1}. action_t is chosen from obs_t.

    Attributes:
        obs: each `(B, T, ...)`: images uint8 HWC, vectors float32, discrete values int64.
        action: `(B, T, A)` float32, one-hot vectors side by side or a box scaled to [-1, 1].
        reward, surprise: `(B, T)` float32. is_first, terminated, truncated: `(B, T)` bool.
        before: `(B, A)` float32, the action before row 0, if it is known.
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
        """Build from the arrays or tensors of a replay, with one transfer per field."""

        def move(x):
            return torch.as_tensor(x).to(device, non_blocking=True)

        fields = {k: move(v) for k, v in rows.items() if k != "obs"}
        return cls(obs={k: move(v) for k, v in rows["obs"].items()}, **fields)

    def fields(self) -> dict[str, Any]:
        """Its fields, a tree of tensors that it can be rebuilt from."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def prev_action(self) -> Tensor:
        """`(B, T, A)`: action_{t-1} at t. At t = 0 it is `before`, or zeros; M masks it where an episode begins."""
        before = torch.zeros_like(self.action[:, 0]) if self.before is None else self.before
        return torch.cat([before[:, None], self.action[:, :-1]], 1)

    def clip_first(self) -> Tensor:
        """`(B, T)` bool: is_first, and true at t = 0, for clips that begin without memory."""
        first = self.is_first.clone()
        first[:, 0] = True
        return first


def class_by_name(field: str, name: str, known: Mapping[str, type]) -> type:
    """The class that a field of the configuration names: a known word or a dotted path `package.module:Class`.

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
        missing = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
        fix = "; start in the folder where it lies, or install it" if missing else ""
        raise ValueError(f"{field} = {name}: {error}{fix}") from None
