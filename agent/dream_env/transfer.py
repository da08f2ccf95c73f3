"""Transfers between the host and M's device: actions to it, observations back, in as few copies as possible. The host
waits only for the last."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.envs.contract import ActionSpec, UserError


class Actions:
    """The actions of n copies: checked on the host, encoded on the device.

    They are kept in the same tensors, as a captured graph needs it. They are copied to a device from page-locked
    memory, without the host waiting.

    Args:
        space: the batched action space, for error messages.
    """

    def __init__(self, spec: ActionSpec, space: Any, n: int, device: torch.device) -> None:
        self.space = space
        self.discrete = bool(spec.parts)
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
            # entry a of an encoded action is 1 if factor part[a] has the value value[a]
            self._part = torch.from_numpy(np.repeat(np.arange(columns), self.parts)).to(device)
            self._value = torch.from_numpy(np.concatenate([np.arange(k) for k in self.parts])).to(device)
        else:
            low = np.array(spec.low)
            high = np.array(spec.high)
            width = np.where(high > low, high - low, 1.0)
            self._low = torch.from_numpy(low).to(device)
            self._width = torch.from_numpy(width).to(device)
            self._moves = torch.from_numpy(high > low).to(device)

    def put(self, actions: Any) -> None:
        """Set the native actions `(n, *native shape)` of this step.

        Raises:
            UserError: they are not members of the action space.
        """
        values = np.asarray(actions)
        fits = values.shape == self.shape and values.dtype.kind in ("iu" if self.discrete else "iuf")
        if not fits or not self._taken(values.reshape(self._values.shape)):
            raise UserError(f"actions {values!r:.80} are not finite members of {self.space}".replace("\n", " "))
        if self._there is not self._host:
            self._there.copy_(self._host, non_blocking=True)

    def _taken(self, values: np.ndarray) -> bool:
        """Store values `(n, columns)`. Returns whether all are valid."""
        held = self._values
        np.copyto(held, values, casting="unsafe")
        if self.start is None:
            return bool(np.isfinite(held).all())
        held -= self.start
        return bool(held.min() >= 0 and (held < self.parts).all())

    def encoded(self) -> Tensor:
        """The actions as ActionSpec.encode encodes them, `(n, A)`; boxes are clipped to their bounds."""
        if self.discrete:
            return (self._there.index_select(1, self._part) == self._value).float()
        scaled = 2.0 * (self._there - self._low) / self._width - 1.0
        return torch.where(self._moves, scaled, 0.0).clamp(-1, 1).float()


def index(rows: np.ndarray, device: torch.device) -> Tensor:
    """Indices `(n,)` as a tensor on the device. The host does not wait for the copy."""
    indices = torch.from_numpy(rows)
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices


class OnTheWay:
    """A tree of tensors that is being copied to the host, with one transfer for each dtype. It does not wait for work
    that the device is given later.

    From CUDA the arrays arrive in page-locked memory, which is reused once no array refers to it. To keep many of them,
    keep copies.
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
        """The tree as new arrays. The host waits for the transfer here."""
        if self._there is not None:
            self._there.synchronize()
        return self._arrays


def fetched(tree: Any, device: torch.device) -> Any:
    """The tree as new arrays on the host; waits for the device."""
    return OnTheWay(tree, device).arrays()
