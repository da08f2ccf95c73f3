"""Between the host and the device that M dreams on: actions there, and what is seen back, each in as few transfers as
can be, and none that the host waits for but the last."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.envs.contract import ActionSpec, UserError


class Actions:
    """The actions that n copies take: checked on the host, encoded where M computes.

    They lie in tensors that stay where they are, so that a recorded graph finds them there. On a device they travel
    from page-locked memory, without the host waiting.

    Args:
        space: the batched action space, to be named in errors.
    """

    def __init__(self, spec: ActionSpec, space: Any, n: int, device: torch.device) -> None:
        self.space, self.discrete = space, bool(spec.parts)
        self.shape = (n, *spec.native["shape"])
        columns = len(spec.parts or spec.low)
        self.start = np.array(spec.native["start"], np.int64).reshape(-1) if self.discrete else None
        self.parts = np.array(spec.parts, np.int64)
        kind = torch.int64 if self.discrete else torch.float64
        # `(n, columns)`: choices counted from 0, or native values of a box
        self._host = torch.zeros(n, columns, dtype=kind, pin_memory=device.type == "cuda")
        self._there = self._host.to(device)  # the same tensor, on the CPU
        self._values = self._host.numpy()
        if self.discrete:
            # entry a of an encoded action says whether factor part[a] is at value[a]
            self._part = torch.from_numpy(np.repeat(np.arange(columns), self.parts)).to(device)
            self._value = torch.from_numpy(np.concatenate([np.arange(k) for k in self.parts])).to(device)
        else:
            low, high = np.array(spec.low), np.array(spec.high)
            width = np.where(high > low, high - low, 1.0)
            self._low, self._width, self._moves = (torch.from_numpy(t).to(device) for t in (low, width, high > low))

    def put(self, actions: Any) -> None:
        """Native actions `(n, *native shape)` are to be taken now.

        Raises:
            UserError: not of this action space.
        """
        values = np.asarray(actions)
        fits = values.shape == self.shape and values.dtype.kind in ("iu" if self.discrete else "iuf")
        if not fits or not self._taken(values.reshape(self._values.shape)):
            raise UserError(f"actions {values!r:.80} are not finite members of {self.space}".replace("\n", " "))
        if self._there is not self._host:
            self._there.copy_(self._host, non_blocking=True)

    def _taken(self, values: np.ndarray) -> bool:
        """Write values `(n, columns)` down; whether all can be taken."""
        held = self._values
        np.copyto(held, values, casting="unsafe")
        if self.start is None:
            return bool(np.isfinite(held).all())
        held -= self.start
        return bool(held.min() >= 0 and (held < self.parts).all())

    def encoded(self) -> Tensor:
        """What was put, as ActionSpec.encode has it, `(n, A)`; boxes clipped to their bounds."""
        if self.discrete:
            return (self._there.index_select(1, self._part) == self._value).float()
        scaled = 2.0 * (self._there - self._low) / self._width - 1.0
        return torch.where(self._moves, scaled, 0.0).clamp(-1, 1).float()


def index(rows: np.ndarray, device: torch.device) -> Tensor:
    """Indices `(n,)` to index tensors there with. The host does not wait for it."""
    found = torch.from_numpy(rows)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


class OnTheWay:
    """A tree of tensors on its way to the host, in one transfer for each type of them. Work that the device is given
    after this is not waited for.

    From CUDA they come in page-locked memory, straight from the device. It is handed out anew once nothing holds the
    arrays any more; whoever keeps very many does better to keep copies.
    """

    def __init__(self, tree: Any, device: torch.device) -> None:
        away = device.type == "cuda"
        tensors, form = pytree.tree_flatten(tree)
        arrays: list[Any] = [None] * len(tensors)
        for kind in dict.fromkeys(t.dtype for t in tensors):
            which = [i for i, t in enumerate(tensors) if t.dtype == kind]
            parts = [tensors[i].flatten() for i in which]
            joined = torch.cat(parts) if len(parts) > 1 else parts[0]
            held = joined.to("cpu", non_blocking=away, copy=True).numpy()
            ends = np.cumsum([len(part) for part in parts])[:-1]
            for i, part in zip(which, np.split(held, ends), strict=True):
                arrays[i] = part.reshape(tensors[i].shape)
        self._arrays = pytree.tree_unflatten(arrays, form)
        self._there = torch.cuda.Event() if away else None
        if self._there is not None:
            self._there.record()

    def arrays(self) -> Any:
        """The tree, of arrays of their own. The host waits for them here."""
        if self._there is not None:
            self._there.synchronize()
        return self._arrays


def fetched(tree: Any, device: torch.device) -> Any:
    """The tree, of arrays of their own, as soon as they are there."""
    return OnTheWay(tree, device).arrays()
