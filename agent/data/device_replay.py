"""A replay buffer in the memory of the device: frames of an environment that returns tensors never leave it.

It needs a vector environment with `reset_tensors(seed)` and `step_tensors(actions)`, NEXT_STEP autoreset and a Discrete
action, such as `longdream/FastMemoryMaze-9x9-v0`. agent/data/replay.py is the replay buffer on disk.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longdream.envs.contract import EnvSpec, UserError


class DeviceRow(NamedTuple):
    """One time step of n copies: as `longdream.envs.contract.Row`, but of tensors."""

    obs: dict[str, Tensor]
    is_first: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


class DeviceReplay:
    """The last `capacity` rows of n streams in the memory of `device`: a ring buffer with axes (time, stream).

    Checkpoints do not contain it. A resumed run fills it again before it learns.

    Raises:
        UserError: the capacity is too small, or the device has too little memory for it.
    """

    def __init__(
        self,
        device: torch.device,
        spec: EnvSpec,
        num_envs: int,
        capacity: int,
        priority: Literal["surprise", "reward"] = "surprise",
    ):
        self.device = device
        self.num_envs = num_envs
        self.times = capacity // num_envs
        self.priority = priority
        if self.times < 1:
            raise UserError(f"replay.capacity = {capacity} is less than a row for each of {num_envs} copies")
        kinds = {"image": torch.uint8, "vector": torch.float32, "discrete": torch.int64}
        shapes = {f"obs/{key}": (obs.shape, kinds[obs.kind]) for key, obs in spec.obs.items()}
        shapes["action"] = (spec.action.size,), torch.uint8 if spec.action.parts else torch.float32
        shapes |= {key: ((), torch.float32) for key in ("reward", "surprise")}
        shapes |= {key: ((), torch.bool) for key in ("is_first", "terminated", "truncated")}
        try:
            self.fields = {
                name: torch.zeros(self.times, num_envs, *shape, dtype=kind, device=device)
                for name, (shape, kind) in shapes.items()
            }
        except RuntimeError:  # OutOfMemoryError on CUDA is a subclass
            raise UserError(
                f"replay.capacity = {capacity:,} rows do not fit the memory of {device}: lower it, or keep the replay "
                f"on disk (replay.keep = disk)"
            ) from None
        self.firsts = np.zeros((self.times, num_envs), bool)  # is_first on the host: sampling does not wait for it
        self.added = 0  # rows added to each stream so far

    def __len__(self) -> int:
        return min(self.added, self.times) * self.num_envs

    @property
    def longest_clip(self) -> int:
        """Length of the longest clip that a full replay can sample, in rows."""
        return self.times

    def add(self, row: DeviceRow, action: Tensor, surprise: Tensor, first: np.ndarray) -> None:
        """Append one row to every stream; first `(n,)` is row.is_first on the host."""
        at = self.added % self.times
        for key, value in row.obs.items():
            self.fields[f"obs/{key}"][at] = value
        for key in ("reward", "is_first", "terminated", "truncated"):
            self.fields[key][at] = getattr(row, key)
        self.fields["action"][at] = action.to(self.fields["action"].dtype)
        self.fields["surprise"][at] = surprise
        self.firsts[at] = first
        self.added += 1

    def can_sample(self, length: int) -> bool:
        return min(self.added, self.times) >= length

    def sample(
        self,
        rng: np.random.Generator,
        batch: int,
        length: int,
        episode_start_fraction: float = 0.0,
        priority_fraction: float = 0.0,
    ) -> dict[str, Any]:
        """Sample `batch` clips of `length` rows as `Replay.sample` does. Fields are tensors on the device."""
        held = min(self.added, self.times)
        oldest = self.added - held  # times count from the first row ever added
        last = held - length  # the last row at which a clip can begin, counted from the oldest row
        begin = rng.integers(last + 1, size=batch)
        env = rng.integers(self.num_envs, size=batch)
        kind = rng.random(batch)
        order = (oldest + np.arange(held)) % self.times
        at_starts = np.flatnonzero(kind < episode_start_fraction)
        if at_starts.size:
            times, streams = np.nonzero(self.firsts[order[: last + 1]])
            if times.size:
                pick = rng.integers(times.size, size=at_starts.size)
                begin[at_starts] = times[pick]
                env[at_starts] = streams[pick]
        special = episode_start_fraction + priority_fraction
        by_priority = np.flatnonzero((kind >= episode_start_fraction) & (kind < special))
        if by_priority.size:
            rows = self.fields[self.priority][torch.from_numpy(order).to(self.device)]
            mass = (rows.clamp(min=0) if self.priority == "surprise" else rows != 0).double().flatten()
            ends = mass.cumsum(0)
            if float(ends[-1]) > 0:
                level = torch.from_numpy(rng.random(by_priority.size)).to(self.device) * ends[-1]
                hit = torch.searchsorted(ends, level, right=True).clamp(max=len(ends) - 1).cpu().numpy()
                anchor, env[by_priority] = np.divmod(hit, self.num_envs)
                low = np.maximum(0, anchor - length + 1)
                high = np.minimum(anchor, last)
                begin[by_priority] = low + (rng.random(by_priority.size) * (high - low + 1)).astype(np.int64)
        time = (oldest + begin[:, None] + np.arange(length)) % self.times
        rows = torch.from_numpy(time).to(self.device)
        streams = torch.from_numpy(env[:, None]).to(self.device)
        out = {name: values[rows, streams] for name, values in self.fields.items()}
        out["action"] = out["action"].float()
        obs = {name[4:]: out.pop(name) for name in list(out) if name.startswith("obs/")}
        return {"obs": obs, **out}

    def state(self) -> dict[str, Any]:
        return {"kept": "on the device"}

    def restore(self, state: dict[str, Any]) -> list[str]:
        return ["the replay was in the accelerator's memory: it is collected anew before learning goes on"]

    def commit_eviction(self) -> None:
        """Does nothing: there are no files."""

    def close(self) -> None:
        self.fields = {}
