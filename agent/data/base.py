"""The interface of replay buffers, on disk or on a device."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class ReplayBuffer(Protocol):
    """A bounded buffer of the rows of n streams; the oldest rows are dropped first. `Replay` keeps them on disk,
    `DeviceReplay` in the memory of the device. Each has its own `add`, for arrays or for tensors."""

    def __len__(self) -> int:
        """Number of rows in the buffer, over all streams."""
        ...

    @property
    def longest_clip(self) -> int:
        """Length of the longest clip that a full replay can always sample, in rows."""
        ...

    def can_sample(self, length: int) -> bool:
        """Whether the buffer holds a clip of `length` rows."""
        ...

    def sample(
        self,
        rng: np.random.Generator,
        batch: int,
        length: int,
        episode_start_fraction: float = 0.0,
        priority_fraction: float = 0.0,
    ) -> dict[str, Any]:
        """Sample `batch` clips of `length` rows.

        A clip begins at the first row of an episode with probability `episode_start_fraction`, lies around a row of
        high priority with probability `priority_fraction`, and is uniform otherwise. Fields are `(B, T, ...)`; `obs` is
        a dict of fields.
        """
        ...

    def state(self) -> dict[str, Any]:
        """The state that `restore` takes, for a checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Restore a saved state. Returns a warning for each loss."""
        ...

    def commit_eviction(self) -> None:
        """Delete what the last `state` does not need. Called once a checkpoint with that state is on disk."""
        ...

    def close(self) -> None: ...
