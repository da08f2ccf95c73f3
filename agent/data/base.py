"""What trainers ask of a replay, wherever it is kept."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class ReplayBuffer(Protocol):
    """Rows of n streams, the oldest of which make room for new ones. `Replay` keeps them on disk, `DeviceReplay` in the
    memory of the device; each has an `add` of its own, for arrays or for tensors."""

    def __len__(self) -> int:
        """Rows kept, over all streams."""
        ...

    @property
    def longest_clip(self) -> int:
        """Rows of the longest clip that a full replay can always sample."""
        ...

    def can_sample(self, length: int) -> bool:
        """Whether there is a clip of `length` rows."""
        ...

    def sample(
        self,
        rng: np.random.Generator,
        batch: int,
        length: int,
        episode_start_fraction: float = 0.0,
        priority_fraction: float = 0.0,
    ) -> dict[str, Any]:
        """`batch` clips of `length` rows: the first share of them begin where an episode begins, the second share are
        around rows of high priority, the others anywhere. Fields are `(B, T, ...)`, `obs` a dict of them."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` needs, for a checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Go back to that state; warnings of what was lost."""
        ...

    def commit_eviction(self) -> None:
        """Called when a checkpoint with the last `state` is on disk: what it does not need may go."""
        ...

    def close(self) -> None: ...
