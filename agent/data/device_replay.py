"""A replay buffer in the memory of the device: frames of an environment that returns tensors never leave it.

It needs a vector environment with `reset_tensors(seed)` and `step_tensors(actions)`, NEXT_STEP autoreset and a Discrete
action, such as `longdream/FastMemoryMaze-9x9-v0`. agent/data/replay.py is the replay buffer on disk.
"""

from __future__ import annotations

from collections.abc import Callable
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


class WeightedRows:
    """Chooses rows of a ring (time, stream) in proportion to their weight, in two steps: a time, then a stream.

    The sum of the weights of each time is kept, so that a choice costs O(times + streams). Nothing waits for the
    device.

    Args:
        values: `(times, n)`, a field of the ring. It is read whenever rows are chosen.
        weigh: gives the weights of values, float64 and not negative.
    """

    def __init__(self, values: Tensor, weigh: Callable[[Tensor], Tensor]):
        self.values = values
        self.weigh = weigh
        self.sums = torch.zeros(len(values), dtype=torch.float64, device=values.device)

    def update(self, at: int) -> None:
        """Take in the values that were written at time `at` of the ring."""
        self.sums[at] = self.weigh(self.values[at]).sum()

    def choose(self, order: Tensor, u_time: Tensor, u_stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose B rows.

        Args:
            order: `(P,)`, the times of the ring to choose from.
            u_time, u_stream: `(B,)` float64, uniform in [0, 1).

        Returns:
            place `(B,)`, an index into order; stream `(B,)`; whether any of the times has weight, `()` bool. If none
            has, place and stream mean nothing, but are in range.
        """
        ends = self.sums[order].cumsum(0)
        place = _search(ends, u_time)
        weights = self.weigh(self.values[order[place]])
        stream = _search(weights.cumsum(1), u_stream[:, None])[:, 0]
        return place, stream, ends[-1] > 0


class DeviceReplay:
    """The last `capacity` rows of n streams in the memory of `device`: a ring buffer with axes (time, stream).

    Checkpoints do not contain it. A resumed run fills it again before it learns.

    Args:
        priority: what gives a row its priority, see ReplayConfig.

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
        if self.times < 1:
            raise UserError(f"replay.capacity = {capacity} is less than a row for each of {num_envs} copies")
        shapes = {f"obs/{key}": (obs.shape, getattr(torch, obs.dtype.name)) for key, obs in spec.obs.items()}
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
        self.starts = WeightedRows(self.fields["is_first"], Tensor.double)
        self.priority = WeightedRows(self.fields[priority], _positive if priority == "surprise" else _not_zero)
        self.added = 0  # rows added to each stream so far
        self.adding = 0
        """Newest times that may still be on their way, where rows are added while others are sampled. Neither they nor
        the times that they replace are sampled."""

    def __len__(self) -> int:
        return min(self.added, self.times) * self.num_envs

    @property
    def longest_clip(self) -> int:
        """Length of the longest clip that a full replay can sample, in rows."""
        return self.times - self.adding

    def add(self, row: DeviceRow, action: Tensor, surprise: Tensor) -> None:
        """Append one row to every stream: action `(n, A)`, encoded, chosen from row.obs, and surprise `(n,)`."""
        at = self.added % self.times
        for key, value in row.obs.items():
            self.fields[f"obs/{key}"][at] = value
        for key in ("reward", "is_first", "terminated", "truncated"):
            self.fields[key][at] = getattr(row, key)
        self.fields["action"][at] = action.to(self.fields["action"].dtype)
        self.fields["surprise"][at] = surprise
        self.starts.update(at)
        self.priority.update(at)
        self.added += 1

    @property
    def _held(self) -> int:
        """Times that can be sampled."""
        return max(0, min(self.added, self.times) - self.adding)

    def can_sample(self, length: int) -> bool:
        return self._held >= length

    def sample(
        self,
        rng: np.random.Generator,
        batch: int,
        length: int,
        episode_start_fraction: float = 0.0,
        priority_fraction: float = 0.0,
    ) -> dict[str, Any]:
        """Sample `batch` clips of `length` rows as `Replay.sample` does. Fields are tensors on the device.

        The host does not wait for the device. It draws four numbers for each clip, whatever the rows contain.

        Raises:
            UserError: the replay holds no clip of that length.
        """
        if not self.can_sample(length):
            raise UserError(
                f"the replay holds no clip of {length} rows: collect more before learning, shorten the clips, or give "
                f"it more capacity (a full one has clips of {self.longest_clip:,} rows)"
            )
        held = self._held
        last = held - length  # the last place where a clip can begin; places count from the oldest row
        order = (torch.arange(held, device=self.device) + (self.added - self.adding - held)) % self.times
        # kinds of clips exclude each other, so that they can share the other three numbers
        kind, u_time, u_stream, u_offset = _to_device(rng.random((4, batch)), self.device)
        begin = (u_time * (last + 1)).long()
        stream = (u_stream * self.num_envs).long()
        if episode_start_fraction:
            place, its_stream, exists = self.starts.choose(order[: last + 1], u_time, u_stream)
            chosen = exists & (kind < episode_start_fraction)
            begin = torch.where(chosen, place, begin)
            stream = torch.where(chosen, its_stream, stream)
        if priority_fraction:
            special = episode_start_fraction + priority_fraction
            anchor, its_stream, exists = self.priority.choose(order, u_time, u_stream)
            chosen = exists & (kind >= episode_start_fraction) & (kind < special)
            low = (anchor - length + 1).clamp(min=0)
            high = anchor.clamp(max=last)
            begin = torch.where(chosen, low + (u_offset * (high - low + 1)).long(), begin)
            stream = torch.where(chosen, its_stream, stream)
        rows = order[begin[:, None] + torch.arange(length, device=self.device)]
        out = {name: values[rows, stream[:, None]] for name, values in self.fields.items()}
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


def _search(ends: Tensor, u: Tensor) -> Tensor:
    """Index of the first entry of ends `(..., P)` that exceeds u times the last one, for each u `(..., B)`.

    With the cumulative sum of weights in ends and u uniform in [0, 1), an index comes up in proportion to its weight.
    """
    # The product is always below a positive total. If the total is 0, no entry exceeds it, and the clamp is needed.
    return torch.searchsorted(ends, u * ends[..., -1:], right=True).clamp(max=ends.shape[-1] - 1)


def _positive(surprise: Tensor) -> Tensor:
    return surprise.double().clamp(min=0)


def _not_zero(reward: Tensor) -> Tensor:
    return (reward != 0).double()


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    values = torch.from_numpy(numbers)
    if device.type == "cuda":  # only copies from pinned memory are asynchronous
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
